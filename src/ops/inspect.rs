//! A container looked at from outside, for `explain` and `verify`: neither it nor the ledger is changed.

use std::os::fd::BorrowedFd;

use crate::core::container::Container;
use crate::core::device::{Access, Device, Number};
use crate::core::ledger::{Entry, Holder};
use crate::core::proof::{Answer, Found, Subject};
use crate::error::{Error, Result};
use crate::ops::live::hold;
use crate::sys::cgroup::{Cgroup, CgroupRoot};
use crate::sys::host::Host;
use crate::sys::probe::{Place, Question, ask};
use crate::sys::process::{Process, User};
use crate::sys::udev;

/// Reading and writing: what open(2) asks for.
pub(super) const OPENS: Access = Access::READ.union(Access::WRITE);

/// A container that questions can be asked in.
pub(super) struct Inspection<'a> {
    pub(super) cgroups: &'a CgroupRoot,
    pub(super) holder: Holder,
    pub(super) process: Process,
    /// The cgroup that init is in: the container's own or one below it.
    pub(super) cgroup: Cgroup,
    host: Host,
    user: User,
}

/// What a person means by `DEV`.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// The ledger's entry, where there is one.
    pub(super) entry: Option<Entry>,
    /// The device, while it is plugged in.
    pub(super) device: Option<Device>,
    pub(super) number: Number,
    /// Its node on the host.
    pub(super) node: String,
    /// Where its node is or would be inside.
    pub(super) path: String,
}

impl<'a> Inspection<'a> {
    /// Refused where the container cannot be served.
    pub(super) fn new(cgroups: &'a CgroupRoot, container: &Container) -> Result<Inspection<'a>> {
        let holder = hold(cgroups, container)?;
        let exited = || Error::ContainerExited(container.label().to_owned());
        let process = Process::open_same(container.pid, container.start_time).ok_or_else(exited)?;
        let user = process.user().map_err(|_| exited())?;
        let (its, _) = process.cgroups().map_err(|_| exited())?;
        let is_below = its.strip_prefix(&holder.cgroup).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let cgroup = cgroups.open(if is_below { &its } else { &holder.cgroup }).map_err(|_| exited())?;
        Ok(Inspection { cgroups, holder, process, cgroup, host: Host::observe()?, user })
    }

    /// Why nothing can be asked in it now, in words.
    pub(super) fn frozen(&self) -> Option<String> {
        let path = self.cgroups.frozen(&self.cgroup.path)?;
        Some(format!(
            "it is frozen (cgroup {path}), and so would be who asks in it: let it go on first, with `podman unpause` or the like"
        ))
    }

    /// What is asked about a target.
    pub(super) fn subject(&self, target: &Target) -> Subject {
        let granted = target.entry.as_ref().map_or(OPENS, |entry| entry.grant.access);
        Subject {
            path: target.path.clone(),
            number: target.number,
            access: Access::from_bits(granted.bits() & OPENS.bits()),
            user: format!("uid {}", self.seen_inside(self.user.uid, self.user.gid).0),
        }
    }

    /// Asks inside; where there is no node to ask with, asks the filter with another one.
    pub(super) fn ask(&self, subject: &Subject, open: bool, host: impl FnOnce() -> Result<NodeFd>) -> Result<Answer> {
        let place = Place::Inside { process: &self.process, host: self.host, path: &subject.path };
        let open = open.then_some(subject.number);
        let mut answer = ask(&Question { user: Some(&self.user), open, ..self.question(place, subject.access) })?;
        if let Found::Node(seen) = &mut answer.found {
            (seen.uid, seen.gid) = self.seen_inside(seen.uid, seen.gid);
        }
        if !matches!(&answer.found, Found::Node(seen) if seen.number == subject.number) {
            let node = host()?;
            let place = Place::Node(node.borrow());
            answer.filter = ask(&self.question(place, subject.access))?.filter;
        }
        Ok(answer)
    }

    /// Ids as the container's own programs see them.
    fn seen_inside(&self, uid: u32, gid: u32) -> (u32, u32) {
        self.user.namespace.as_ref().map_or((uid, gid), |namespace| namespace.seen_inside(uid, gid))
    }

    fn question<'b>(&'b self, place: Place<'b>, access: Access) -> Question<'b> {
        Question { label: self.holder.label(), cgroup: &self.cgroup, place, access, user: None, open: None }
    }

    /// The device whose node lies at a path inside.
    fn number_at(&self, path: &str) -> Result<Option<Number>> {
        let place = Place::Inside { process: &self.process, host: self.host, path };
        // To be there is no access.
        match ask(&self.question(place, Access::NONE))?.found {
            Found::Node(seen) => Ok(Some(seen.number)),
            _ => Ok(None),
        }
    }
}

/// A node to ask a filter with.
pub(super) struct NodeFd(std::os::fd::OwnedFd);

impl NodeFd {
    /// The host's, while the device is plugged in, or else one that is made for it.
    pub(super) fn of(target: &Target) -> Result<NodeFd> {
        let fd = match &target.device {
            Some(device) => crate::sys::node::of_host(&device.node, target.number),
            None => crate::sys::node::anonymous(target.number),
        };
        fd.map(NodeFd).map_err(Error::host(format!("get a node of {} to ask the device filter with", target.number)))
    }

