//! What the agent knows now: the devices of the host, and the containers that run.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch::Sender;

use crate::agent::Compared;
use crate::agent::monitors::Monitors;
use crate::agent::said::Said;
use crate::agent::watch::Watched;
use crate::config;
use crate::core::annotation::Ignored;
use crate::core::attachment::Attached;
use crate::core::category::Categories;
use crate::core::container::Container;
use crate::core::device::Device;
use crate::core::facts::Facts;
use crate::core::figures::Figures;
use crate::core::ledger::{Grant, Holder};
use crate::core::matcher::Asking;
use crate::core::policy::Bounds;
use crate::core::rule::Rule;
use crate::core::selection::{Group, Selection};
use crate::core::settings::Settings;
use crate::error::Error;
use crate::ops::asks::{nodes_at_start, rules_of};
use crate::ops::live::{groups, hold, own_refusal, subject};
use crate::runtime::places::Place;
use crate::runtime::{self, Found};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::host::Host;
use crate::sys::process::Process;

/// How soon an `/etc/group` is read again that could not be read.
const GROUPS_AGAIN: Duration = Duration::from_secs(10);

/// A container that runs.
#[derive(Debug)]
pub(super) struct Known {
    /// As its runtime describes it.
    pub(super) container: Container,
    /// What it asks for.
    pub(super) rules: Vec<Rule>,
    /// What it may ask for.
    bounds: Bounds,
    /// Its own cgroup, where it can be worked on. Looked up for containers that ask for something.
    pub(super) holder: Option<Holder>,
    /// The paths of the nodes that the hook has made for selectors.
    pub(super) at_start: Vec<String>,
    /// The groups of its `/etc/group`, once one was asked for. It is the container's to make that file long.
    groups: OnceCell<HashMap<String, u32>>,
    /// When they could not be read: a container may make that slow.
    no_groups: Cell<Option<Instant>>,
    /// Whether it has a udevd of its own, which gives nodes their owner and mode.
    pub(super) has_udevd: Cell<bool>,
    /// Held so that its end is heard of.
    _init: Process,
    token: u64,
}

impl Known {
    /// Adds what it asks for on a device, or logs why it does not get it.
    pub(super) fn desired(&self, host: Host, facts: &Facts<'_>, grants: &mut Vec<Grant>, said: &Said) {
        let Some(holder) = &self.holder else { return };
        let group = |name: &str| {
            let was_tried = || self.no_groups.get().is_some_and(|at| at.elapsed() < GROUPS_AGAIN);
            if self.groups.get().is_none() && !was_tried() {
                match groups(&self.container, host) {
                    Ok(text) => drop(self.groups.set(Group::all_in(&text))),
                    Err(error) => {
                        self.no_groups.set(Some(Instant::now()));
                        said.once(&holder.id, holder.label(), error.chain());
                    }
                }
            }
            self.groups.get()?.get(name).copied()
        };
        let (rules, bounds) = (&self.rules, &self.bounds);
        let named = &self.container.devices;
        let own_refusal = |device: &Device| own_refusal(holder.user, device);
        let asking = Asking { holder, named, rules, bounds, group: &group, own_refusal: &own_refusal };
        let mut refused = Vec::new();
        asking.desired(facts, grants, &mut refused);
        for one in refused {
            let text = format!("{} not granted by {}: {}", one.device, one.rule, one.reason);
            said.once(&holder.id, holder.label(), text);
        }
    }

    /// The same as far as it asks for it before udev has spoken.
    pub(super) fn is_early(&self) -> bool {
        self.has_udevd.get() && self.bounds.is_open() && !self.rules.iter().any(Rule::needs_udev)
    }

    /// Whether devices decide on what it gets of others.
    pub(super) fn looks_around(&self) -> bool {
        self.bounds.looks_around() || self.selections().any(Selection::looks_around)
    }

    /// What it may have of a device, in words if not.
    pub(super) fn refusal(&self, facts: &Facts<'_>) -> Option<String> {
        self.bounds.refusal(facts)
    }

    /// The selectors that it asks with.
    pub(super) fn selections(&self) -> impl Iterator<Item = &Selection> {
        self.rules.iter().filter_map(Rule::selection)
    }
}

/// What events have left to be looked at again.
#[derive(Debug, Default)]
pub(super) struct Later {
    /// Containers, by id.
    pub(super) ids: BTreeSet<String>,
    /// USB buses, by the beginning of their devices' `DEVPATH`.
    pub(super) buses: BTreeSet<String>,
    /// When the first of these events was read.
    pub(super) since: Option<Instant>,
}

