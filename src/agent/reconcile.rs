//! Desired minus observed, for everything or for what one event concerns.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::agent::registry::{Known, Registry};
use crate::core::device::{Device, Kind, Number};
use crate::core::event::{Changed, Event};
use crate::core::ledger::{Entry, Grant, Granted, Holder, Origin, Placement, Withdrawal};
use crate::core::matcher;
use crate::core::plan::{Change, changes};
use crate::core::uevent::Uevent;
use crate::core::withdrawal::{self, Presence};
use crate::ops::Executor;
use crate::runtime;
use crate::sys::process::is_gone;
use crate::sys::{block, udev};

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
        registry.containers.values().flat_map(|known| wanted(executor, known, registry.devices.values())).collect();
    let observed = executor.ledger.entries().to_vec();
    let stays = |entry: &&Entry| manual_and_valid(entry) || is_undecided(entry, registry);
    desired.extend(observed.iter().filter(stays).map(|entry| entry.grant.clone()));
    settle_withdrawals(executor, registry, |_, _| true, None);
    carry_out(executor, registry, &desired, &observed, is_unplugged, None);
    executor.agree_with_ledger();
    for entry in executor.ledger.entries() {
        registry.follow(&executor.cgroups, &entry.grant.holder);
    }
}

/// A device is there: for the containers that ask for it.
pub(super) fn plugged(executor: &mut Executor, registry: &mut Registry, device: Device, since: Instant) {
    let devpath = device.identity.devpath.clone();
    registry.retry(&executor.cgroups);
    let observed = entries(executor, |entry| entry.grant.device.identity.devpath == devpath);
    let mut desired: Vec<Grant> =
        registry.containers.values().flat_map(|known| wanted(executor, known, [&device])).collect();
    desired.retain(|grant| match other_device_at(executor, grant) {
        None => true,
        Some(other) => {
            let (container, path) = (grant.holder.label(), &grant.node.path);
            tracing::warn!(container, "{path} not granted: {} is attached there: detach it first", other.node);
            false
        }
    });
    // What a person attached stays, as long as it is this very device.
    let stays = |entry: &&Entry| {
        entry.grant.origin == Origin::Manual
            && entry.left_over.is_none()
            && entry.grant.device.identity == device.identity
    };
    desired.extend(observed.iter().filter(stays).map(|entry| entry.grant.clone()));
    carry_out(executor, registry, &desired, &observed, is_unplugged, Some(since));
    let number = device.number;
    registry.devices.insert(devpath, device);
    settle_withdrawals(executor, registry, |_, its| its == number, None);
}

/// A device is gone: from all containers.
pub(super) fn unplugged(executor: &mut Executor, registry: &mut Registry, event: &Uevent, since: Instant) {
    let devpath = &event.devpath;
    let observed = entries(executor, |entry| entry.grant.device.identity.devpath == *devpath);
    // The first withdrawal loads a program, which takes as long as a hundred removals: they go first.
    let (from_start, others): (Vec<_>, Vec<_>) = observed.into_iter().partition(|entry| entry.grant.at_start);
    carry_out(executor, registry, &[], &others, |_| true, Some(since));
    settle_withdrawals(executor, registry, |_, its| its == event.number, Some(event.number));
    carry_out(executor, registry, &[], &from_start, |_| true, Some(since));
    registry.devices.remove(devpath);
}

/// A container's state appeared or changed.
pub(super) fn container(executor: &mut Executor, registry: &mut Registry, directory: usize, id: &str, since: Instant) {
    let Some(container) = runtime::load(&runtime::STATE_DIRECTORIES[directory], id) else { return };
    let is_new = registry.learn(&executor.cgroups, container);
    let observed = entries(executor, |entry| entry.grant.holder.id == id);
    if !is_new && !observed.is_empty() {
        return mark_again(executor, id);
    }
    let Some(known) = registry.containers.get(id) else { return };
    let mut desired: Vec<Grant> = wanted(executor, known, registry.devices.values());
    desired.extend(observed.iter().filter(|entry| manual_and_valid(entry)).map(|entry| entry.grant.clone()));
    settle_withdrawals(executor, registry, |known, _| known.container.id == id, None);
    carry_out(executor, registry, &desired, &observed, is_unplugged, Some(since));
}

/// A runtime's update may have detached the mark of a container with grants: it is put back.
pub(super) fn mark_again(executor: &mut Executor, id: &str) {
    let Some(entry) = executor.ledger.entries().iter().find(|entry| entry.grant.holder.id == id) else { return };
    let holder = entry.grant.holder.clone();
    if let Err(error) = executor.mark(&holder) {
        tracing::debug!("{}", error.chain());
    }
}

/// A container ended.
pub(super) fn ended(executor: &mut Executor, registry: &mut Registry, id: &str) {
    let observed = entries(executor, |entry| entry.grant.holder.id == id && has_ended(entry));
    observed.iter().for_each(|entry| registry.unfollow(&entry.grant.holder));
    carry_out(executor, registry, &[], &observed, is_unplugged, None);
    executor.restore_ended();
}

