//! What the ledger does not know any more, found out from what is in force. The agent compares everything at its start:
//! first what rules ask for and have becomes theirs again; what is unknown then and belongs to a page that was lost, goes.

use std::collections::BTreeMap;

use crate::core::container::{Container, Reference};
use crate::core::device::{Access, Number};
use crate::core::ledger::{Entry, Grant, Holder, Placement};
use crate::error::{Error, Result};
use crate::ops::Executor;
use crate::ops::live::{hold, lookup, process_of};
use crate::sys::held::Held;
use crate::sys::namespace::{Inside, inside};
use crate::sys::{node, stray};

/// Rights by cgroup and device.
type Rights = BTreeMap<(u64, Number), Access>;

impl Executor {
    /// Takes grants into the ledger that rules ask for and that are in force without it: the container's right is in the
    /// filter, and the node stands there as it would be made. What the container's specification names is its own.
    pub fn adopt(&mut self, desired: &[Grant]) -> Result<()> {
        let unknown = self.unknown()?;
        for grant in desired.iter().filter(|grant| !grant.at_start) {
            let right = unknown.get(&(grant.holder.cgroup_id, grant.device.number));
            let has_right = match grant.holder.has_filter() {
                true => right.is_some_and(|access| access.union(grant.access) == *access),
                // The node is the right.
                false => Held::of(grant.holder.pid, grant.holder.start_time).file(&grant.node.path).exists(),
            };
            if !has_right || self.has_entry_at(grant) {
                continue;
            }
            let (holder, number, node) = (&grant.holder, grant.device.number, grant.node.clone());
            match self.visit(holder, move |inside| node::stands(inside, number, &node)) {
                Ok(Some(true)) => {
                    tracing::info!(container = holder.label(), device = %number, "{} is known again", grant.node.path);
                    let placement = Placement::Ours(directories(&grant.node.path));
                    self.ledger.record(Entry { grant: grant.clone(), placement, left_over: None })?;
                }
                Ok(_) => {}
                Err(error) => tracing::warn!("{}", error.chain()),
            }
        }
        Ok(())
    }

    fn has_entry_at(&self, grant: &Grant) -> bool {
        let is_at = |its: &Grant| its.holder.is_same_run(&grant.holder) && its.node.path == grant.node.path;
        self.ledger.of(&grant.holder.id).any(|entry| is_at(&entry.grant))
    }

    /// Of containers whose page was lost: takes back the rights that nobody asks for, with nodes of these devices, links to
    /// them and the mark. A person may have attached them, and has to do that again.
    pub fn sweep(&mut self, containers: &[Container]) {
        let unknown = match self.unknown() {
            Ok(unknown) => unknown,
            Err(error) => return tracing::error!("what is left of a lost ledger stays: {}", error.chain()),
        };
        let mut is_settled = true;
        for id in self.ledger.lost().to_vec() {
            let found = Reference::parse(&id).map_err(Error::Usage).and_then(|name| lookup(containers, &name));
            let result = match found.and_then(|container| Ok((hold(&self.cgroups, &container)?, container))) {
                Ok((holder, container)) => self.sweep_one(&holder, &container, &unknown),
                Err(Error::NoSuchContainer(_) | Error::ContainerExited(_)) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                tracing::error!("what is left of a lost ledger stays: {}", error.chain());
                is_settled = false;
            }
        }
        // Else they are gone through once more the next time.
        if is_settled {
            self.ledger.found();
        }
    }

    fn sweep_one(&mut self, holder: &Holder, container: &Container, unknown: &Rights) -> Result<()> {
        for ((_, number), access) in unknown.iter().filter(|((cgroup, _), _)| *cgroup == holder.cgroup_id) {
            let number = *number;
            self.allow(holder, number, Access::NONE)?;
            let is_its_own = container.names(number);
            let removed = match is_its_own {
                true => Vec::new(),
                false => self.visit(holder, move |inside| stray::remove(inside, number))?.unwrap_or_default(),
            };
            let nodes = if removed.is_empty() { "no node".to_owned() } else { removed.join(" and ") };
            tracing::warn!(
                container = holder.label(), device = %number,
                "access {access} that no ledger tells of is taken back, with {nodes}"
            );
        }
        let has_grants = self.ledger.sharing(holder).next().is_some();
        if has_grants { Ok(()) } else { self.unmark(holder) }
    }

    /// Rights in the filter on devices that the ledger knows no grant of, in their cgroup.
    fn unknown(&mut self) -> Result<Rights> {
        let failed = |error| Error::host::<std::io::Error>("read the device filter's maps")(error);
        let mut all: BTreeMap<_, _> = self
            .filter()?
            .entries()
            .map_err(failed)?
            .into_iter()
            .map(|it| ((it.cgroup, it.number), it.access))
            .collect();
        for Entry { grant, .. } in self.ledger.entries() {
            all.remove(&(grant.holder.cgroup_id, grant.device.number));
        }
        Ok(all)
    }

    /// `None` where the container has ended.
    fn visit<T: Send + 'static>(
        &self,
        holder: &Holder,
        work: impl FnOnce(Inside<'_>) -> T + Send + 'static,
    ) -> Result<Option<T>> {
        let process = match process_of(holder) {
            Err(Error::ContainerExited(_)) => return Ok(None),
            process => process?,
        };
        match inside(holder.label(), &process, self.host, work) {
            Err(Error::ContainerExited(_)) => Ok(None),
            result => result.map(Some),
        }
    }
}

/// The directories that may have been made for a node: those in `/dev`, which a runtime fills. They go when they are empty.
pub(super) fn directories(path: &str) -> Vec<String> {
    let ends = path.match_indices('/').map(|(at, _)| at);
    ends.map(|end| path[..end].to_owned()).filter(|directory| directory.starts_with("/dev/")).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn directories_in_dev_outermost_first() {
        assert_eq!(super::directories("/dev/a/b/stick"), ["/dev/a", "/dev/a/b"]);
        assert!(super::directories("/dev/stick").is_empty() && super::directories("/opt/a/stick").is_empty());
    }
}
