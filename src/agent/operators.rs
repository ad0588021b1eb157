//! Who may have the agent change something.

use crate::agent::api::{Call, Peer};
use crate::agent::registry::Registry;
use crate::core::container::{Container, Reference};
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
use crate::sys::udev;
use crate::sys::user::{Account, group_name};

/// Whether the caller may have that done: root everything, whoever can connect may read, and an operator may attach and
/// detach where the configuration says so. A refusal is logged.
pub(super) fn may(executor: &Executor, registry: &Registry, containers: &[Container], call: &Call) -> Result<bool> {
    let Call { request, peer, .. } = call;
    if peer.uid == 0 {
        return Ok(true);
    }
    let (may, what) = match request {
        Request::List(_) | Request::Status(_) | Request::Monitor(_) => return Ok(true),
        Request::Attach(its) => {
            let ours = operators(registry, *peer);
            // What is kept outlives the operator's being one.
            let may = its.persist.is_none() && may_attach(&ours, containers, &its.container, &its.device)?;
            (may, format!("attach {} to {}", its.device, its.container))
        }
        Request::Detach(its) => {
            let ours = operators(registry, *peer);
            let may = may_detach(executor, &ours, containers, &its.container, &its.device)?;
            (may, format!("detach {} from {}", its.device, its.container))
        }
        _ => (false, "do that".into()),
    };
    if !may {
        tracing::warn!("uid {} (pid {}) may not {}", peer.uid, peer.pid, excerpt(&what));
    }
    Ok(may)
}

/// What the configuration says of a caller.
struct Operators<'a> {
    caller: Caller,
    all: &'a [Operator],
    look_at_images: bool,
}

fn operators(registry: &Registry, peer: Peer) -> Operators<'_> {
    let account = Account::of(peer.uid);
    let groups = account.user.groups.iter().map(|gid| (*gid, group_name(*gid))).collect();
    let caller = Caller { uid: peer.uid, name: account.name, groups };
    let settings = registry.settings();
    Operators { caller, all: &settings.operators, look_at_images: settings.policies.look_at_images() }
}

impl Operators<'_> {
    fn may(&self, container: &Container, device: Option<&Facts<'_>>) -> bool {
        let container = subject(container, None, self.look_at_images);
        self.all.iter().any(|operator| operator.may(&self.caller, &container, device))
    }
}

fn may_attach(ours: &Operators<'_>, containers: &[Container], name: &str, device: &str) -> Result<bool> {
    // Nobody learns of what there is who may do nothing.
    if ours.all.is_empty() {
        return Ok(false);
    }
    let container = lookup(containers, &Reference::parse(name).map_err(Error::Usage)?)?;
    let device = udev::by_path(device)?;
    Ok(ours.may(&container, Some(&Facts::new(&device, &KernelSysfs::default()))))
}

/// What is attached for good is root's.
fn may_detach(
    executor: &Executor,
    ours: &Operators<'_>,
    containers: &[Container],
    name: &str,
    device: &str,
) -> Result<bool> {
    if ours.all.is_empty() {
        return Ok(false);
    }
    let reference = Reference::parse(name).map_err(Error::Usage)?;
    let container = lookup(containers, &reference)?;
    let attached = executor.persisted.named(&reference, Some(&container));
    let sysfs = KernelSysfs::default();
    let may = |entry: &Entry| {
        let granted = &entry.grant.device;
        let present = udev::by_number(granted.number).filter(|its| its.identity == granted.identity);
        let is_kept = attached.is_some_and(|its| its.devices.iter().any(|its| its.node.path == entry.grant.node.path));
        let facts = present.as_ref().map(|device| Facts::new(device, &sysfs));
        !is_kept && ours.may(&container, facts.as_ref())
    };
    // Where there is nothing to take back, that is said to whoever may change the container.
    let meant = meant(executor.ledger.entries(), &container, device);
    Ok(if meant.is_empty() { ours.may(&container, None) } else { meant.iter().all(may) })
}