/// Withdraws what runtimes granted at a container's start where that is due, and lets it hold again where not: for the
/// containers and numbers that pass the test. `gone` is a number whose device was just unplugged.
fn settle_withdrawals(
    executor: &mut Executor,
    registry: &Registry,
    test: impl Fn(&Known, Number) -> bool,
    gone: Option<Number>,
) {
    executor.restore_ended();
    for known in registry.containers.values() {
        let (Some(holder), container) = (&known.holder, &known.container) else { continue };
        let numbers: BTreeSet<Number> = container.devices.iter().map(|(number, _)| *number).collect();
        for number in numbers.into_iter().filter(|number| test(known, *number)) {
            let paths = container.devices.iter().filter(|(its, _)| *its == number).map(|(_, path)| path.as_str());
            let paths: Vec<&str> = paths.collect();
            let presence = || match registry.devices.values().find(|device| device.number == number) {
                _ if gone == Some(number) => Presence::Gone,
                // Another one than was granted, perhaps; the host's own use of it comes first.
                Some(device) if !has_grant(executor, holder, number) && is_used_by_host(device) => Presence::Unclear,
                Some(device) => Presence::Here(device),
                None if paths.iter().any(|path| udev::has_number(number, path)) => Presence::Unclear,
                None => Presence::Gone,
            };
            let is_withdrawn = executor.is_withdrawn(holder, number);
            let is_granted = has_grant(executor, holder, number);
            let due = withdrawal::is_due(&known.rules, number, &paths, is_withdrawn || is_granted, presence);
            let result = match (due, is_withdrawn) {
                // Also what is withdrawn already: the act may have failed.
                (Some(true), _) => executor.withdraw(holder, number).map(|()| {
                    if !is_withdrawn && !is_granted {
                        paths.iter().for_each(|path| executor.remove_stale_node(holder, number, path));
                    }
                }),
                (Some(false), true) => executor.restore(&Withdrawal { holder: holder.clone(), number }),
                _ => Ok(()),
            };
            if let Err(error) = result {
                tracing::error!(container = holder.label(), device = %number, "{}", error.chain());
            }
        }
    }
}

/// Whether the ledger holds a rule's grant of that number, which the container has from its start.
fn has_grant(executor: &Executor, holder: &Holder, number: Number) -> bool {
    executor.ledger.entries().iter().map(|entry| &entry.grant).any(|grant| {
        grant.at_start
            && grant.origin != Origin::Manual
            && grant.device.number == number
            && grant.holder.is_same_run(holder)
    })
}

fn is_used_by_host(device: &Device) -> bool {
    device.number.kind == Kind::Block && block::in_use(&device.node, device.number).is_some()
}

/// Another device that is plugged in and has the grant's path in its container already.
fn other_device_at<'a>(executor: &'a Executor, grant: &Grant) -> Option<&'a Granted> {
    let is_other = |entry: &&Entry| {
        entry.grant.holder.is_same_run(&grant.holder)
            && entry.grant.node.path == grant.node.path
            && entry.grant.device.identity.devpath != grant.device.identity.devpath
            && entry.left_over.is_none()
            && !is_unplugged(entry)
    };
    executor.ledger.entries().iter().find(is_other).map(|entry| &entry.grant.device)
}

fn entries(executor: &Executor, test: impl Fn(&Entry) -> bool) -> Vec<Entry> {
    executor.ledger.entries().iter().filter(|entry| test(entry)).cloned().collect()
}

/// What a container should have of these devices. A block device that the host uses is left out, unless the container
/// has it already: then it is the one that uses it.
fn wanted<'a>(executor: &Executor, known: &Known, devices: impl IntoIterator<Item = &'a Device>) -> Vec<Grant> {
    let Some(holder) = &known.holder else { return Vec::new() };
    let mut grants = matcher::desired(holder, &known.container.devices, &known.rules, devices);
    grants.retain(|grant| {
        let number = grant.device.number;
        let has_it = || executor.ledger.entries().iter().any(|entry| entry.grant.is_same(grant));
        let has_it_from_start = grant.at_start && !executor.is_withdrawn(holder, number);
        if number.kind == Kind::Char || has_it_from_start || has_it() {
            return true;
        }
        let reason = block::in_use(&grant.device.node, number);
        if let Some(reason) = &reason {
            tracing::debug!(container = holder.label(), "{} not granted: {reason}", grant.device.node);
        }
        reason.is_none()
    });
    grants
}

fn has_ended(entry: &Entry) -> bool {
    is_gone(entry.grant.holder.pid, entry.grant.holder.start_time)
}

fn is_unplugged(entry: &Entry) -> bool {
    !udev::is_present(&entry.grant.device.identity)
}

/// What is left over was to go: nobody wants it back.
fn manual_and_valid(entry: &Entry) -> bool {
    entry.grant.origin == Origin::Manual && entry.left_over.is_none() && !has_ended(entry) && !is_unplugged(entry)
}

/// A rule's grant that a failed look must not take away: its container could not be worked on just now, or udev has not
/// spoken on its device (yet, or any more).
fn is_undecided(entry: &Entry, registry: &Registry) -> bool {
    let devpath = &entry.grant.device.identity.devpath;
    let known = registry.containers.get(&entry.grant.holder.id);
    entry.grant.origin != Origin::Manual
        && entry.left_over.is_none()
        && !has_ended(entry)
        && !is_unplugged(entry)
        && known.is_some_and(|known| known.holder.is_none() || !registry.devices.contains_key(devpath))
}

/// Each change by itself: one that fails is logged and does not stop the others.
fn carry_out(
    executor: &mut Executor,
    registry: &mut Registry,
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
                match &change {
                    Change::Add(grant) => {
                        registry.follow(&executor.cgroups, &grant.holder);
                        registry.monitors.tell(|| {
                            let (grant, placement) = (grant.clone(), placement.clone());
                            Event::Granted(Changed::new(&Entry { grant, placement, left_over: None }, micros))
                        });
                    }
                    Change::Remove { entry, .. } => {
                        registry.monitors.tell(|| Event::Revoked(Changed::new(entry, micros)))
                    }
                }
                let whose = if placement == Placement::Host { ", the host's own node" } else { "" };
                tracing::info!(container, device, micros, "{what} {}{whose}", grant.node.path);
            }
            Err(error) => tracing::error!(container, device, "{} not {what}: {}", grant.node.path, error.chain()),
        }
    }
}
