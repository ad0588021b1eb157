//! What the agent knows now: the devices of the host, and the containers that run.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::agent::monitors::Monitors;
use crate::agent::watch::Watched;
use crate::config;
use crate::core::annotation::{Rule, rules};
use crate::core::category::Categories;
use crate::core::container::Container;
use crate::core::device::Device;
use crate::core::ledger::Holder;
use crate::error::Error;
use crate::ops::live::hold;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::process::Process;

/// A container that runs.
#[derive(Debug)]
pub(super) struct Known {
    /// As its runtime describes it.
    pub(super) container: Container,
    /// What it asks for.
    pub(super) rules: Vec<Rule>,
    /// Its own cgroup, where it can be worked on. Looked up for containers that ask for something.
    pub(super) holder: Option<Holder>,
    /// Held so that its end is heard of.
    _init: Process,
    token: u64,
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
    categories: Categories,
    pub(super) watched: Watched,
    /// Those who are told of changes.
    pub(super) monitors: Monitors,
}

impl Registry {
    pub(super) fn new(watched: Watched) -> Registry {
        let (categories, problems) = config::categories();
        for problem in problems {
            tracing::warn!("passed over: {problem}");
        }
        Registry {
            devices: BTreeMap::new(),
            containers: HashMap::new(),
            others: HashMap::new(),
            cgroups: BTreeSet::new(),
            categories,
            watched,
            monitors: Monitors::new(),
        }
    }

    /// The categories of this host.
    pub(super) fn categories(&self) -> &Categories {
        &self.categories
    }

    /// Takes in a container, or what is new about it. Returns whether it is a run that was not known before.
    pub(super) fn learn(&mut self, cgroups: &CgroupRoot, container: Container) -> bool {
        let old = self.containers.get_mut(&container.id);
        let is_same_run =
            |old: &&mut Known| (old.container.pid, old.container.start_time) == (container.pid, container.start_time);
        let old = old.filter(is_same_run);
        let is_new = old.is_none();
        if let Some(old) = old {
            // The name may have been out of sight while the container was being created.
            old.container.name = old.container.name.take().or_else(|| container.name.clone());
            // A run that could not be worked on may have been starting still; any other is known well.
            if old.holder.is_some() || old.rules.is_empty() {
                return false;
            }
        }
        let Some(init) = Process::open_same(container.pid, container.start_time) else { return false };
        let (rules, ignored) = rules(container.annotations(), &self.categories);
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
        self.containers.insert(container.id.clone(), Known { container, rules, holder, _init: init, token });
        true
    }

    /// Reads the host's configuration again. Where a file is wrong, all stays as it was.
    pub(super) fn reconfigure(&mut self) {
        let (categories, problems) = config::categories();
        if !problems.is_empty() {
            return problems.iter().for_each(|problem| tracing::error!("the configuration stays as it was: {problem}"));
        }
        self.categories = categories;
        for known in self.containers.values_mut() {
            known.rules = rules(known.container.annotations(), &self.categories).0;
        }
    }

    /// Looks again at containers that ask for something and could not be worked on when they were last looked at: they
    /// may have been starting still.
    pub(super) fn retry(&mut self, cgroups: &CgroupRoot) {
        for known in self.containers.values_mut().filter(|known| known.holder.is_none() && !known.rules.is_empty()) {
            known.holder = hold(cgroups, &known.container).ok();
        }
    }

    /// Watches a container that has grants: for writes to its cgroup, and for its end where the ledger alone knows it.
    pub(super) fn follow(&mut self, cgroups: &CgroupRoot, holder: &Holder) {
        if self.cgroups.insert(holder.cgroup_id) {
            let directory = cgroups.path.join(holder.cgroup.trim_start_matches('/'));
            if let Err(error) = self.watched.watch_cgroup(&directory, &holder.id) {
                tracing::debug!(container = holder.label(), "cannot watch {}: {error}", directory.display());
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
            self.containers.remove(&id);
            return Some(id);
        }
        let id = self.others.iter().find(|(_, (_, its_token))| *its_token == token).map(|(id, _)| id.clone())?;
        self.others.remove(&id);
        Some(id)
    }

    /// The containers, for look-ups by name.
    pub(super) fn snapshot(&self) -> Vec<Container> {
        self.containers.values().map(|known| known.container.clone()).collect()
    }
}
