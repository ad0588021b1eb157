//! What people ask for, done on the ledger and the kernel: the same with and without an agent.

use std::cell::LazyCell;
use std::collections::BTreeMap;

use crate::core::attachment::{Attached, Attachment};
use crate::core::container::{Container, Reference};
use crate::core::info::{GrantInfo, StatusInfo, right};
use crate::core::ledger::{Entry, Origin};
use crate::core::mirror::Wish;
use crate::core::plan::Change;
use crate::core::protocol::{Attach, Detach, List};
use crate::error::{Error, Result};
use crate::ops::Executor;
use crate::ops::intention::{Intention, Leaving, There, attaching, detaching, is_withdrawn};
use crate::ops::live::lookup;
use crate::ops::persist::Persisted;
use crate::runtime;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::device_filter::DeviceFilter;
use crate::sys::process::{holders_of, is_gone, sharing_mounts};
use crate::sys::udev;

/// Gives a container a device. Asking again for the same changes nothing.
pub fn attach(executor: &mut Executor, containers: &[Container], request: &Attach) -> Result<GrantInfo> {
    let Intention { container, grant, lasting, there } =
        attaching(&executor.cgroups, executor.ledger.entries(), containers, request)?;
    match there {
        Some(There::Same(entry)) => {
            executor.mark(&grant.holder)?;
            let Some((container, device)) = lasting else { return Ok(GrantInfo::from(&entry)) };
            executor.persisted.add(container, device)?;
            executor.ledger.set_origin(&grant, Origin::Persist)?;
            return Ok(GrantInfo::from(&Entry { grant, ..entry }));
        }
        Some(There::Stale(entry)) => drop(executor.carry_out(&Change::Remove { entry, unplugged: false })?),
        None => {}
    }
    // Written down before the act, like everything.
    let before = match lasting {
        Some((container, device)) => {
            let nothing = Attached::new(container.clone());
            Some(executor.persisted.add(container, device)?.unwrap_or(nothing))
        }
        None => None,
    };
    match executor.carry_out(&Change::Add(grant.clone())) {
        Ok(placement) => {
            let concern = (grant.holder.clone(), grant.device.clone());
            executor.mirror(&[concern], &[], |_| Some(Wish::of(container.annotations())));
            Ok(GrantInfo::from(&Entry { grant, placement, left_over: None }))
        }
        Err(first) => {
            if let Some(before) = before
                && let Err(error) = executor.persisted.put(before)
            {
                tracing::error!("it stays written down: {}", error.chain());
            }
            Err(first)
        }
    }
}

/// Takes devices back: the grant with that path inside, else every grant of that device. The note of each says who in
/// the container has it open still.
///
/// With an agent, what a rule grants would come back at once, so that is refused.
pub fn detach(
    executor: &mut Executor,
    containers: &[Container],
    request: &Detach,
    agent: bool,
) -> Result<Vec<GrantInfo>> {
    let Leaving { matching, attached, struck } =
        detaching(executor.ledger.entries(), &executor.persisted, containers, request, agent)?;
    let mut gone = Vec::new();
    for (attached, device) in attached.iter().flat_map(|it| struck.iter().map(move |device| (it, device))) {
        // First of all, so that nothing brings it back.
        executor.persisted.strike(&attached.container, &device.node.path)?;
        if !matching.iter().any(|entry| entry.grant.node.path == device.node.path) {
            gone.push(not_in_force(attached, device, containers));
        }
    }
    for entry in matching {
        let mut info = GrantInfo::from(&entry);
        let (holder, number) = (entry.grant.holder.clone(), entry.grant.device.number);
        if is_withdrawn(&entry) {
            executor.withdraw(&entry.grant.holder, number)?;
        }
        let concern = (entry.grant.holder.clone(), entry.grant.device.clone());
        executor.carry_out(&Change::Remove { entry, unplugged: true })?;
        executor.mirror(&[concern], &[], |_| None);
        // The right counts at open(2): what is open already stays usable.
        let processes = match holder.has_filter() {
            true => executor.cgroups.processes_below(&holder.cgroup),
            false => sharing_mounts(holder.pid),
        };
        let holders = holders_of(&processes, number);
        info.note = (!holders.is_empty()).then(|| format!("still open in {}", holders.join(", ")));
        gone.push(info);
    }
    Ok(gone)
}

