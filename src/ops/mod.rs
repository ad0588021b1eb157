//! Carries out changes: the steps of [`crate::core::plan`] on the kernel and on the ledger. What fails is taken back.

mod agreement;
pub(crate) mod asks;
pub mod containers;
pub mod devices;
pub mod doctor;
pub mod explain;
mod files;
mod inspect;
pub mod intention;
pub mod live;
pub mod mirror;
mod mirrors;
pub mod persist;
mod rebuild;
pub mod request;
pub mod store;
pub mod verify;
pub(crate) mod view;
mod whole;
mod withdrawal;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::core::device::{Access, Number};
use crate::core::ledger::{Entry, Grant, Holder, Node, Origin, Placement};
use crate::core::plan::{Change, Step};
use crate::error::{Error, Result};
use crate::failpoint::reached;
use crate::ops::live::process_of;
use crate::ops::mirrors::Mirrors;
use crate::ops::persist::Persisted;
use crate::ops::store::Store;
use crate::sys::cgroup::{Cgroup, CgroupRoot};
use crate::sys::device_filter::DeviceFilter;
use crate::sys::held::{self, Held};
use crate::sys::host::{Host, require_fitness};
use crate::sys::namespace::inside;
use crate::sys::node::{self, Before, Made, NodeError};
use crate::sys::process;

/// Where the ledger, its lock and the agent's socket are.
pub const RUN_DIRECTORY: &str = "/run/qm-hotplug";

/// The one who changes things: there is one at a time on a host, the holder of the ledger's lock.
pub struct Executor {
    /// The cgroup2 root.
    pub cgroups: CgroupRoot,
    /// Facts about the host.
    pub host: Host,
    /// The ledger.
    pub ledger: Store,
    /// What was attached for good.
    pub persisted: Persisted,
    filter: Option<DeviceFilter>,
    mirrors: Mirrors,
}

impl Executor {
    /// Checks that this process is fit, takes the lock and reads the ledger; `None` while another process has the lock.
    /// The device filter is loaded when it is first needed.
    pub fn open() -> Result<Option<Executor>> {
        require_fitness()?;
        let cgroups = CgroupRoot::find()?;
        let host = Host::observe()?;
        let ledger = Store::open(Path::new(RUN_DIRECTORY))?;
        let executor = |ledger: Store| {
            let (persisted, mirrors) = (Persisted::take_over(), Mirrors::load());
            let executor = Executor { cgroups, host, ledger, persisted, filter: None, mirrors };
            // Else the agent finds out first what is known again.
            if executor.ledger.lost().is_empty() {
                executor.end_unknown();
            }
            executor
        };
        Ok(ledger.map(executor))
    }

    /// The device filter, loaded and attached if it is not yet.
    pub fn filter(&mut self) -> Result<&DeviceFilter> {
        if self.filter.is_none() {
            self.filter = Some(DeviceFilter::open(&self.cgroups)?);
        }
        Ok(self.filter.as_ref().expect("it was just put there"))
    }

    /// Carries out a change whole or not at all. For a grant that was made, returns whose node it has.
    ///
    /// What cannot even be taken back stays in the ledger as left over, and the error says so.
    pub fn carry_out(&mut self, change: &Change) -> Result<Placement> {
        let change = &self.with_directories(change)?;
        let mut undo: Vec<Step> = Vec::new();
        let mut placement = Placement::Pending;
        for step in change.steps(self.ledger.sharing(&change.grant().holder)) {
            match self.execute(&step) {
                Ok(Some(made)) => {
                    if let Step::MakeNode(grant) = &step
                        && let Placement::Ours(directories) = &made
                    {
                        undo.push(Step::RemoveNode { grant: grant.clone(), directories: directories.clone() });
                    }
                    placement = made;
                }
                Ok(None) => undo.push(step.inverse()),
                Err(first) => return Err(self.take_back(undo, change, first)),
            }
        }
        if let Change::Add(_) = change {
            reached("grant: done, and not settled");
        }
        if let Change::Add(grant) = change
            && let Err(first) = self.ledger.settle(grant, placement.clone())
        {
            return Err(self.take_back(undo, change, first));
        }
        Ok(placement)
    }

    /// For a removal: the entry as the ledger has it now. The directories that were made for it and that hold other
    /// nodes of ours are these nodes' from now on: the last one takes them along.
    fn with_directories(&mut self, change: &Change) -> Result<Change> {
        let Change::Remove { entry, unplugged } = change else { return Ok(change.clone()) };
        let entry =
            self.ledger.of(&entry.grant.holder.id).find(|its| its.grant.is_same(&entry.grant)).unwrap_or(entry).clone();
        if let Placement::Ours(directories) = &entry.placement
            && !directories.is_empty()
        {
            self.ledger.hand_on(&entry.grant, directories)?;
        }
        Ok(Change::Remove { entry, unplugged: *unplugged })
    }