/// Devices and containers.
#[derive(Debug)]
pub(super) struct Registry {
    /// By `DEVPATH`.
    pub(super) devices: BTreeMap<String, Device>,
    /// By id.
    pub(super) containers: HashMap<String, Known>,
    /// Containers named by `pid:N` that have grants, by id; their end matters too.
    others: HashMap<String, (Process, u64)>,
    /// Ids of the cgroups that are watched, those of containers with grants.
    cgroups: BTreeSet<u64>,
    settings: Arc<Settings>,
    /// The same for those who look things up beside the loop.
    pub(super) in_force: Sender<Arc<Settings>>,
    /// When this began.
    pub(super) since: Instant,
    /// When a caller last had all containers looked for.
    pub(super) looked: Instant,
    /// What was worked through since then.
    pub(super) figures: RefCell<Figures>,
    /// What is wrong with the configuration, as it is written now.
    pub(super) problems: Vec<String>,
    /// What was attached for good.
    attached: Vec<Attached>,
    /// What was said already.
    pub(super) said: Said,
    /// Ids of the containers that did not get what another one has, or another device of theirs.
    pub(super) waiting: RefCell<BTreeSet<String>>,
    /// What is to be looked at again after the events that are at hand.
    pub(super) later: Later,
    /// Places of containers that are starting, which are looked at again, and since when they are.
    pub(super) starting: BTreeMap<PathBuf, Instant>,
    pub(super) watched: Watched,
    pub(super) compared: Compared,
    /// The last time that the containers of a user were looked at.
    pub(super) users: HashMap<u32, Compared>,
    /// Those who are told of changes.
    pub(super) monitors: Monitors,
}

impl Registry {
    pub(super) fn new(mut watched: Watched, attached: &[Attached]) -> Registry {
        let (settings, problems) = config::settings();
        for problem in &problems {
            tracing::error!("passed over: {problem}");
        }
        watched.serve(&settings.users);
        let settings = Arc::new(settings);
        Registry {
            devices: BTreeMap::new(),
            containers: HashMap::new(),
            others: HashMap::new(),
            cgroups: BTreeSet::new(),
            in_force: Sender::new(Arc::clone(&settings)),
            settings,
            since: Instant::now(),
            looked: Instant::now(),
            figures: RefCell::default(),
            problems,
            attached: attached.to_vec(),
            said: Said::default(),
            waiting: RefCell::default(),
            later: Later::default(),
            starting: BTreeMap::new(),
            watched,
            compared: Compared { started: Instant::now(), took: Duration::ZERO, is_due: false },
            users: HashMap::new(),
            monitors: Monitors::new(),
        }
    }

    /// Whether the containers of this ordinary user are looked for.
    pub(super) fn serves(&self, uid: u32) -> bool {
        self.settings.users.contains(&uid)
    }

    /// The host's categories.
    pub(super) fn categories(&self) -> &Categories {
        &self.settings.categories
    }

    /// Takes in the container at that place: its id, and whether it has to be looked at. One that is starting, without a
    /// sign when it has, is looked at again; `starting` says since when it is known to be.
    pub(super) fn look_at(
        &mut self,
        cgroups: &CgroupRoot,
        place: Place,
        starting: Option<Instant>,
    ) -> Option<(String, bool)> {
        let found = runtime::load(&place);
        if found != Found::Starting {
            self.starting.remove(&place.path);
        }
        match found {
            Found::Running(container) => Some((container.id.clone(), self.learn(cgroups, *container))),
            Found::Starting => {
                let known = self.starting.get(&place.path).copied();
                // Whatever else is heard of it meanwhile, one series of looks is enough.
                if known.is_none() || known == starting {
                    let since = known.unwrap_or_else(Instant::now);
                    self.starting.insert(place.path.clone(), since);
                    self.watched.look_again(place, since);
                }
                None
            }
            Found::Nothing => None,
        }
    }

    /// Takes in a container, or what is new about it. Returns whether what it asks for and may have has to be looked at:
    /// it is a run that was not known before, or its name, by which rules and policies go, was not.
    pub(super) fn learn(&mut self, cgroups: &CgroupRoot, container: Container) -> bool {
        let old = self.containers.get_mut(&container.id);
        let is_same_run =
            |old: &&mut Known| (old.container.pid, old.container.start_time) == (container.pid, container.start_time);
        let old = old.filter(is_same_run);
        let is_new = old.is_none();
        if let Some(old) = old {
            // The name may have been out of sight while the container was being created, and somebody may change it.
            let is_named = container.name.is_some() && old.container.name != container.name;
            // A run that could not be worked on may have been starting still; any other is known well.
            if !is_named && (old.holder.is_some() || old.rules.is_empty()) {
                return false;
            }
        }
        let Some(init) = Process::open_same(container.pid, container.start_time) else { return false };
        let (rules, ignored) = rules_of(&self.settings, &self.attached, &container);
        for annotation in ignored.iter().filter(|_| is_new) {
            tracing::warn!(
                container = container.label(),
                "annotation {} ignored: {}",
                annotation.key,
                annotation.reason
            );
        }
        let holder = match rules.is_empty() {
            true => None,
            false => match hold(cgroups, &container) {
                Ok(holder) => Some(holder),
                Err(Error::ContainerExited(_)) => return false,
                Err(error) => {
                    tracing::warn!(container = container.label(), "nothing can be granted for now: {}", error.chain());
                    None
                }
            },
        };
        let token = match self.watched.watch_exit(&init) {
            Ok(token) => token,
            Err(error) => {
                tracing::error!(container = container.label(), "cannot watch for its end: {error}");
                return false;
            }
        };
        tracing::debug!(container = container.label(), id = container.id, "known");
        let bounds = self.bounds_of(&container, holder.as_ref());
        let (at_start, (groups, no_groups, has_udevd)) = (nodes_at_start(&container), Default::default());
        let known =
            Known { container, rules, bounds, holder, at_start, groups, no_groups, has_udevd, _init: init, token };
        self.containers.insert(known.container.id.clone(), known);
        true
    }

