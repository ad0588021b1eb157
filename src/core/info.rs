//! What people and programs are told of grants, devices, containers and the agent. The field names are stable;
//! `io.qmhotplug.varlink` has them all.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::core::device::{Access, Kind};
use crate::core::explanation::Explanation;
use crate::core::figures::Latency;
use crate::core::ledger::{Entry, Origin, Placement};

/// A grant as it is told to people and programs. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantInfo {
    /// Name of the container, or its id where it has none.
    pub container: String,
    /// Its id.
    pub id: String,
    /// The device's node on the host.
    pub device: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Rights, a subset of `rwm`.
    pub access: Access,
    /// What the right is: `filter`, an entry in the device filter, or `node` where the container has no filter of its own.
    #[serde(default = "filter")]
    pub right: String,
    /// Path of the node inside.
    pub path: String,
    /// Whose the node is: `ours`, `container's` or `host's`; `pending` while it is being made; `none` where something that
    /// was attached for good is not in force.
    pub node: String,
    /// Owner of the node.
    pub uid: u32,
    /// Group of the node.
    pub gid: u32,
    /// Permission bits of the node, as a number.
    pub mode: u32,
    /// `manual`, or `rule:` and the category.
    pub origin: String,
    /// Whether it is granted again after a restart of the container or of the machine, by `attach --persist`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub persist: bool,
    /// What else is to be said: left over, unplugged, container exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// An agent of another version does not say.
fn filter() -> String {
    right(true).to_owned()
}

/// What the right is, by whether the holder has a device filter.
pub fn right(has_filter: bool) -> &'static str {
    if has_filter { "filter" } else { "node" }
}

impl From<&Entry> for GrantInfo {
    fn from(entry: &Entry) -> GrantInfo {
        let grant = &entry.grant;
        GrantInfo {
            container: grant.holder.label().to_owned(),
            id: grant.holder.id.clone(),
            device: grant.device.node.clone(),
            kind: grant.device.number.kind,
            major: grant.device.number.major,
            minor: grant.device.number.minor,
            access: grant.access,
            right: right(grant.holder.has_filter()).to_owned(),
            path: grant.node.path.clone(),
            node: match entry.placement {
                Placement::Pending | Placement::Making(_) => "pending",
                Placement::Ours(_) => "ours",
                Placement::Container => "container's",
                Placement::Host => "host's",
            }
            .to_owned(),
            uid: grant.node.uid,
            gid: grant.node.gid,
            mode: grant.node.mode,
            origin: match &grant.origin {
                Origin::Manual | Origin::Persist => "manual".to_owned(),
                Origin::Rule(_) if grant.at_start && entry.placement == Placement::Container => "start".to_owned(),
                Origin::Rule(category) => format!("rule:{category}"),
            },
            persist: grant.origin == Origin::Persist,
            note: entry.left_over.as_ref().map(|reason| format!("left over: {reason}")),
        }
    }
}

/// How the agent and the filter are. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// Whether an agent answered.
    pub agent: bool,
    /// Its version, or this program's.
    pub version: String,
    /// `override`, `degraded` (a foreign program at the cgroup root runs after ours) or `none`.
    pub filter: String,
    /// Names of those foreign programs.
    pub after: Vec<String>,
    /// Entries in the filter's map.
    pub entries: usize,
    /// Rights that runtimes gave at a container's start, withdrawn while their device is unplugged.
    pub withdrawn: usize,
    /// Containers that run, as far as they are found.
    pub containers: usize,
    /// Grants in the ledger.
    pub grants: usize,
    /// Where device events come from: `udev`, `kernel`, or `none` without an agent.
    pub events: String,
    /// What is wrong with the configuration, each `FILE:LINE:COLUMN: REASON`: it was refused, or files were passed over.
    #[serde(default)]
    pub configuration: Vec<String>,
    /// For how many seconds the agent has run.
    #[serde(default)]
    pub uptime: Option<u64>,
    /// Events of devices that it has worked through.
    #[serde(default)]
    pub seen: u64,
    /// How often events were lost, since they came faster than they could be read.
    #[serde(default)]
    pub lost: u64,
    /// How often everything was compared: at the start, after a loss, after a reload.
    #[serde(default)]
    pub compared: u64,
    /// From hearing of an event to the grant, if there was one.
    #[serde(default)]
    pub latency: Option<Latency>,
    /// Grants of each container, by its name, or by its id where another one has that name.
    #[serde(default)]
    pub of_container: BTreeMap<String, usize>,
}

/// A device of the host, with what selectors can ask of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its node.
    pub device: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Owner of the node.
    pub uid: u32,
    /// Group of the node.
    pub gid: u32,
    /// Permission bits of the node, as a number.
    pub mode: u32,
    /// Its subsystem.
    pub subsystem: String,
    /// The drivers on its way, nearest first.
    pub driver: Vec<String>,
    /// `VID:PID`.
    pub usb: Option<String>,
    /// The serial number.
    pub serial: Option<String>,
    /// The model.
    pub model: Option<String>,
    /// The vendor.
    pub vendor: Option<String>,
    /// udev's name of where it is plugged in.
    pub id_path: Option<String>,
    /// The USB port.
    pub port: Option<String>,
    /// The addresses on its way, nearest first.
    pub pci: Vec<String>,
    /// The seat, where it has one.
    pub seat: Option<String>,
    /// udev's tags.
    pub tags: Vec<String>,
    /// Links to its node.
    pub links: Vec<String>,
    /// The categories that it belongs to.
    pub categories: Vec<String>,
}

/// A running container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerInfo {
    /// Its name, where it has one.
    pub name: Option<String>,
    /// Its id.
    pub id: String,
    /// Who runs it.
    pub runtime: String,
    /// Its init.
    pub pid: u32,
    /// Its own cgroup, where it can be worked on.
    pub cgroup: Option<String>,
    /// The rules by which it asks for devices, by name: categories, seats, selectors, and those of the configuration.
    pub asks: Vec<String>,
    /// Paths of the nodes that it was granted.
    pub has: Vec<String>,
    /// Why it cannot be worked on.
    pub problem: Option<String>,
}

/// The explanation of one device in one container. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// Name of the container, or its id where it has none.
    pub container: String,
    /// Its id.
    pub id: String,
    /// The device's node on the host.
    pub device: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Where its node is or would be inside.
    pub path: String,
    /// Findings and advice.
    #[serde(flatten)]
    pub explanation: Explanation,
}

/// How one device went. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proven {
    /// Name of the container, or its id where it has none.
    pub container: String,
    /// Its id.
    pub id: String,
    /// Path of the node inside.
    pub path: String,
    /// The device's node on the host.
    pub device: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// What was asked for: what is granted of reading and writing, or both where nothing is.
    pub access: Access,
    /// Whether the user that init is can open it; `null` where only mknod is granted, which is not tried.
    pub accessible: Option<bool>,
    /// What open(2) answers, or would: 0 where it succeeds; `null` where it would open something else.
    pub errno: Option<i32>,
    /// Why it is not accessible.
    pub reason: Option<String>,
    /// Whether it was really opened.
    pub opened: bool,
    /// 0, or the exit code of a command that fails for it.
    pub code: u8,
}