/// What was attached for good and is not in force.
fn not_in_force(attached: &Attached, device: &Attachment, containers: &[Container]) -> GrantInfo {
    let running = containers.iter().find(|container| attached.is_for(container));
    let why = match running {
        Some(_) => "its device is not there, or could not be granted",
        None => "the container does not run",
    };
    let Attachment { device, number, node, access, .. } = device;
    GrantInfo {
        container: attached.container.name.clone(),
        id: running.map_or(&attached.container.name, |container| &container.id).clone(),
        device: device.clone(),
        kind: number.kind,
        major: number.major,
        minor: number.minor,
        access: *access,
        right: right(attached.container.owner == 0).to_owned(),
        path: node.path.clone(),
        node: "none".into(),
        uid: node.uid,
        gid: node.gid,
        mode: node.mode,
        origin: "manual".into(),
        persist: true,
        note: Some(format!("not in force: {why}")),
    }
}

/// What is in force, and what was attached for good, sorted by container and path. Entries of containers that ended
/// meanwhile are noted as such.
pub fn list<'a>(
    entries: impl Iterator<Item = &'a Entry> + Clone,
    persisted: &Persisted,
    containers: &[Container],
    request: &List,
) -> Result<Vec<GrantInfo>> {
    let reference = request.container.as_ref().map(|name| Reference::parse(name).map_err(Error::Usage)).transpose()?;
    let only = match &reference {
        Some(reference) => match lookup(containers, reference) {
            Err(Error::NoSuchContainer(_)) if persisted.named(reference, None).is_some() => Some(None),
            container => Some(Some(container?)),
        },
        None => None,
    };
    let is_asked = |attached: &&Attached| match (&reference, &only) {
        (Some(reference), Some(container)) => {
            persisted.named(reference, container.as_ref()).is_some_and(|its| its.container == attached.container)
        }
        _ => true,
    };
    let only = only.as_ref().map(|its| its.as_ref().map(|container| container.id.clone()).unwrap_or_default());
    let mut all: Vec<GrantInfo> = entries
        .clone()
        .filter(|entry| only.as_ref().is_none_or(|id| entry.grant.holder.id == *id))
        .map(|entry| {
            let mut info = GrantInfo::from(entry);
            let holder = &entry.grant.holder;
            if is_gone(holder.pid, holder.start_time) {
                info.note = Some("the container exited".into());
            } else if !udev::is_present(&entry.grant.device.identity) && info.note.is_none() {
                info.note = Some("the device is unplugged".into());
            }
            info
        })
        .collect();
    for attached in persisted.all().iter().filter(is_asked) {
        let is_there = |device: &&Attachment| {
            let has =
                |entry: &Entry| attached.may_be_of(&entry.grant.holder) && entry.grant.node.path == device.node.path;
            entries.clone().any(has)
        };
        let missing = attached.devices.iter().filter(|device| !is_there(device));
        all.extend(missing.map(|device| not_in_force(attached, device, containers)));
    }
    all.sort_by(|a, b| (&a.container, &a.path).cmp(&(&b.container, &b.path)));
    Ok(all)
}

/// Takes back what belongs to containers that ended: their nodes are gone, their entries in the filter are not. So does
/// what one who was killed has left half done.
pub fn prune(executor: &mut Executor) {
    let is_over =
        |entry: &&Entry| entry.is_interrupted() || is_gone(entry.grant.holder.pid, entry.grant.holder.start_time);
    let entries: Vec<Entry> = executor.ledger.entries().filter(is_over).cloned().collect();
    for entry in entries {
        if let Err(error) = executor.carry_out(&Change::Remove { entry, unplugged: false }) {
            tracing::warn!("{}", error.chain());
        }
    }
    executor.restore_ended();
    // Looked for where somebody was killed between a grant and what is shown of it.
    let containers = LazyCell::new(runtime::scan);
    executor.mirror_all(|holder| {
        let container = containers.iter().find(|container| container.id == holder.id);
        Some(container.map_or(Wish::Usual, |container| Wish::of(container.annotations())))
    });
}

/// How the filter is, and the agent if this is one; `events` says where it hears of devices.
pub fn status(cgroups: &CgroupRoot, containers: usize, grants: usize, events: Option<&str>) -> Result<StatusInfo> {
    let standing = DeviceFilter::standing(cgroups)?;
    Ok(StatusInfo {
        agent: events.is_some(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        filter: match (standing.attached, standing.after.is_empty()) {
            (false, _) => "none",
            (true, true) => "override",
            (true, false) => "degraded",
        }
        .to_owned(),
        after: standing.after,
        entries: standing.entries,
        withdrawn: standing.withdrawn,
        containers,
        grants,
        events: events.unwrap_or("none").to_owned(),
        configuration: Vec::new(),
        uptime: None,
        seen: 0,
        lost: 0,
        compared: 0,
        latency: None,
        of_container: BTreeMap::new(),
    })
}
