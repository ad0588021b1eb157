//! What the agent's loop answers callers.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use crate::agent::api::Call;
use crate::agent::registry::Registry;
use crate::agent::{events_from, operators, reconcile};
use crate::core::container::Reference;
use crate::core::event::{Changed, Event};
use crate::core::info::StatusInfo;
use crate::core::ledger::Entry;
use crate::core::protocol::{Grants, Monitor, OneGrant, Reply, Request};
use crate::error::{Error, Result};
use crate::ops::live::lookup;
use crate::ops::{Executor, request};
use crate::runtime;
use crate::sys::namespace;

/// How soon everything is looked for again, for a caller who names what is not there.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Carries out what a caller asks for, looks for containers anew where one is not known, and tells of what changed by it.
pub(super) fn answer(executor: &mut Executor, registry: &mut Registry, call: &Call) -> Reply {
    let request = &call.request;
    let is_detach = matches!(request, Request::Detach(_));
    let is_change = is_detach || matches!(request, Request::Attach(_));
    let needs_before = is_detach || is_change && registry.monitors.are_there();
    let all = |executor: &Executor| -> HashSet<Entry> { executor.ledger.entries().cloned().collect() };
    let _stay = namespace::stay();
    let (start, mut before) = (Instant::now(), needs_before.then(|| all(executor)));
    let mut result = carry_out(executor, registry, call);
    // Others than root cannot have everything looked for as often as they ask.
    let may_look = call.peer.uid == 0 || registry.looked.elapsed() > LOOK_AGAIN;
    if matches!(result, Err(Error::NoSuchContainer(_))) && may_look {
        registry.looked = Instant::now();
        // It may have started a moment ago, or its name may have been out of sight.
        let mut new = BTreeSet::new();
        for container in runtime::scan() {
            let id = container.id.clone();
            if registry.learn(&executor.cgroups, container) {
                new.insert(id);
            }
        }
        reconcile::arrived(executor, registry, &new, Instant::now());
        // What came of that was told.
        before = before.map(|_| all(executor));
        result = carry_out(executor, registry, call);
    }
    registry.keep(&executor.cgroups, executor.persisted.all());
    if is_detach {
        executor.follow_asking(|id| registry.asks(id));
    }
    if matches!(request, Request::Attach(_)) {
        executor.ledger.entries().for_each(|entry| registry.follow(&executor.cgroups, &entry.grant.holder));
    }
    if let Some(before) = before {
        let (micros, after) = (Some(start.elapsed().as_micros() as u64), all(executor));
        let gone: Vec<Entry> = before.difference(&after).cloned().collect();
        gone.iter().for_each(|entry| registry.monitors.tell(|| Event::Revoked(Changed::new(entry, micros))));
        after
            .difference(&before)
            .for_each(|entry| registry.monitors.tell(|| Event::Granted(Changed::new(entry, micros))));
        if is_detach {
            reconcile::freed(executor, registry, &gone);
            reconcile::catch_up(executor, registry);
        }
    }
    result.unwrap_or_else(|error| {
        if call.peer.uid == 0 {
            tracing::info!("refused: {}", error.chain());
        }
        Reply::bad(error.exit_code(), &error.chain())
    })
}

fn carry_out(executor: &mut Executor, registry: &Registry, call: &Call) -> Result<Reply> {
    let containers = registry.snapshot();
    if !operators::may(executor, registry, &containers, call)? {
        return Ok(Reply::denied());
    }
    match &call.request {
        Request::Attach(attach) => {
            request::attach(executor, &containers, attach).map(|grant| Reply::good(OneGrant { grant }))
        }
        Request::Detach(detach) => {
            request::detach(executor, &containers, detach, true).map(|grants| Reply::good(Grants { grants }))
        }
        Request::List(list) => {
            let grants = request::list(executor.ledger.entries(), &executor.persisted, &containers, list)?;
            Ok(Reply::good(Grants { grants }))
        }
        Request::Status(_) => {
            let grants = executor.ledger.count();
            let status = request::status(&executor.cgroups, containers.len(), grants, Some(events_from()))?;
            let figures = registry.figures.borrow();
            let of_container = by_container(executor);
            Ok(Reply::good(StatusInfo {
                configuration: registry.problems.clone(),
                uptime: Some(registry.since.elapsed().as_secs()),
                seen: figures.seen,
                lost: figures.lost,
                compared: figures.compared,
                latency: figures.latency(),
                of_container,
                ..status
            }))
        }
        Request::Monitor(Monitor { container: None }) => Ok(Reply::good(Event::Ready { container: None, id: None })),
        Request::Monitor(Monitor { container: Some(name) }) => {
            let container = lookup(&containers, &Reference::parse(name).map_err(Error::Usage)?)?;
            let (name, id) = (container.label().to_owned(), container.id);
            Ok(Reply::good(Event::Ready { container: Some(name), id: Some(id) }))
        }
        // The loop does that itself, or the socket's thread.
        _ => Ok(Reply::bad(1, "that is answered elsewhere")),
    }
}

/// How many grants each container has: by its name, or by its id where another one has that name.
fn by_container(executor: &Executor) -> BTreeMap<String, usize> {
    let mut by_id: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for Entry { grant, .. } in executor.ledger.entries() {
        *by_id.entry((grant.holder.label(), &grant.holder.id)).or_default() += 1;
    }
    let mut of_name: BTreeMap<&str, usize> = BTreeMap::new();
    by_id.keys().for_each(|(name, _)| *of_name.entry(name).or_default() += 1);
    let is_alone = |name: &str| of_name[name] == 1;
    by_id.iter().map(|((name, id), count)| (if is_alone(name) { *name } else { *id }.to_owned(), *count)).collect()
}
