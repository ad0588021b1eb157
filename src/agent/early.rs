//! Containers with a udevd of their own. It hears of a device from the kernel, as the host's does, and is done with it no
//! later: so they get a node at the kernel's event, and its owner and mode are left to that udevd.

use std::time::Instant;

use crate::agent::reconcile::{carry_out, wanted};
use crate::agent::registry::{Known, Registry};
use crate::core::device::Device;
use crate::core::ledger::{Holder, Node};
use crate::core::mirror::Wish;
use crate::ops::Executor;

impl Registry {
    /// Whether the container wants to be shown what udev knows.
    pub(super) fn wish(&self, holder: &Holder) -> Option<Wish> {
        Some(Wish::of(self.containers.get(&holder.id)?.container.annotations()))
    }

    /// Whether a known container asks for anything.
    pub(super) fn asks(&self, id: &str) -> Option<bool> {
        self.containers.get(id).map(|known| !known.rules.is_empty())
    }
}

/// Shows a container that asks for something what udev knows, and finds out whether it has a udevd of its own.
pub(super) fn prepare(executor: &mut Executor, registry: &Registry, known: &Known) {
    let Some(holder) = &known.holder else { return };
    executor.prepare(holder, Wish::of(known.container.annotations()));
    if executor.has_udevd(holder) {
        known.has_udevd.set(true);
        registry.watched.tell_early(true);
    }
}

/// The host's udevd gives its node an owner and a mode; the container's udevd gives them to the container's. Where a rule
/// of the container's says what they are, that counts.
fn leave_owner(node: &mut Node, device: &Device) {
    if (node.uid, node.gid, node.mode) == (device.uid, device.gid, device.mode) {
        (node.uid, node.gid, node.mode) = (0, 0, 0o600);
    }
}

/// The kernel tells of a device, and the host's udevd has not spoken of it yet.
pub(super) fn appeared(executor: &mut Executor, registry: &mut Registry, device: Device, since: Instant) {
    if !registry.containers.values().any(Known::is_early) {
        return;
    }
    let devpath = device.identity.devpath.clone();
    // To all others it is there once udev has spoken.
    let before = registry.devices.insert(devpath.clone(), device.clone());
    let mut new = wanted(executor, registry, Known::is_early, |its| its.identity.devpath == devpath, |_| true);
    match before {
        Some(before) => drop(registry.devices.insert(devpath, before)),
        None => drop(registry.devices.remove(&devpath)),
    }
    new.iter_mut().for_each(|grant| leave_owner(&mut grant.node, &device));
    new.retain(|grant| !executor.ledger.of(&grant.holder.id).any(|entry| entry.grant.node.path == grant.node.path));
    carry_out(executor, registry, &new, &[], |_| false, Some(since));
}
