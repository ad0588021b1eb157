//! Collects what decides whether a container can open a device; [`crate::core::explanation`] puts it into words.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use crate::core::annotation::{obstacle, rule, whole};
use crate::core::category::Categories;
use crate::core::container::{Container, Reference};
use crate::core::device::{Access, Device, Kind, Number};
use crate::core::explanation::{Alone, Ask, Filter, Granted, Judged, Situation, explain as put_into_words};
use crate::core::facts::Facts;
use crate::core::info::Explained;
use crate::core::ledger::{Entry, Grant, Origin};
use crate::core::proof::{Answer, Subject};
use crate::core::rule::Rule;
use crate::core::settings::Settings;
use crate::error::{Error, Result};
use crate::ops::RUN_DIRECTORY;
use crate::ops::asks::is_heard;
use crate::ops::inspect::{Inspection, NodeFd, OPENS, Target, of_container, targets};
use crate::ops::live::{self, lookup};
use crate::ops::persist::Persisted;
use crate::ops::store::{self, Store};
use crate::sys::block;
use crate::sys::bpf::{Program, attached};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::device_filter::DeviceFilter;
use crate::sys::host::require_fitness;
use crate::sys::scratch::Scratch;
use crate::sys::sysfs::KernelSysfs;

/// What the names of all our programs begin with.
const OURS: &str = "qmhp_";

/// Explains `device`, an absolute path on the host or inside, by this configuration. `agent` says whether one runs.
pub fn explain(
    settings: &Settings,
    containers: &[Container],
    name: &str,
    device: &str,
    agent: bool,
) -> Result<Explained> {
    require_fitness()?;
    let cgroups = CgroupRoot::find()?;
    let container = lookup(containers, &Reference::parse(name).map_err(Error::Usage)?)?;
    let in_force = Store::peek(Path::new(RUN_DIRECTORY), store::warn)?;
    let entries = of_container(in_force.clone(), &container);
    let (inspection, problem) = match Inspection::new(&cgroups, &container) {
        Ok(inspection) => (Some(inspection), None),
        Err(Error::Refused { reason, .. }) => (None, Some(reason)),
        Err(error) => return Err(error),
    };
    let frozen = inspection.as_ref().and_then(Inspection::frozen);
    let askable = inspection.as_ref().filter(|_| frozen.is_none());
    let all = targets(&container, &entries, askable, device)?;
    let target = all.first().expect("it is there or an error");
    let holder = inspection.as_ref().map(|inspection| &inspection.holder);
    let its = live::subject(&container, holder, settings.policies.look_at_images());
    let mut asks = asks(&container, settings);
    let configured = settings.rules_for(&its).into_iter();
    asks.extend(configured.map(|rule| Ask { source: "the host's configuration".into(), rule: Ok(rule) }));
    let persisted = Persisted::look();
    let of_it = persisted.all().iter().filter(|attached| attached.is_for(&container));
    let rules = of_it.flat_map(|it| &it.devices).map(|device| device.rule(&settings.categories));
    asks.extend(rules.map(|rule| Ask { source: "attach --persist".into(), rule }));
    let sysfs = KernelSysfs::default();
    let known = target.device.as_ref().map(|device| Facts::new(device, &sysfs));
    let subject = inspection.as_ref().map_or_else(|| subject(target), |inspection| inspection.subject(target));
    let answer = match (&inspection, frozen) {
        (Some(inspection), None) => match inspection.ask(&subject, false, || NodeFd::of(target)) {
            // That is a part of the explanation.
            Err(error @ (Error::TimedOut(_) | Error::InContainer { .. })) => Err(error.chain()),
            answer => Ok(answer?),
        },
        (_, reason) => Err(reason.unwrap_or_default()),
    };
    let filter = match &inspection {
        Some(inspection) => filter(inspection, target, &subject)?,
        None => Filter::default(),
    };
    let bounds = settings.policies.bounds(&its);
    let user = container.user().zip(known.as_ref()).filter(|(user, facts)| !bounds.gives(*user, facts));
    let own_refusal = user.and_then(|(user, facts)| live::own_refusal(user, facts.device));
    let situation = Situation {
        container: name,
        node: &target.node,
        device: known.as_ref(),
        in_use: known.as_ref().and_then(|known| {
            in_use(target, known, &asks, &answer).or_else(|| taken(target, known, &asks, &container, &in_force))
        }),
        subject,
        category: target.device.as_ref().and_then(|device| best(&settings.categories, device)),
        asks,
        bounds: &bounds,
        own_refusal,
        grant: target.entry.as_ref().map(|entry| Granted {
            access: entry.grant.access,
            origin: match &entry.grant.origin {
                Origin::Manual => "attached by hand".into(),
                Origin::Persist => "attached by hand for good".into(),
                Origin::Rule(rule) => format!("granted by its rule {rule}"),
            },
            manual: !matches!(entry.grant.origin, Origin::Rule(_)),
            left_over: entry.left_over.clone(),
        }),
        agent,
        problem,
        filter,
        answer,
        label: inspection.as_ref().and_then(|inspection| inspection.process.security_label()),
    };
    Ok(Explained {
        container: container.label().to_owned(),
        id: container.id.clone(),
        device: target.node.clone(),
        kind: target.number.kind,
        major: target.number.major,
        minor: target.number.minor,
        path: target.path.clone(),
        explanation: put_into_words(&situation),
    })
}

