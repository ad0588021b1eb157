//! Desired minus observed, for everything or for what one event concerns.

use std::time::Instant;

use crate::agent::registry::{Known, Registry};
use crate::core::device::Device;
use crate::core::ledger::{Entry, Grant, Origin, Placement};
use crate::core::matcher;
use crate::core::plan::{Change, changes};
use crate::ops::Executor;
use crate::runtime;
use crate::sys::process::Process;
use crate::sys::udev;

/// Compares everything: at start, and when events were lost.
pub(super) fn everything(executor: &mut Executor, registry: &mut Registry) {
    match udev::scan() {
        Ok(devices) => registry.devices = devices.into_iter().map(|d| (d.identity.devpath.clone(), d)).collect(),
        Err(error) => tracing::error!("cannot list the devices of this host: {error}"),
    }
    for container in runtime::scan() {
        registry.learn(&executor.cgroups, container);
    }
    let mut desired: Vec<Grant> =
        registry.containers.values().flat_map(|known| wanted(known, registry.devices.values())).collect();
    let observed = executor.ledger.entries().to_vec();
    desired.extend(observed.iter().filter(|entry| manual_and_valid(entry)).map(|entry| entry.grant.clone()));
    carry_out(executor, &desired, &observed, is_unplugged, None);
    executor.agree_with_ledger();
    for entry in executor.ledger.entries() {
        registry.follow(&entry.grant.holder);
    }
}

/// A device is there: for the containers that ask for it.
pub(super) fn plugged(executor: &mut Executor, registry: &mut Registry, device: Device, since: Instant) {
    let devpath = device.identity.devpath.clone();
    let observed = entries(executor, |entry| entry.grant.device.identity.devpath == devpath);
    let mut desired: Vec<Grant> = registry.containers.values().flat_map(|known| wanted(known, [&device])).collect();
    // What a person attached stays, as long as it is this very device.
    let stays = |entry: &&Entry| {
        entry.grant.origin == Origin::Manual
            && entry.left_over.is_none()
            && entry.grant.device.identity == device.identity
    };
    desired.extend(observed.iter().filter(stays).map(|entry| entry.grant.clone()));
    carry_out(executor, &desired, &observed, is_unplugged, Some(since));
    registry.devices.insert(devpath, device);
}

/// A device is gone: from all containers.
pub(super) fn unplugged(executor: &mut Executor, registry: &mut Registry, devpath: &str, since: Instant) {
    let observed = entries(executor, |entry| entry.grant.device.identity.devpath == devpath);
    carry_out(executor, &[], &observed, |_| true, Some(since));
    registry.devices.remove(devpath);
}

/// A container's state appeared or changed. A runtime's update may have detached the mark: it is put back.
pub(super) fn container(executor: &mut Executor, registry: &mut Registry, directory: usize, id: &str, since: Instant) {
    let Some(container) = runtime::load(&runtime::STATE_DIRECTORIES[directory], id) else { return };
    let is_new = registry.learn(&executor.cgroups, container);
    let observed = entries(executor, |entry| entry.grant.holder.id == id);
    if let (false, Some(entry)) = (is_new, observed.first()) {
        if let Err(error) = executor.mark(&entry.grant.holder) {
            tracing::debug!("{}", error.chain());
        }
        return;
    }
    let Some(known) = registry.containers.get(id) else { return };
    let mut desired: Vec<Grant> = wanted(known, registry.devices.values());
    desired.extend(observed.iter().filter(|entry| manual_and_valid(entry)).map(|entry| entry.grant.clone()));
    carry_out(executor, &desired, &observed, is_unplugged, Some(since));
}

/// A container ended.
pub(super) fn ended(executor: &mut Executor, id: &str) {
    let observed = entries(executor, |entry| entry.grant.holder.id == id && has_ended(entry));
    carry_out(executor, &[], &observed, is_unplugged, None);
}

fn entries(executor: &Executor, test: impl Fn(&Entry) -> bool) -> Vec<Entry> {
    executor.ledger.entries().iter().filter(|entry| test(entry)).cloned().collect()
}

fn wanted<'a>(known: &Known, devices: impl IntoIterator<Item = &'a Device>) -> Vec<Grant> {
    known.holder.as_ref().map_or_else(Vec::new, |holder| matcher::desired(holder, &known.rules, devices))
}

fn has_ended(entry: &Entry) -> bool {
    Process::open_same(entry.grant.holder.pid, entry.grant.holder.start_time).is_none()
}

fn is_unplugged(entry: &Entry) -> bool {
    !udev::is_present(&entry.grant.device.identity)
}

/// What is left over was to go: nobody wants it back.
fn manual_and_valid(entry: &Entry) -> bool {
    entry.grant.origin == Origin::Manual && entry.left_over.is_none() && !has_ended(entry) && !is_unplugged(entry)
}

/// Each change by itself: one that fails is logged and does not stop the others.
fn carry_out(
    executor: &mut Executor,
    desired: &[Grant],
    observed: &[Entry],
    unplugged: impl Fn(&Entry) -> bool,
    since: Option<Instant>,
) {
    for change in changes(desired, observed, unplugged) {
        let result = executor.carry_out(&change);
        let micros = since.map(|since| since.elapsed().as_micros() as u64);
        let (what, grant) = match &change {
            Change::Add(grant) => ("granted", grant),
            Change::Remove { entry, .. } => ("revoked", &entry.grant),
        };
        let (container, device) = (grant.holder.label(), grant.device.number.to_string());
        match result {
            Ok(placement) => {
                let whose = if placement == Placement::Host { ", the host's own node" } else { "" };
                tracing::info!(container, device, micros, "{what} {}{whose}", grant.node.path);
            }
            Err(error) => tracing::error!(container, device, "{} not {what}: {}", grant.node.path, error.chain()),
        }
    }
}