    pub(super) fn borrow(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

/// Whether the entry is of this run of the container.
pub(super) fn is_of(entry: &Entry, container: &Container) -> bool {
    let holder = &entry.grant.holder;
    (&holder.id, holder.pid, holder.start_time) == (&container.id, container.pid, container.start_time)
}

/// The entries of this run of the container.
pub(super) fn of_container(mut entries: Vec<Entry>, container: &Container) -> Vec<Entry> {
    entries.retain(|entry| is_of(entry, container));
    entries
}

/// A grant, with its device while that is plugged in.
pub(super) fn target_of(entry: &Entry) -> Target {
    let granted = &entry.grant.device;
    let device = udev::by_number(granted.number).filter(|device| device.identity == granted.identity);
    Target {
        entry: Some(entry.clone()),
        device,
        number: granted.number,
        node: granted.node.clone(),
        // A link of ours leads to a node of ours.
        path: entry.grant.node.link_to.as_ref().unwrap_or(&entry.grant.node.path).clone(),
    }
}

/// What `DEV`, an absolute path, stands for: a grant by its path inside, or by its device; a device of the host; a node
/// inside. `entries` are the container's; `inside` is there where it can be asked.
pub(super) fn targets(
    container: &Container,
    entries: &[Entry],
    inside: Option<&Inspection<'_>>,
    path: &str,
) -> Result<Vec<Target>> {
    let by = |test: &dyn Fn(&Entry) -> bool| -> Vec<Target> {
        entries.iter().filter(|entry| test(entry)).map(target_of).collect()
    };
    let found = by(&|entry| entry.grant.node.path == path);
    if !found.is_empty() {
        return Ok(found);
    }
    let on_host = udev::by_path(path);
    let identity = on_host.as_ref().ok().map(|device| &device.identity);
    let found = by(&|entry| {
        entry.grant.device.node == path || identity.is_some_and(|identity| entry.grant.device.identity == *identity)
    });
    if !found.is_empty() {
        return Ok(found);
    }
    let named = |number: Number| container.devices.iter().find(|(its, _)| *its == number).map(|(_, path)| path.clone());
    let error = match on_host {
        Ok(device) => {
            let (number, node) = (device.number, device.node.clone());
            let path = named(number).unwrap_or_else(|| node.clone());
            return Ok(vec![Target { entry: None, device: Some(device), number, node, path }]);
        }
        Err(error) => error,
    };
    let mut number = container.devices.iter().find(|(_, its)| its == path).map(|(number, _)| *number);
    if let (None, Some(inside)) = (number, inside) {
        number = inside.number_at(path)?;
    }
    let number = number.ok_or(error)?;
    let device = udev::by_number(number);
    let node = device.as_ref().map_or_else(|| path.to_owned(), |device| device.node.clone());
    Ok(vec![Target { entry: None, device, number, node, path: path.to_owned() }])
}
