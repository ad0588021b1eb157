//! Desired minus observed, for everything or for what one event concerns.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Instant;

use crate::agent::early;
use crate::agent::registry::{Known, Later, Registry};
use crate::agent::users;
use crate::agent::withdrawals;
use crate::core::device::{Device, Kind, Number};
use crate::core::event::{Changed, Event, Plug};
use crate::core::facts::{Facts, usb_bus};
use crate::core::ledger::{Entry, Grant, Origin, Placement};
use crate::core::matcher;
use crate::core::mirror::Told;
use crate::core::plan::{Change, changes};
use crate::core::rule::Rule;
use crate::core::uevent::Uevent;
use crate::error::Error;
use crate::ops::Executor;
use crate::ops::mirror::Concern;
use crate::runtime::places::{Patterns, Place};
use crate::runtime::users::uids;
use crate::sys::process::is_gone;
use crate::sys::sysfs::KernelSysfs;
use crate::sys::{block, udev};

/// Compares everything: at start, and when events were lost.
pub(super) fn everything(executor: &mut Executor, registry: &mut Registry) {
    let started = Instant::now();
    let before = match udev::scan() {
        Ok(devices) => {
            let now = devices.into_iter().map(|device| (device.identity.devpath.clone(), device)).collect();
            std::mem::replace(&mut registry.devices, now)
        }
        Err(error) => {
            tracing::error!("cannot list the devices of this host: {error}");
            registry.devices.clone()
        }
    };
    for place in Patterns::of_host().places() {
        drop(registry.look_at(&executor.cgroups, place, None));
    }
    for uid in uids().into_iter().filter(|uid| registry.serves(*uid)).collect::<Vec<_>>() {
        drop(registry.look_at_user(&executor.cgroups, uid));
    }
    let asking = registry.containers.values().filter(|known| !known.rules.is_empty());
    asking.for_each(|known| early::prepare(executor, registry, known));
    let stays = |entry: &Entry| manual_and_valid(entry) || is_undecided(entry, registry);
    let mut desired = wanted(executor, registry, |_| true, |_| true, stays);
    if let Err(error) = executor.adopt(&desired) {
        tracing::error!("{}", error.chain());
    }
    executor.end_unknown();
    let observed = executor.ledger.entries().cloned().collect::<Vec<_>>();
    desired.extend(observed.iter().filter(|entry| stays(entry)).map(|entry| entry.grant.clone()));
    tell_of_plugs(registry, &before, &desired, &observed, started);
    withdrawals::settle(executor, registry, &desired, |_, _| true, None);
    drop(carry_out(executor, registry, &desired, &observed, goes_with_node, None));
    executor.follow_asking(|id| registry.asks(id));
    executor.mirror_all(|holder| registry.wish(holder));
    registry.containers.keys().for_each(|id| executor.settle_start(id));
    if !executor.ledger.lost().is_empty() {
        executor.sweep(&registry.snapshot());
    }
    executor.agree_with_ledger();
    for entry in executor.ledger.entries() {
        registry.follow(&executor.cgroups, &entry.grant.holder);
    }
}

/// Tells of the devices that came and went without being heard of.
fn tell_of_plugs(
    registry: &Registry,
    before: &BTreeMap<String, Device>,
    desired: &[Grant],
    observed: &[Entry],
    since: Instant,
) {
    if !registry.monitors.are_there() {
        return;
    }
    let is_in = |all: &BTreeMap<String, Device>, one: &Device| {
        all.get(&one.identity.devpath).is_some_and(|its| its.identity == one.identity)
    };
    // One that udevd has to initialize again is there all the same.
    let is_gone = |device: &&Device| !is_in(&registry.devices, device) && !udev::is_present(&device.identity);
    for gone in before.values().filter(is_gone) {
        tell_unplugged(registry, gone, observed, since);
    }
    for new in registry.devices.values().filter(|device| !is_in(before, device)) {
        tell_plugged(registry, new, desired, since);
    }
}

