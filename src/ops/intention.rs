//! What `attach` and `detach` come to, before anything is done.

use crate::config;
use crate::core::attachment::{Attached, Attachment, Lasting};
use crate::core::container::{Container, Reference};
use crate::core::destination;
use crate::core::device::{Access, Device};
use crate::core::facts::Facts;
use crate::core::ledger::{Entry, Grant, Granted, Node, Origin};
use crate::core::plan::{Change, Step};
use crate::core::protocol::{Attach, Detach, Persist};
use crate::core::selection::{Group, Options};
use crate::error::{Error, Result};
use crate::ops::inspect::is_of;
use crate::ops::live::{hold, lookup};
use crate::ops::persist::Persisted;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::sysfs::KernelSysfs;
use crate::sys::udev;

/// What an `attach` would make.
pub(super) struct Intention {
    /// For whom.
    pub(super) container: Container,
    pub(super) grant: Grant,
    /// What is to be written down for good.
    pub(super) lasting: Option<(Lasting, Attachment)>,
    /// What the ledger has at that path.
    pub(super) there: Option<There>,
}

/// What the ledger has where something is to be attached.
pub(super) enum There {
    /// The same.
    Same(Entry),
    /// What is half done, or of a device that is gone: it goes first.
    Stale(Entry),
}

/// Looks whether it can be attached, and as what.
pub(super) fn attaching<'a>(
    cgroups: &CgroupRoot,
    entries: impl Iterator<Item = &'a Entry> + Clone,
    containers: &[Container],
    request: &Attach,
) -> Result<Intention> {
    let reference = Reference::parse(&request.container).map_err(Error::Usage)?;
    let destination = request.destination.as_deref().unwrap_or(&request.device);
    let path = destination::check(destination)
        .map_err(|reason| Error::BadDestination { path: destination.to_owned(), reason })?;
    // The command line checks this too; a program that talks to the agent's socket may not.
    if let Some(mode) = request.mode.filter(|mode| *mode > 0o777) {
        return Err(Error::Usage(format!("mode {mode:o} is more than permission bits: give at most 777")));
    }
    let container = lookup(containers, &reference)?;
    let device = udev::by_path(&request.device)?;
    let holder = hold(cgroups, &container)?;
    let node = Node {
        path,
        uid: request.uid.unwrap_or(device.uid),
        gid: request.gid.unwrap_or(device.gid),
        mode: request.mode.unwrap_or(device.mode),
        link_to: None,
    };
    let alone = |entry: &&Entry| {
        let grant = &entry.grant;
        let is_heard = [0, holder.user].contains(&grant.holder.user);
        grant.exclusive && is_heard && grant.device.identity == device.identity && !grant.holder.is_same_run(&holder)
    };
    if let Some(entry) = entries.clone().find(alone) {
        let (holder, node) = (entry.grant.holder.label(), &device.node);
        let reason = format!("container {holder} has {node}, and only one may: it is free when that ends");
        return Err(Error::Refused { container: container.label().to_owned(), reason });
    }
    let lasting = match &request.persist {
        Some(persist) => Some(for_good(request, persist, &container, &device, &node)?),
        None => None,
    };
    let grant = Grant {
        holder,
        device: Granted::from(&device),
        access: request.access.unwrap_or(Access::ALL),
        node,
        origin: if lasting.is_some() { Origin::Persist } else { Origin::Manual },
        at_start: false,
        exclusive: false,
    };
    let is_at_path =
        |entry: &&Entry| entry.grant.holder.is_same_run(&grant.holder) && entry.grant.node.path == grant.node.path;
    let there = match entries.clone().find(is_at_path) {
        Some(entry) if !entry.is_settled() => Some(There::Stale(entry.clone())),
        Some(entry) => {
            let is_by_rule = matches!(entry.grant.origin, Origin::Rule(_)) && lasting.is_some();
            if entry.grant.is_same(&grant) && entry.grant.node == grant.node && !is_by_rule {
                Some(There::Same(entry.clone()))
            } else if !udev::is_present(&entry.grant.device.identity) {
                Some(There::Stale(entry.clone()))
            } else {
                return Err(Error::Refused {
                    container: container.label().to_owned(),
                    reason: format!(
                        "{} is already {} with access {}, {}",
                        entry.grant.node.path,
                        entry.grant.device.node,
                        entry.grant.access,
                        match &entry.grant.origin {
                            Origin::Manual | Origin::Persist => "attached by hand: detach it first".to_owned(),
                            Origin::Rule(category) => format!("granted by its rule {category}: name another DEST"),
                        }
                    ),
                });
            }
        }
        None => None,
    };
    Ok(Intention { container, grant, lasting, there })
}

/// What is to be written down of a device that is attached for good.
fn for_good(
    request: &Attach,
    persist: &Persist,
    container: &Container,
    device: &Device,
    node: &Node,
) -> Result<(Lasting, Attachment)> {
    let refuse = |reason: String| Error::Refused { container: container.label().to_owned(), reason };
    let lasting = Lasting::of(container)
        .ok_or_else(|| refuse("a process has no name that outlives it: name a container for --persist".into()))?;
    let options = Options {
        path: Some(node.path.clone()),
        access: request.access,
        mode: request.mode,
        uid: request.uid,
        gid: request.gid.map(Group::Number),
        ..Options::default()
    };
    let (sysfs, selector) = (KernelSysfs::default(), persist.selector.as_deref());
    let categories = config::settings_or_warn().categories;
    let facts = Facts::new(device, &sysfs);
    let attachment = Attachment::new(&facts, &persist.typed, selector, &options, node, &categories);
    Ok((lasting, attachment.map_err(|reason| refuse(format!("--persist: {reason}")))?))
}