    /// Takes back what was done. A removal is not undone (its node may be gone for good): it stays recorded as left over.
    fn take_back(&mut self, undo: Vec<Step>, change: &Change, first: Error) -> Error {
        let grant = match change {
            Change::Add(grant) => grant,
            Change::Remove { entry, .. } => {
                self.ledger.mark_left_over(&entry.grant, &first.chain());
                return first;
            }
        };
        for step in undo.into_iter().rev() {
            if let Err(error) = self.execute(&step) {
                self.ledger.mark_left_over(grant, &error.chain());
                return Error::Undo {
                    first: Box::new(first),
                    undo: Box::new(error),
                    container: grant.holder.label().to_owned(),
                    device: grant.device.number,
                };
            }
        }
        first
    }

    /// One step. `Some` where it settled whose node a grant has.
    fn execute(&mut self, step: &Step) -> Result<Option<Placement>> {
        tracing::trace!(?step, "step");
        match step {
            Step::Record(entry) => self.record(entry)?,
            Step::Leave(entry) => self.ledger.leave(&entry.grant)?,
            Step::Forget(entry) => self.ledger.forget(&entry.grant)?,
            Step::Mark(holder) => self.mark(holder)?,
            Step::Unmark(holder) => self.unmark(holder)?,
            Step::Allow { holder, number, before, after } => {
                // More than before is for those only whose cgroup is still there.
                if before.union(*after) != *before {
                    self.cgroup_of(holder)?;
                }
                self.allow(holder, *number, *after)?;
            }
            Step::MakeNode(grant) => return self.make_node(grant).map(Some),
            Step::RemoveNode { grant, directories } => {
                self.remove_node(&grant.holder, grant.device.number, &grant.node, directories)?
            }
        }
        Ok(None)
    }

    /// Puts the mark into first place on the holder's cgroup, also where a runtime's update has detached it.
    ///
    /// A filter that cannot be copied (it uses maps) keeps the mark out: then the grant holds for tasks in the cgroup
    /// itself, not below, and that is logged.
    pub fn mark(&mut self, holder: &Holder) -> Result<()> {
        if !holder.has_filter() {
            return Ok(());
        }
        let cgroup = self.cgroup_of(holder)?;
        if let Err(error) = self.filter()?.mark(&cgroup) {
            tracing::warn!(
                container = holder.label(),
                "no mark on cgroup {}: {error}: the grant holds in that cgroup itself, not in those below",
                holder.cgroup
            );
        }
        Ok(())
    }

    fn unmark(&mut self, holder: &Holder) -> Result<()> {
        // Where the cgroup is gone, or goes meanwhile, its programs go with it.
        let Ok(cgroup) = self.cgroup_of(holder) else { return Ok(()) };
        match self.filter()?.unmark(&cgroup) {
            Err(_) if self.cgroup_of(holder).is_err() => Ok(()),
            result => {
                result.map_err(in_container(holder.label(), format!("remove the mark from cgroup {}", holder.cgroup)))
            }
        }
    }

    fn cgroup_of(&self, holder: &Holder) -> Result<Cgroup> {
        match self.cgroups.open(&holder.cgroup) {
            Ok(cgroup) if cgroup.id == holder.cgroup_id => Ok(cgroup),
            _ if process::is_gone(holder.pid, holder.start_time) => {
                Err(Error::ContainerExited(holder.label().to_owned()))
            }
            _ => Err(Error::Refused {
                container: holder.label().to_owned(),
                reason: format!("its cgroup {} is gone, so it has no rights of its own: start it anew", holder.cgroup),
            }),
        }
    }

    fn allow(&mut self, holder: &Holder, number: Number, access: Access) -> Result<()> {
        let mut result = self.filter()?.set(holder.cgroup_id, number, access);
        if let Err(error) = &result
            && error.kind() == std::io::ErrorKind::ArgumentListTooLong
            && let Some(filter) = self.filter.take()
        {
            tracing::info!("the device filter's map is full: moving to one of twice the size");
            result = self.filter.insert(filter.grow(&self.cgroups)?).set(holder.cgroup_id, number, access);
        }
        result.map_err(in_container(holder.label(), format!("change the rights on {number} in the device filter")))
    }

    /// Writes a grant down, with what there is at its path before anything is done: what was there is not taken for ours
    /// after a crash, and directories that were not are.
    fn record(&mut self, entry: &Entry) -> Result<()> {
        let mut entry = entry.clone();
        let Grant { holder, device, node, .. } = &entry.grant;
        if entry.placement == Placement::Pending {
            let process = process_of(holder)?;
            let (number, wanted) = (device.number, node.clone());
            let before = inside(holder.label(), &process, self.host, move |it| node::before(it, number, &wanted))?;
            entry.placement = match before {
                Before::There => Placement::Container,
                Before::Missing { directories } if directories.is_empty() => Placement::Pending,
                Before::Missing { directories } => Placement::Making(directories),
            };
        }
        self.ledger.record(entry)
    }