fn tell_plugged(registry: &Registry, device: &Device, desired: &[Grant], since: Instant) {
    let its = desired.iter().filter(|grant| grant.device.identity == device.identity);
    registry.monitors.tell(|| Event::Plugged(Plug::new(&device.node, device.number, its, micros(since))));
}

fn tell_unplugged(registry: &Registry, device: &Device, observed: &[Entry], since: Instant) {
    let its = observed.iter().map(|entry| &entry.grant).filter(|grant| grant.device.identity == device.identity);
    registry.monitors.tell(|| Event::Unplugged(Plug::new(&device.node, device.number, its, micros(since))));
}

/// A device is there: for the containers that ask for it.
pub(super) fn plugged(executor: &mut Executor, registry: &mut Registry, device: Device, told: &[Told], since: Instant) {
    let (devpath, number) = (device.identity.devpath.clone(), device.number);
    registry.retry(&executor.cgroups);
    let observed = entries(executor, |entry| entry.grant.device.identity.devpath == devpath);
    // What a person attached stays, as long as it is this very device.
    let stays = |entry: &Entry| {
        entry.grant.origin == Origin::Manual && entry.is_settled() && entry.grant.device.identity == device.identity
    };
    let before = registry.devices.insert(devpath.clone(), device.clone());
    let in_force = |entry: &Entry| entry.grant.device.identity.devpath != devpath || stays(entry);
    let mut desired = wanted(executor, registry, |_| true, |its| its.identity.devpath == devpath, in_force);
    // Of what is gone, what came at once in its place is heard of alone.
    let other = before.as_ref().filter(|before| before.identity != device.identity);
    other.iter().for_each(|before| tell_unplugged(registry, before, &observed, since));
    if before.is_none() || other.is_some() {
        tell_plugged(registry, &device, &desired, since);
    }
    desired.extend(observed.iter().filter(|entry| stays(entry)).map(|entry| entry.grant.clone()));
    carry_out(executor, registry, &desired, &observed, goes_with_node, Some(since));
    let all = observed.iter().map(|entry| &entry.grant).chain(&desired).map(concern).collect::<Vec<_>>();
    executor.mirror(&all, told, |holder| registry.wish(holder));
    withdrawals::settle(executor, registry, &desired, |_, its| its == number, None);
    let has_gone = |entry: &Entry| !desired.iter().any(|grant| grant.is_same(&entry.grant));
    let gone: Vec<Entry> = observed.into_iter().filter(has_gone).collect();
    freed(executor, registry, &gone);
    look_around(registry, &devpath, since);
}

/// A device is gone: from all containers.
pub(super) fn unplugged(executor: &mut Executor, registry: &mut Registry, event: &Uevent, since: Instant) {
    let devpath = &event.devpath;
    let observed = entries(executor, |entry| entry.grant.device.identity.devpath == *devpath);
    if let Some(device) = registry.devices.get(devpath) {
        tell_unplugged(registry, device, &observed, since);
    }
    // The first withdrawal loads a program, which takes as long as a hundred removals: they go first.
    let (from_start, others): (Vec<_>, Vec<_>) = observed.into_iter().partition(|entry| entry.grant.at_start);
    let mut concerns = carry_out(executor, registry, &[], &others, |_| true, Some(since));
    withdrawals::settle(executor, registry, &[], |_, its| its == event.number, Some(event.number));
    concerns.extend(carry_out(executor, registry, &[], &from_start, |_| true, Some(since)));
    executor.mirror(&concerns, &[], |holder| registry.wish(holder));
    registry.devices.remove(devpath);
    let waiting = registry.waiting.borrow().clone();
    let gone = from_start.iter().chain(&others).map(|entry| &entry.grant.holder.id);
    registry.later.ids.extend(gone.filter(|id| waiting.contains(*id)).cloned());
    look_around(registry, devpath, since);
}

