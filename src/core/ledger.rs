//! The ledger's types: which grants are in force, and what was made for them.

use serde::{Deserialize, Serialize};

use crate::core::container::{Container, short_id};
use crate::core::device::{Access, Device, Identity, Number};

/// Version of the ledger's format.
pub const VERSION: u32 = 1;

/// A container as a grant remembers it: enough to find it again, and to know that it is the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Holder {
    /// The runtime's id, or `pid:N`.
    pub id: String,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Process id of its init.
    pub pid: u32,
    /// Start time of init in clock ticks after boot.
    pub start_time: u64,
    /// Path of its own cgroup below the cgroup2 root; empty where it has none.
    pub cgroup: String,
    /// Id of that cgroup; 0 where it has none: then no device filter is its own, and its right is the node itself.
    pub cgroup_id: u64,
    /// The ordinary user whose container it is; 0 where it is root's.
    #[serde(default, skip_serializing_if = "is_root")]
    pub user: u32,
}

fn is_root(user: &u32) -> bool {
    *user == 0
}

impl Holder {
    /// A container with its own cgroup.
    pub fn new(container: &Container, cgroup: &str, cgroup_id: u64) -> Holder {
        Holder {
            id: container.id.clone(),
            name: container.name.clone(),
            pid: container.pid,
            start_time: container.start_time,
            cgroup: cgroup.to_owned(),
            cgroup_id,
            user: container.user().unwrap_or(0),
        }
    }

    /// A container without a cgroup of its own.
    pub fn without_cgroup(container: &Container) -> Holder {
        Holder::new(container, "", 0)
    }

    /// Whether rights are given to it in the device filter.
    pub fn has_filter(&self) -> bool {
        self.cgroup_id != 0
    }

    /// Who has what is given to it: its cgroup; without one, this container alone.
    pub fn whose(&self) -> (u64, &str) {
        (self.cgroup_id, if self.has_filter() { "" } else { &self.id })
    }

    /// What a person would call it.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| short_id(&self.id))
    }

    /// Whether both are the same run of the same container.
    pub fn is_same_run(&self, other: &Holder) -> bool {
        (&self.id, self.pid, self.start_time) == (&other.id, other.pid, other.start_time)
    }
}

/// A device as a grant remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Granted {
    /// Kind and numbers.
    pub number: Number,
    /// Tells it from a later device with the same numbers.
    pub identity: Identity,
    /// Its node's path on the host.
    pub node: String,
}

impl From<&Device> for Granted {
    fn from(device: &Device) -> Granted {
        Granted { number: device.number, identity: device.identity.clone(), node: device.node.clone() }
    }
}

/// The node that a grant wants in the container.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Node {
    /// Absolute path inside.
    pub path: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// For a symbolic link: the path of the node that it points to. Owner and mode are that node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_to: Option<String>,
}

impl Node {
    /// As the host has it.
    pub fn of(device: &Device) -> Node {
        let Device { uid, gid, mode, .. } = *device;
        Node { path: device.node.clone(), uid, gid, mode, link_to: None }
    }

    /// A node of which nothing but the path is known.
    pub fn at(path: &str) -> Node {
        Node { path: path.to_owned(), uid: 0, gid: 0, mode: 0, link_to: None }
    }
}

/// Why a grant is there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A rule of this name asks for it: a category, a seat, or the name of a selector.
    Rule(String),
    /// A person attached it.
    Manual,
    /// A person attached it for good: it is written down, and granted by that like by a rule.
    Persist,
}

/// A right on a device and a node for it, in one run of one container.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// Who has it.
    pub holder: Holder,
    /// On what.
    pub device: Granted,
    /// Which rights.
    pub access: Access,
    /// The node inside.
    pub node: Node,
    /// Why.
    pub origin: Origin,
    /// Whether the container's own specification names the device: then its runtime's filter grants it as well.
    #[serde(default)]
    pub at_start: bool,
    /// Whether no other container may have the device meanwhile.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exclusive: bool,
}

impl Grant {
    /// Whether both put the same device with the same rights at the same path of the same container.
    pub fn is_same(&self, other: &Grant) -> bool {
        self.holder.is_same_run(&other.holder)
            && self.device.number == other.device.number
            && self.device.identity == other.device.identity
            && self.node.path == other.node.path
            && self.access == other.access
    }
}

/// How far a grant has come, and whose its node is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Written down before the act: nothing, or any part of it, may have been done.
    Pending,
    /// As pending, where these directories are made for the node.
    Making(Vec<String>),
    /// We made the node, and these directories for it.
    Ours(Vec<String>),
    /// The container had the node; it stays.
    Container,
    /// The container's directory is the host's; its node stays.
    Host,
}

/// One line of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// The grant.
    pub grant: Grant,
    /// What was made for it.
    pub placement: Placement,
    /// Why taking it back failed, where it did: what is left is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_over: Option<String>,
}

/// Why a grant is left over whose taking back has begun: written down before the act.
pub const BEING_TAKEN_BACK: &str = "taking it back was interrupted";

impl Entry {
    /// One that nothing is done for yet.
    pub fn pending(grant: Grant) -> Entry {
        Entry { grant, placement: Placement::Pending, left_over: None }
    }

    /// Whether it is in force whole, and is to stay so.
    pub fn is_settled(&self) -> bool {
        !self.is_half_made() && self.left_over.is_none()
    }

    /// Whether the one who made it or took it back did not come to the end.
    pub fn is_interrupted(&self) -> bool {
        self.is_half_made() || self.left_over.as_deref() == Some(BEING_TAKEN_BACK)
    }

    /// The same, about to be taken back.
    pub fn leaving(&self) -> Entry {
        let reason = self.left_over.clone().unwrap_or_else(|| BEING_TAKEN_BACK.to_owned());
        Entry { left_over: Some(reason), ..self.clone() }
    }

    fn is_half_made(&self) -> bool {
        matches!(self.placement, Placement::Pending | Placement::Making(_))
    }
}

/// Rights on a device that the container's runtime granted at its start, withdrawn because the device is unplugged. They
/// stay so until the device, or another one with its number that the container asks for, is granted to it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withdrawal {
    /// Whose.
    pub holder: Holder,
    /// On what.
    pub number: Number,
}

impl Withdrawal {
    /// Reading and writing. To make a node gives nobody access, and many runtimes let a container make any.
    pub const ACCESS: Access = Access::READ.union(Access::WRITE);

    /// Whether both are of one device in one container; its name may have become known between them.
    pub fn is_same(&self, other: &Withdrawal) -> bool {
        (self.holder.whose(), self.number) == (other.holder.whose(), other.number)
    }
}

/// The ledger of one container, as it lies on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// [`VERSION`].
    pub version: u32,
    /// What is in force.
    pub entries: Vec<Entry>,
    /// What is withdrawn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withdrawn: Vec<Withdrawal>,
}
