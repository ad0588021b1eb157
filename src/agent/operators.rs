//! Who may have the agent change something.

use crate::agent::api::{Call, Peer};
use crate::agent::registry::Registry;
use crate::core::container::{Container, Reference, Runtime};
use crate::core::device::Kind;
use crate::core::facts::Facts;
use crate::core::ledger::Entry;
use crate::core::operator::{Caller, Operator};
use crate::core::protocol::Request;
use crate::core::text::excerpt;
use crate::error::{Error, Result};
use crate::ops::Executor;
use crate::ops::intention::meant;
use crate::ops::live::{lookup, subject};
use crate::sys::sysfs::KernelSysfs;
use crate::sys::user::{Account, group_name};
use crate::sys::{block, udev};

/// What the host's name service knows of a user.
pub(super) fn caller(uid: u32) -> Caller {
    let account = Account::of(uid);
    let groups = account.user.groups.iter().map(|gid| (*gid, group_name(*gid))).collect();
    Caller { uid, name: account.name, groups }
}

/// Whether the caller may have that done: root everything, whoever can connect may read, and an operator may attach and
/// detach where the configuration says so. A refusal is logged.
pub(super) fn may(executor: &Executor, registry: &Registry, containers: &[Container], call: &Call) -> Result<bool> {
    let Call { request, peer, caller, .. } = call;
    if peer.uid == 0 {
        return Ok(true);
    }
    let ours = Operators { caller: caller.as_ref(), registry };
    let (may, what) = match request {
        Request::List(_) | Request::Status(_) | Request::Monitor(_) => return Ok(true),
        // What is kept outlives the operator's being one.
        Request::Attach(its) if its.persist.is_some() => {
            (Ok(false), format!("attach {} to {} for good", its.device, its.container))
        }
        Request::Attach(its) => (
            ours.may_attach(containers, &its.container, &its.device),
            format!("attach {} to {}", its.device, its.container),
        ),
        Request::Detach(its) => (
            ours.may_detach(executor, containers, &its.container, &its.device),
            format!("detach {} from {}", its.device, its.container),
        ),
        Request::Reload(_) => (Ok(false), "have the configuration read again".into()),
        _ => (Ok(false), "ask for that".into()),
    };
    match &may {
        Ok(true) => {}
        Ok(false) => log_refusal(*peer, &what),
        Err(Error::Refused { reason, .. }) => log_refusal(*peer, &format!("{what}: {reason}")),
        // Nothing was refused: there is no such container or device.
        Err(_) => {}
    }
    may
}

/// A line in the log for what a caller was refused.
pub(super) fn log_refusal(peer: Peer, what: &str) {
    // What one user causes is counted apart from what all others have to tell.
    let container = format!("uid {}", peer.uid);
    tracing::warn!(container, "uid {} (pid {}) may not {}", peer.uid, peer.pid, excerpt(what));
}

/// What the configuration says of a caller.
struct Operators<'a> {
    /// `None` where nobody knows.
    caller: Option<&'a Caller>,
    registry: &'a Registry,
}

impl Operators<'_> {
    /// Where he may do something.
    fn all(&self) -> impl Iterator<Item = (&Caller, &Operator)> {
        let all = self
            .caller
            .into_iter()
            .flat_map(|caller| self.registry.settings().operators.iter().map(move |operator| (caller, operator)));
        all.filter(|(caller, operator)| operator.is(caller))
    }

    fn may(&self, container: &Container, device: Option<&Facts<'_>>) -> bool {
        // What is only a process is no container that root has named.
        let container = Some(container).filter(|its| its.runtime != Runtime::Pid).map(|its| subject(its, None, false));
        container.is_some_and(|container| self.all().any(|(_, operator)| operator.may(&container, device)))
    }

    /// An operator is bounded by policies as annotations are, and the host's own disks are no matter of his.
    fn may_attach(&self, containers: &[Container], name: &str, device: &str) -> Result<bool> {
        // Nobody learns of what there is who may do nothing.
        if self.all().next().is_none() {
            return Ok(false);
        }
        let container = lookup(containers, &Reference::parse(name).map_err(Error::Usage)?)?;
        let (device, sysfs) = (udev::by_path(device)?, KernelSysfs::default());
        let facts = Facts::new(&device, &sysfs);
        if !self.may(&container, Some(&facts)) {
            return Ok(false);
        }
        let policies = &self.registry.settings().policies;
        let bounds = policies.bounds(&subject(&container, None, policies.look_at_images()));
        let in_use = || match device.number.kind {
            Kind::Block => block::in_use(&device.node, device.number),
            Kind::Char => None,
        };
        match bounds.refusal(&facts).or_else(in_use) {
            Some(reason) => Err(Error::Refused { container: container.label().to_owned(), reason }),
            None => Ok(true),
        }
    }

    /// What is attached for good is root's.
    fn may_detach(&self, executor: &Executor, containers: &[Container], name: &str, device: &str) -> Result<bool> {
        if self.all().next().is_none() {
            return Ok(false);
        }
        let reference = Reference::parse(name).map_err(Error::Usage)?;
        let container = lookup(containers, &reference)?;
        let kept = executor.persisted.named(&reference, Some(&container)).map_or(&[][..], |its| &its.devices);
        let sysfs = KernelSysfs::default();
        let may = |entry: &Entry| {
            let granted = &entry.grant.device;
            let present = udev::by_number(granted.number).filter(|its| its.identity == granted.identity);
            let facts = present.as_ref().map(|device| Facts::new(device, &sysfs));
            let is_kept = kept.iter().any(|its| its.node.path == entry.grant.node.path);
            !is_kept && self.may(&container, facts.as_ref())
        };
        let meant = meant(executor.ledger.entries(), &container, device);
        let is_kept = kept.iter().any(|its| its.node.path == device || its.is_named(device));
        Ok(match meant.is_empty() {
            // Where there is nothing to take back, that is said to whoever may change the container.
            true => !is_kept && self.may(&container, None),
            false => meant.iter().all(may),
        })
    }
}