/// Containers whose rules look at other devices, too, are looked at again: at what is on the same USB bus, since no rule
/// looks further.
fn look_around(registry: &mut Registry, devpath: &str, since: Instant) {
    registry.later.since.get_or_insert(since);
    if let Some(bus) = usb_bus(devpath)
        && !registry.later.buses.contains(bus)
        && registry.containers.values().any(Known::looks_around)
    {
        registry.later.buses.insert(bus.to_owned());
    }
}

/// What events have left to be looked at again, once for all of them.
pub(super) fn catch_up(executor: &mut Executor, registry: &mut Registry) {
    let Later { ids, buses, since } = std::mem::take(&mut registry.later);
    let since = since.unwrap_or_else(Instant::now);
    all_of(executor, registry, &ids, "", since);
    if !buses.is_empty() {
        let looking = registry.containers.iter().filter(|(_, known)| known.looks_around());
        let looking: BTreeSet<String> = looking.map(|(id, _)| id.clone()).collect();
        buses.iter().for_each(|bus| all_of(executor, registry, &looking, bus, since));
    }
}

/// What is at a container's place appeared or changed, or was `starting` since then when it was last looked at.
pub(super) fn container(
    executor: &mut Executor,
    registry: &mut Registry,
    place: Place,
    starting: Option<Instant>,
    since: Instant,
) {
    let Some((id, is_new)) = registry.look_at(&executor.cgroups, place, starting) else { return };
    if !is_new && executor.ledger.of(&id).next().is_some() {
        return mark_again(executor, &id);
    }
    arrived(executor, registry, &BTreeSet::from([id]), since);
}

/// Containers that were not known before: what they ask for, and what they are shown.
pub(super) fn arrived(executor: &mut Executor, registry: &mut Registry, ids: &BTreeSet<String>, since: Instant) {
    let asking = ids.iter().filter_map(|id| registry.containers.get(id)).filter(|known| !known.rules.is_empty());
    asking.for_each(|known| early::prepare(executor, registry, known));
    all_of(executor, registry, ids, "", since);
}

/// Compares all that the containers with these ids have or should have of the devices whose `DEVPATH` begins so.
pub(super) fn all_of(
    executor: &mut Executor,
    registry: &mut Registry,
    ids: &BTreeSet<String>,
    place: &str,
    since: Instant,
) {
    if !ids.iter().any(|id| registry.containers.contains_key(id)) {
        return;
    }
    if place.is_empty() {
        registry.waiting.borrow_mut().retain(|id| !ids.contains(id));
    }
    let is_there = |devpath: &str| devpath.starts_with(place);
    let is_one = |entry: &Entry| ids.contains(&entry.grant.holder.id) && is_there(&entry.grant.device.identity.devpath);
    let observed = entries(executor, is_one);
    let stays = |entry: &Entry| manual_and_valid(entry) || is_undecided(entry, registry);
    let in_force = |entry: &Entry| !is_one(entry) || stays(entry);
    let on = |device: &Device| is_there(&device.identity.devpath);
    let mut desired = wanted(executor, registry, |known| ids.contains(&known.container.id), on, in_force);
    desired.extend(observed.iter().filter(|entry| stays(entry)).map(|entry| entry.grant.clone()));
    let of_devices = registry.devices.values().filter(|device| on(device)).map(|device| device.number);
    let numbers: HashSet<Number> = of_devices.chain(observed.iter().map(|entry| entry.grant.device.number)).collect();
    let is_its =
        |known: &Known, number| ids.contains(&known.container.id) && (place.is_empty() || numbers.contains(&number));
    withdrawals::settle(executor, registry, &desired, is_its, None);
    let concerns = carry_out(executor, registry, &desired, &observed, goes_with_node, Some(since));
    executor.mirror(&concerns, &[], |holder| registry.wish(holder));
    if place.is_empty() {
        ids.iter().for_each(|id| executor.settle_start(id));
    }
}