fn subject(target: &Target) -> Subject {
    Subject { path: target.path.clone(), number: target.number, access: OPENS, user: String::new() }
}

fn asks(container: &Container, settings: &Settings) -> Vec<Ask> {
    let obstacle = obstacle(container.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let ask = |(key, value): (&str, &str)| {
        let found = rule(key, value, &settings.categories)?.and_then(|rule| whole(rule, key, value, obstacle));
        Some(match found {
            Ok(_) if !is_heard(settings, container) => {
                let reason = format!(
                    "it counts for nothing, since no users = [{}] in the configuration says so",
                    container.owner
                );
                Ask { source: key.to_owned(), rule: Err(reason) }
            }
            Ok(rule) => Ask { source: key.to_owned(), rule: Ok(rule) },
            Err(ignored) => Ask { source: ignored.key, rule: Err(ignored.reason) },
        })
    };
    container.annotations().filter_map(ask).collect()
}

/// The category that a person would name: one that needs no enabling, before others.
fn best<'a>(categories: &'a Categories, device: &Device) -> Option<&'a crate::core::category::Category> {
    let having = || categories.iter().filter(|category| category.contains(device));
    having().find(|category| category.enabled).or_else(|| having().next())
}

/// What keeps the agent from granting a disk. To look opens it, so it is done only where that is the question.
fn in_use(
    target: &Target,
    known: &Facts<'_>,
    asks: &[Ask],
    answer: &std::result::Result<Answer, String>,
) -> Option<String> {
    let is_asked = asks.iter().any(|ask| ask.rule.as_ref().is_ok_and(|rule| rule.matches(known).is_some()));
    let is_open = target.entry.is_some() || answer.as_ref().is_ok_and(|answer| answer.filter == Some(0));
    let is_block = known.device.number.kind == Kind::Block;
    (is_block && is_asked && !is_open).then(|| block::in_use(&known.device.node, known.device.number)).flatten()
}