    /// On failure, nothing that may have been made opens.
    fn make_node(&mut self, grant: &Grant) -> Result<Placement> {
        let result = self.try_to_make_node(grant);
        let is_other = |entry: &Entry| !entry.grant.is_same(grant) && entry.is_settled();
        let mut at_its_path = self
            .ledger
            .of(&grant.holder.id)
            .filter(|entry| entry.grant.holder.is_same_run(&grant.holder) && entry.grant.node.path == grant.node.path);
        if result.is_err() && !at_its_path.any(is_other) {
            self.end_file(&grant.holder, grant.device.number, &grant.node)?;
        }
        result
    }

    fn try_to_make_node(&mut self, grant: &Grant) -> Result<Placement> {
        let holder = &grant.holder;
        let process = process_of(holder)?;
        // Only a rule may take the place of a node that an unplugged device left: what a person typed may be a slip.
        let replace = matches!(grant.origin, Origin::Rule(_));
        let (number, wanted) = (grant.device.number, grant.node.clone());
        let made =
            inside(holder.label(), &process, self.host, move |inside| node::make(inside, number, &wanted, replace))?
                .map_err(|error| node_error(holder, error))?;
        Ok(match made {
            Made::Ours { directories } => Placement::Ours(directories),
            Made::Containers => Placement::Container,
            Made::Hosts => Placement::Host,
        })
    }

    /// Makes a node in a container with a user namespace useless, wherever the container has it. Says whether it was ours.
    fn end_file(&self, holder: &Holder, number: Number, node: &Node) -> Result<bool> {
        let held = Held::of(holder.pid, holder.start_time);
        let what = || format!("take back the node {}, which is {}", node.path, held.file(&node.path).display());
        held.end(&node.path, number).map_err(|error| in_container(holder.label(), what())(error))
    }

    /// Makes useless what is held of nodes that the ledger does not know.
    pub fn end_unknown(&self) {
        let ours = self.ledger.entries().filter(|it| !matches!(it.placement, Placement::Container | Placement::Host));
        let file = |grant: &Grant| Held::of(grant.holder.pid, grant.holder.start_time).file(&grant.node.path);
        let kept: HashSet<PathBuf> = ours.map(|entry| file(&entry.grant)).collect();
        if let Err(error) = held::sweep(|file| kept.contains(file)) {
            tracing::error!("nodes that no ledger tells of stay: {error}");
        }
    }

    fn remove_node(&self, holder: &Holder, number: Number, node: &Node, directories: &[String]) -> Result<()> {
        // First of all: the container may have done anything with it, and one that ended may have left it to somebody.
        let is_useless = node.link_to.is_none() && self.end_file(holder, number, node)?;
        let process = match process_of(holder) {
            Err(Error::ContainerExited(_)) if process::is_gone(holder.pid, holder.start_time) => return Ok(()),
            // Its user has made another one of it.
            Err(error @ Error::Refused { .. }) if holder.user != 0 => {
                let how = if is_useless { ", and is of no use" } else { "" };
                tracing::warn!(container = holder.label(), "{} stays{how}: {}", node.path, error.chain());
                return Ok(());
            }
            process => process?,
        };
        let (its_node, its_directories) = (node.clone(), directories.to_vec());
        let removed = match inside(holder.label(), &process, self.host, move |inside| {
            node::remove(inside, number, &its_node, &its_directories)
        }) {
            Ok(removed) => removed,
            Err(Error::ContainerExited(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        match removed {
            Ok(true) => Ok(()),
            Ok(false) => {
                tracing::debug!(container = holder.label(), "{} was already gone or is another node now", node.path);
                Ok(())
            }
            Err(error) => Err(node_error(holder, error)),
        }
    }

    /// Takes every grant back. Goes on after failures and returns the first one.
    pub fn revoke_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        for entry in self.ledger.entries().cloned().collect::<Vec<_>>() {
            if let Err(error) = self.carry_out(&Change::Remove { entry, unplugged: false }) {
                tracing::error!("{}", error.chain());
                result = result.and(Err(error));
            }
        }
        self.hide_all();
        result.and(self.restore_all())
    }

    /// Takes everything of ours out of the kernel.
    pub fn release_filter(&mut self) -> Result<()> {
        self.filter = None;
        DeviceFilter::release(&self.cgroups)
    }

    /// Leaves nothing in the kernel once the last grant is gone and no agent needs it.
    pub fn release_if_unused(&mut self) -> Result<()> {
        let unused = self.ledger.entries().next().is_none() && self.ledger.withdrawn().is_empty();
        // One that was killed may have left it.
        if unused && DeviceFilter::existing(&self.cgroups)?.is_some() { self.release_filter() } else { Ok(()) }
    }
}

/// For `map_err` on a call for a container.
fn in_container(container: &str, what: String) -> impl FnOnce(std::io::Error) -> Error {
    let container = container.to_owned();
    move |source| Error::InContainer { container, what, source }
}

fn node_error(holder: &Holder, error: NodeError) -> Error {
    match error {
        NodeError::Refused(reason) => Error::Refused { container: holder.label().to_owned(), reason },
        NodeError::Failed { what, source } => in_container(holder.label(), what)(source),
    }
}