/// A runtime's update may have detached the mark of a container with grants: it is put back.
pub(super) fn mark_again(executor: &mut Executor, id: &str) {
    let Some(entry) = executor.ledger.of(id).next() else { return };
    let holder = entry.grant.holder.clone();
    if let Err(error) = executor.mark(&holder) {
        tracing::debug!("{}", error.chain());
    }
}

/// A container ended.
pub(super) fn ended(executor: &mut Executor, registry: &mut Registry, id: &str) {
    let observed: Vec<Entry> = executor.ledger.of(id).filter(|entry| has_ended(entry)).cloned().collect();
    observed.iter().for_each(|entry| registry.unfollow(&entry.grant.holder));
    carry_out(executor, registry, &[], &observed, is_unplugged, None);
    executor.unmirror_ended(id);
    executor.restore_ended();
    freed(executor, registry, &observed);
}

/// These grants are gone, and their devices are not: others may have waited for the devices or for the paths.
pub(super) fn freed(executor: &mut Executor, registry: &mut Registry, gone: &[Entry]) {
    let is_wanted_alone = || registry.containers.values().any(|known| known.rules.iter().any(Rule::is_exclusive));
    if gone.iter().any(|entry| entry.grant.exclusive) || !gone.is_empty() && is_wanted_alone() {
        let devices: BTreeSet<&String> = gone.iter().map(|entry| &entry.grant.device.identity.devpath).collect();
        let devices: Vec<Device> = devices.iter().filter_map(|path| registry.devices.get(*path)).cloned().collect();
        devices.into_iter().for_each(|device| plugged(executor, registry, device, &[], Instant::now()));
    }
    let waiting = registry.waiting.borrow().clone();
    let ids = gone.iter().map(|entry| &entry.grant.holder.id).filter(|id| waiting.contains(*id));
    registry.later.ids.extend(ids.cloned());
}

fn entries(executor: &Executor, test: impl Fn(&Entry) -> bool) -> Vec<Entry> {
    executor.ledger.entries().filter(|entry| test(entry)).cloned().collect()
}

/// What the containers that pass the test should have of the devices that do. A block device that the host uses is left
/// out, unless the container has it already: then it is the one that uses it. So is what only one can have and another
/// one has, first of all those whose entries in the ledger are `in_force`; that is logged.
pub(super) fn wanted(
    executor: &Executor,
    registry: &Registry,
    of: impl Fn(&Known) -> bool,
    on: impl Fn(&Device) -> bool,
    in_force: impl Fn(&Entry) -> bool,
) -> Vec<Grant> {
    let (sysfs, mut grants) = (KernelSysfs::default(), Vec::new());
    let containers: Vec<&Known> =
        registry.containers.values().filter(|known| known.holder.is_some() && of(known)).collect();
    for device in registry.devices.values().filter(|device| on(device)) {
        let facts = Facts::new(device, &sysfs);
        containers.iter().for_each(|known| known.desired(executor.host, &facts, &mut grants, &registry.said));
    }
    // The udevd of a container has given a node that is there its owner and mode.
    for grant in grants.iter_mut().filter(|grant| executor.has_udevd(&grant.holder)) {
        let mut same = executor.ledger.of(&grant.holder.id).filter(|entry| entry.grant.is_same(grant));
        if let Some(Entry { grant: Grant { node, .. }, .. }) = same.next() {
            (grant.node.uid, grant.node.gid, grant.node.mode) = (node.uid, node.gid, node.mode);
        }
    }
    // Of a ledger that may be long, what has to do with these.
    let place = |grant: &Grant| {
        let (cgroup, id) = grant.holder.whose();
        (cgroup, id.to_owned(), grant.node.path.clone())
    };
    let places: HashSet<_> = grants.iter().map(place).collect();
    let devices: HashSet<_> = grants.iter().map(|grant| grant.device.identity.clone()).collect();
    let is_near = |grant: &Grant| devices.contains(&grant.device.identity) || places.contains(&place(grant));
    let valid = executor.ledger.entries().filter(|entry| entry.left_over.is_none());
    let near: HashMap<_, &Entry> =
        valid.filter(|entry| is_near(&entry.grant)).map(|entry| (place(&entry.grant), entry)).collect();
    let has = |grant: &Grant| near.get(&place(grant)).is_some_and(|entry| entry.grant.is_same(grant));
    grants.retain(|grant| {
        let number = grant.device.number;
        let has_it_from_start = grant.at_start && !executor.is_withdrawn(&grant.holder, number);
        if number.kind == Kind::Char || has_it_from_start || has(grant) {
            return true;
        }
        let reason = block::in_use(&grant.device.node, number);
        if let Some(reason) = &reason {
            let container = grant.holder.label();
            tracing::debug!(container, "{} not granted: {reason}", grant.device.node);
        }
        reason.is_none()
    });
    // A device that is gone stands in nobody's way, though its event may still be to come.
    let counts = |entry: &&&Entry| in_force(entry) && !is_unplugged(entry);
    let in_force: Vec<Grant> = near.values().filter(counts).map(|entry| entry.grant.clone()).collect();
    let (kept, lost) = matcher::settle(grants, &in_force, has);
    registry.waiting.borrow_mut().extend(lost.iter().map(|lost| lost.grant.holder.id.clone()));
    for (grant, reason) in lost.iter().filter_map(|lost| Some((&lost.grant, lost.reason()?))) {
        let text = format!("{} not granted at {}: {reason}", grant.device.node, grant.node.path);
        registry.said.once(&grant.holder.id, grant.holder.label(), text);
    }
    users::bounded(executor, registry, kept, has)
}

