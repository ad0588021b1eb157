//! Refused opens of the containers that ask for something: which are reported, and what is made of the reports.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::agent::registry::{Known, Registry};
use crate::core::event::{Event, Refused};
use crate::core::facts::Facts;
use crate::core::naming::suggestion;
use crate::core::refusal::{Refusal, Repeats};
use crate::core::text::printable;
use crate::error::Error;
use crate::ops::Executor;
use crate::sys::ring::Ring;
use crate::sys::sysfs::KernelSysfs;

/// What is watched, and what was told.
#[derive(Debug)]
pub(super) struct Refusals {
    ring: Option<Ring>,
    /// Ids of the containers by their cgroups, as the kernel has them.
    watched: BTreeMap<u64, String>,
    repeats: Repeats,
    start: Instant,
}

impl Refusals {
    pub(super) fn new() -> Refusals {
        Refusals { ring: None, watched: BTreeMap::new(), repeats: Repeats::default(), start: Instant::now() }
    }

    /// After everything was compared: the filter may be another one than before.
    pub(super) fn renew(&mut self, executor: &mut Executor, registry: &Registry) {
        self.take(registry);
        if let Err(error) = self.subscribe(executor, registry) {
            tracing::error!("refusals are not told: {}", error.chain());
        }
        self.follow(executor, registry);
    }

    fn subscribe(&mut self, executor: &mut Executor, registry: &Registry) -> Result<(), Error> {
        let failed = |error| Error::host::<std::io::Error>("read or change the device filter's maps")(error);
        let filter = executor.filter()?;
        // What an agent left that was killed is among these, under no id.
        self.watched = filter.watched().map_err(failed)?.into_iter().map(|cgroup| (cgroup, String::new())).collect();
        if self.ring.as_ref().is_some_and(|ring| filter.reports_to(ring)) {
            return Ok(());
        }
        // Closed before the next one, so that the thread waits for one only.
        self.ring = None;
        let mut ring = filter.refusals().map_err(failed)?;
        registry.watched.watch_refusals(&ring).map_err(failed)?;
        // Nobody knows when these were.
        ring.take();
        self.ring = Some(ring);
        Ok(())
    }

    /// Watches the containers that run and ask for something, and no others.
    pub(super) fn follow(&mut self, executor: &mut Executor, registry: &Registry) {
        let asking = registry.containers.values().filter(|known| !known.rules.is_empty());
        let cgroup =
            |known: &'_ Known| known.holder.as_ref().filter(|holder| holder.has_filter()).map(|it| it.cgroup_id);
        let desired: BTreeMap<u64, &str> =
            asking.filter_map(|known| Some((cgroup(known)?, known.container.id.as_str()))).collect();
        let is_same =
            |(desired, watched): ((&u64, &&str), (&u64, &String))| desired == (watched.0, &watched.1.as_str());
        if desired.len() == self.watched.len() && desired.iter().zip(&self.watched).all(is_same) {
            return;
        }
        let filter = match executor.filter() {
            Ok(filter) => filter,
            Err(error) => return tracing::error!("refusals are not told: {}", error.chain()),
        };
        let repeats = &mut self.repeats;
        self.watched.retain(|cgroup, _| {
            let stays = desired.contains_key(cgroup);
            if !stays {
                repeats.forget(*cgroup);
                if let Err(error) = filter.unwatch(*cgroup) {
                    tracing::debug!("cgroup {cgroup} is still watched: {error}");
                }
            }
            stays
        });
        for (cgroup, id) in desired {
            let is_watched = self.watched.contains_key(&cgroup);
            match if is_watched { Ok(()) } else { filter.watch(cgroup) } {
                Ok(()) => drop(self.watched.insert(cgroup, id.to_owned())),
                Err(error) => tracing::debug!("refusals of container {id} are not told: {error}"),
            }
        }
    }

    /// Tells what was reported.
    pub(super) fn take(&mut self, registry: &Registry) {
        let reports = self.ring.as_mut().map(Ring::take).unwrap_or_default();
        for report in reports {
            self.tell(registry, report);
        }
    }

    fn tell(&mut self, registry: &Registry, report: Refusal) {
        let known = self.watched.get(&report.cgroup).and_then(|id| registry.containers.get(id));
        // It ended meanwhile.
        let Some(known) = known else { return };
        let Refusal { cgroup, number, access } = report;
        let untold = self.repeats.tell(cgroup, number, self.start.elapsed().as_millis() as u64);
        if untold.is_none() && !registry.monitors.are_there() {
            return;
        }
        let device = registry.devices.values().find(|device| device.number == number);
        // What it asks for already and still is refused (the host uses it, it is being plugged in) needs no annotation.
        let sysfs = KernelSysfs::default();
        let facts = device.map(|device| Facts::new(device, &sysfs));
        // Nor would one help where a policy is against it.
        let may_have = |facts: &Facts<'_>| known.refusal(facts).is_none();
        let is_asked_for = |facts: &Facts<'_>| known.rules.iter().any(|rule| rule.matches(facts).is_some());
        let unasked = facts.filter(|facts| !is_asked_for(facts) && may_have(facts));
        let event = Event::Refused(Refused {
            container: known.container.label().to_owned(),
            id: known.container.id.clone(),
            kind: number.kind,
            major: number.major,
            minor: number.minor,
            device: device.map(|device| device.node.clone()),
            access,
            annotation: unasked.and_then(|facts| suggestion(&facts, registry.categories())),
        });
        if let Some(untold) = untold {
            let before = if untold > 0 { format!("; {untold} others before were not logged") } else { String::new() };
            let (container, device, text) =
                (known.container.label(), number.to_string(), printable(&event.to_string()));
            tracing::info!(container, device, "{text}{before}");
        }
        registry.monitors.tell(|| event);
    }

    /// Has nothing reported any more: without an agent there is nobody to tell.
    pub(super) fn stop(self, executor: &mut Executor) {
        let Ok(filter) = executor.filter() else { return };
        for cgroup in self.watched.into_keys() {
            if let Err(error) = filter.unwatch(cgroup) {
                tracing::debug!("cgroup {cgroup} is still watched: {error}");
            }
        }
    }
}