    /// Reads the host's configuration again. Where a file is wrong, all stays as it was; the error is in words.
    pub(super) fn reconfigure(&mut self) -> Result<(), String> {
        let (settings, problems) = config::settings();
        self.problems = problems;
        if !self.problems.is_empty() {
            for problem in &self.problems {
                tracing::error!("the configuration stays as it was: {problem}");
            }
            return Err(format!("the configuration stays as it was: {}", self.problems.join("; ")));
        }
        self.settings = Arc::new(settings);
        self.in_force.send_replace(Arc::clone(&self.settings));
        self.watched.serve(&self.settings.users);
        self.said = Said::default();
        let wants_image = self.settings.policies.look_at_images();
        for known in self.containers.values_mut() {
            let (rules, ignored) = rules_of(&self.settings, &self.attached, &known.container);
            for Ignored { key, reason, .. } in ignored {
                let text = format!("annotation {key} ignored: {reason}");
                self.said.once(&known.container.id, known.container.label(), text);
            }
            known.rules = rules;
            let subject = subject(&known.container, known.holder.as_ref(), wants_image);
            known.bounds = self.settings.policies.bounds(&subject);
        }
        Ok(())
    }

    /// Takes in what is attached for good now.
    pub(super) fn keep(&mut self, cgroups: &CgroupRoot, attached: &[Attached]) {
        if self.attached == attached {
            return;
        }
        self.attached = attached.to_vec();
        for known in self.containers.values_mut() {
            known.rules = rules_of(&self.settings, &self.attached, &known.container).0;
        }
        self.retry(cgroups);
    }

    fn bounds_of(&self, container: &Container, holder: Option<&Holder>) -> Bounds {
        let policies = &self.settings.policies;
        policies.bounds(&subject(container, holder, policies.look_at_images()))
    }

    /// Looks again at containers that ask for something and could not be worked on when they were last looked at: they
    /// may have been starting still.
    pub(super) fn retry(&mut self, cgroups: &CgroupRoot) {
        let policies = &self.settings.policies;
        for known in self.containers.values_mut().filter(|known| known.holder.is_none() && !known.rules.is_empty()) {
            known.holder = hold(cgroups, &known.container).ok();
            let subject = subject(&known.container, known.holder.as_ref(), policies.look_at_images());
            known.bounds = policies.bounds(&subject);
        }
    }

    /// Watches a container that has grants: for writes to its cgroup, and for its end where the ledger alone knows it.
    pub(super) fn follow(&mut self, cgroups: &CgroupRoot, holder: &Holder) {
        if holder.has_filter() && !self.cgroups.contains(&holder.cgroup_id) {
            let directory = cgroups.path.join(holder.cgroup.trim_start_matches('/'));
            match self.watched.watch_cgroup(&directory, &holder.id) {
                Ok(()) => drop(self.cgroups.insert(holder.cgroup_id)),
                Err(error) => {
                    tracing::debug!(container = holder.label(), "cannot watch {}: {error}", directory.display())
                }
            }
        }
        if self.containers.contains_key(&holder.id) || self.others.contains_key(&holder.id) {
            return;
        }
        if let Some(process) = Process::open_same(holder.pid, holder.start_time)
            && let Ok(token) = self.watched.watch_exit(&process)
        {
            self.others.insert(holder.id.clone(), (process, token));
        }
    }

    /// Its cgroup is gone, and the kernel has ended the watch.
    pub(super) fn unfollow(&mut self, holder: &Holder) {
        self.cgroups.remove(&holder.cgroup_id);
    }

    /// Strikes the container whose init had this token. Returns its id.
    pub(super) fn forget(&mut self, token: u64) -> Option<String> {
        let known = self.containers.iter().find(|(_, known)| known.token == token).map(|(id, _)| id.clone());
        if let Some(id) = known {
            let holder = self.containers.remove(&id).and_then(|known| known.holder);
            self.watched.tell_early(self.containers.values().any(|known| known.has_udevd.get()));
            holder.iter().for_each(|holder| self.unfollow(holder));
            self.said.forget(&id);
            self.waiting.borrow_mut().remove(&id);
            return Some(id);
        }
        let id = self.others.iter().find(|(_, (_, its_token))| *its_token == token).map(|(id, _)| id.clone())?;
        self.others.remove(&id);
        Some(id)
    }

    /// The configuration that is in force.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The containers, for look-ups by name.
    pub(super) fn snapshot(&self) -> Vec<Container> {
        self.containers.values().map(|known| known.container.clone()).collect()
    }
}