fn has_ended(entry: &Entry) -> bool {
    is_gone(entry.grant.holder.pid, entry.grant.holder.start_time)
}

fn is_unplugged(entry: &Entry) -> bool {
    !udev::is_present(&entry.grant.device.identity)
}

/// What a rule no longer asks for goes with the node that the container has from its start.
fn goes_with_node(entry: &Entry) -> bool {
    entry.grant.at_start || is_unplugged(entry)
}

/// What is left over was to go, and whoever attached what is half done was told of no success: nobody wants it back.
fn manual_and_valid(entry: &Entry) -> bool {
    entry.grant.origin == Origin::Manual && entry.is_settled() && !has_ended(entry) && !is_unplugged(entry)
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
        && known.is_some_and(|known| {
            // One that asks for nothing was not looked at, and that is decided.
            known.holder.is_none() && !known.rules.is_empty() || !registry.devices.contains_key(devpath)
        })
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

fn concern(grant: &Grant) -> Concern {
    (grant.holder.clone(), grant.device.clone())
}

/// Each change by itself: one that fails is logged and does not stop the others. Returns whom and what they concern.
pub(super) fn carry_out(
    executor: &mut Executor,
    registry: &mut Registry,
    desired: &[Grant],
    observed: &[Entry],
    unplugged: impl Fn(&Entry) -> bool,
    since: Option<Instant>,
) -> Vec<Concern> {
    let changes = changes(desired, observed, unplugged);
    for change in &changes {
        let result = executor.carry_out(change);
        let micros = since.map(micros);
        let (what, grant) = match change {
            Change::Add(grant) => ("granted", grant),
            Change::Remove { entry, .. } => ("revoked", &entry.grant),
        };
        let (container, device) = (grant.holder.label(), grant.device.number.to_string());
        match result {
            Ok(placement) => {
                match change {
                    Change::Add(grant) => {
                        registry.follow(&executor.cgroups, &grant.holder);
                        micros.iter().for_each(|micros| registry.figures.borrow_mut().granted(*micros));
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
            // Its end is on its way.
            Err(Error::ContainerExited(_)) => tracing::debug!(container, device, "{} not {what}", grant.node.path),
            Err(error) => tracing::error!(container, device, "{} not {what}: {}", grant.node.path, error.chain()),
        }
    }
    changes.iter().map(|change| concern(change.grant())).collect()
}