/// The grants of this run of the container that `device` stands for: the one with that path inside, else every one of
/// that device of the host.
pub fn meant<'a>(entries: impl Iterator<Item = &'a Entry> + Clone, container: &Container, device: &str) -> Vec<Entry> {
    let path = destination::check(device).unwrap_or_else(|_| device.to_owned());
    let all = || entries.clone().filter(|entry| is_of(entry, container));
    let at_path: Vec<Entry> = all().filter(|entry| entry.grant.node.path == path).cloned().collect();
    if !at_path.is_empty() {
        return at_path;
    }
    // The device may be named by any link to it, and may be unplugged already.
    let identity = udev::by_path(device).ok().map(|device| device.identity);
    let names =
        |entry: &&Entry| entry.grant.device.node == device || Some(&entry.grant.device.identity) == identity.as_ref();
    all().filter(names).cloned().collect()
}

/// What a `detach` would take back.
pub(super) struct Leaving {
    /// Of the container, if it runs.
    pub(super) matching: Vec<Entry>,
    /// What was attached for good.
    pub(super) attached: Option<Attached>,
    /// What of that is struck.
    pub(super) struck: Vec<Attachment>,
}

/// Looks what is to be taken back. With an agent, what a rule grants would come back at once, so that is refused.
pub(super) fn detaching<'a>(
    entries: impl Iterator<Item = &'a Entry> + Clone,
    persisted: &Persisted,
    containers: &[Container],
    request: &Detach,
    agent: bool,
) -> Result<Leaving> {
    let reference = Reference::parse(&request.container).map_err(Error::Usage)?;
    let container = match lookup(containers, &reference) {
        // What was attached for good is there also while it does not run.
        Err(Error::NoSuchContainer(_)) if persisted.named(&reference, None).is_some() => None,
        container => Some(container?),
    };
    let matching = match &container {
        Some(container) => meant(entries, container, &request.device),
        None => Vec::new(),
    };
    let attached = persisted.named(&reference, container.as_ref()).cloned();
    let is_matching = |path: &String| matching.iter().any(|entry| entry.grant.node.path == *path);
    let struck = attached.iter().flat_map(|it| &it.devices);
    let struck: Vec<Attachment> = struck
        .filter(|device| is_matching(&device.node.path) || matching.is_empty() && device.is_named(&request.device))
        .cloned()
        .collect();
    if matching.is_empty() && struck.is_empty() {
        let label = container.as_ref().map_or(request.container.as_str(), Container::label).to_owned();
        return Err(Error::NoSuchGrant { container: label, device: request.device.clone() });
    }
    if let Some((entry, category)) = matching.iter().find_map(|entry| match &entry.grant.origin {
        Origin::Rule(category) if agent => Some((entry, category)),
        _ => None,
    }) {
        return Err(Error::Refused {
            container: entry.grant.holder.label().to_owned(),
            reason: format!(
                "{} is granted by its rule {category} and would come back at once: take that out of its annotations, or out of the configuration",
                entry.grant.node.path
            ),
        });
    }
    Ok(Leaving { matching, attached, struck })
}

/// What `attach` would do, a line each.
pub fn steps_of_attach(
    cgroups: &CgroupRoot,
    entries: &[Entry],
    persisted: &Persisted,
    containers: &[Container],
    request: &Attach,
) -> Result<Vec<String>> {
    let Intention { grant, lasting, there, .. } = attaching(cgroups, entries.iter(), containers, request)?;
    let is_kept = |(container, device): &(Lasting, Attachment)| {
        persisted.all().iter().any(|kept| kept.container == *container && kept.devices.contains(device))
    };
    let keep =
        lasting.filter(|lasting| !is_kept(lasting)).map(|_| format!("write down {} for restarts", grant.node.path));
    let lines = |steps: Vec<Step>| steps.iter().map(Step::to_string).collect::<Vec<_>>();
    let (before, after) = match there {
        Some(There::Same(_)) => Default::default(),
        Some(There::Stale(entry)) => {
            let remaining = entries.iter().filter(|other| **other != entry);
            let removal = Change::Remove { entry: entry.clone(), unplugged: false }.steps(entries.iter());
            (removal, Change::Add(grant).steps(remaining))
        }
        None => (Vec::new(), Change::Add(grant).steps(entries.iter())),
    };
    Ok(lines(before).into_iter().chain(keep).chain(lines(after)).collect())
}

/// What `detach` would do, a line each.
pub fn steps_of_detach(
    entries: &[Entry],
    persisted: &Persisted,
    containers: &[Container],
    request: &Detach,
    agent: bool,
) -> Result<Vec<String>> {
    let Leaving { matching, struck, .. } = detaching(entries.iter(), persisted, containers, request, agent)?;
    let mut remaining: Vec<&Entry> = entries.iter().collect();
    let strike = |device: &Attachment| format!("strike {} from what is kept for restarts", device.node.path);
    let mut lines: Vec<String> = struck.iter().map(strike).collect();
    for entry in matching {
        if is_withdrawn(&entry) {
            lines.push(format!("withdraw the right on {} that it has from its start", entry.grant.device.number));
        }
        let steps = Change::Remove { entry: entry.clone(), unplugged: true }.steps(remaining.iter().copied());
        lines.extend(steps.iter().map(Step::to_string));
        remaining.retain(|other| **other != entry);
    }
    Ok(lines)
}

/// Whether a `detach` takes more than the grant: what a rule has granted goes as if its device were unplugged, with what the
/// container had from its start.
pub(super) fn is_withdrawn(entry: &Entry) -> bool {
    entry.grant.at_start && matches!(entry.grant.origin, Origin::Rule(_))
}