/// Who has what only one can have: the device for itself alone, or the path inside.
fn taken(
    target: &Target,
    known: &Facts<'_>,
    asks: &[Ask],
    container: &Container,
    in_force: &[Entry],
) -> Option<String> {
    let matching = || asks.iter().filter_map(|ask| ask.rule.as_ref().ok()).filter(|it| it.matches(known).is_some());
    if target.entry.is_some() || matching().next().is_none() {
        return None;
    }
    let alone = matching().any(Rule::is_exclusive);
    in_force.iter().filter(|entry| entry.left_over.is_none()).find_map(|entry| {
        let Grant { holder, device, node, exclusive, .. } = &entry.grant;
        let is_same_device = device.identity == known.device.identity;
        let is_its = (&holder.id, holder.pid) == (&container.id, container.pid);
        let has_path =
            || matching().filter_map(Rule::selection).any(|it| it.options.path.as_deref() == Some(&node.path));
        match is_its {
            false if is_same_device && (*exclusive || alone) => {
                Some(format!("container {} has it, and only one may", holder.label()))
            }
            true if !is_same_device && has_path() => Some(format!("{} is {} there", node.path, device.node)),
            _ => None,
        }
    })
}

fn filter(inspection: &Inspection<'_>, target: &Target, subject: &Subject) -> Result<Filter> {
    let Inspection { cgroups, holder, cgroup, .. } = inspection;
    if !holder.has_filter() {
        let programs = foreign(cgroups, &cgroup.path).map_err(Error::host("read the device filter"))?;
        let programs = judge(cgroups, programs, target, subject.access);
        return Ok(Filter { programs, is_none: true, ..Filter::default() });
    }
    let failed = || Error::host::<io::Error>("read the device filter");
    let standing = DeviceFilter::standing(cgroups)?;
    let programs = foreign(cgroups, &cgroup.path).map_err(failed())?;
    let mut filter = Filter {
        programs: judge(cgroups, programs, target, subject.access),
        below: cgroup.path != holder.cgroup,
        after: standing.after,
        ..Filter::default()
    };
    if let Some(ours) = DeviceFilter::existing(cgroups)? {
        filter.granted = Some(ours.get(holder.cgroup_id, target.number).map_err(failed())?);
        let is_it = |(cgroup, number): (u64, Number)| (cgroup, number) == (holder.cgroup_id, target.number);
        let withdrawn = ours.withdrawn().map_err(failed())?;
        filter.withdrawn = withdrawn.iter().any(|entry| is_it((entry.cgroup, entry.number)));
        let own = cgroups.open(&holder.cgroup).map_err(failed())?;
        filter.marked = ours.is_marked(&own).map_err(failed())?;
    }
    Ok(filter)
}

/// A program of others: its cgroup, name and id.
struct Foreign {
    cgroup: String,
    name: String,
    id: u32,
    program: Program,
}

/// The programs that are not ours, from a cgroup up to the root, in the order in which they run.
fn foreign(cgroups: &CgroupRoot, path: &str) -> io::Result<Vec<Foreign>> {
    let mut found = Vec::new();
    for path in cgroups.up(path) {
        add(&mut found, path.clone(), cgroups.open(&path)?.as_fd())?;
    }
    add(&mut found, "/".into(), cgroups.as_fd())?;
    Ok(found)
}

fn add(found: &mut Vec<Foreign>, cgroup: String, fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    for program in attached(fd)? {
        let info = program.info()?;
        if !info.name.starts_with(OURS) {
            found.push(Foreign { cgroup: cgroup.clone(), name: info.name, id: info.id, program });
        }
    }
    Ok(())
}

/// Asks each program alone.
fn judge(cgroups: &CgroupRoot, programs: Vec<Foreign>, target: &Target, access: Access) -> Vec<Judged> {
    if programs.is_empty() {
        return Vec::new();
    }
    let asked = Scratch::new(cgroups).and_then(|scratch| Ok((scratch, NodeFd::of(target)?)));
    let verdict = |program: &Program| match &asked {
        Ok((scratch, node)) => match scratch.refuses(program, node.borrow(), access) {
            Ok(true) => Alone::Refuses,
            Ok(false) => Alone::Allows,
            Err(error) => Alone::Unknown(error.to_string()),
        },
        Err(error) => Alone::Unknown(error.chain()),
    };
    let judged = |Foreign { cgroup, name, id, program }| Judged { cgroup, name, id, verdict: verdict(&program) };
    programs.into_iter().map(judged).collect()
}
