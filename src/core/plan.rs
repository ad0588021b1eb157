//! Desired minus observed, as changes; each change as steps, each step with its inverse.
//!
//! A change is one grant or one revocation, carried out whole or not at all. Its steps are computed from the ledger as
//! it is when its turn comes, because a change before it may have failed.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::core::device::{Access, Number};
use crate::core::ledger::{Entry, Grant, Holder, Node, Origin, Placement};

/// One grant to make, or one to take back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Put it into force.
    Add(Grant),
    /// Take it back.
    Remove {
        /// The grant, with what was made for it.
        entry: Entry,
        /// Whether its device is unplugged: then a node that the container had from its start is stale, and goes too.
        unplugged: bool,
    },
}

/// The smallest act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write the grant into the ledger, before anything is done for it.
    Record(Entry),
    /// Write into the ledger that it is taken back, before anything of it is.
    Leave(Entry),
    /// Strike it from the ledger, after everything of it is gone.
    Forget(Entry),
    /// Put the mark into first place on the holder's cgroup.
    Mark(Holder),
    /// Remove the mark.
    Unmark(Holder),
    /// Change the rights of the holder's cgroup.
    Allow {
        /// Whose.
        holder: Holder,
        /// On what.
        number: Number,
        /// Before this step.
        before: Access,
        /// After it.
        after: Access,
    },
    /// Make the node.
    MakeNode(Grant),
    /// Remove the node, and the directories made for it.
    RemoveNode {
        /// Whose node.
        grant: Grant,
        /// Outermost first.
        directories: Vec<String>,
    },
}

/// As `--dry-run` tells it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Record(_) => f.write_str("write the grant into the ledger"),
            Step::Leave(_) => f.write_str("write into the ledger that it goes"),
            Step::Forget(_) => f.write_str("strike it from the ledger"),
            Step::Mark(holder) => write!(f, "mark the cgroup {}", holder.cgroup),
            Step::Unmark(holder) => write!(f, "take the mark from the cgroup {}", holder.cgroup),
            Step::Allow { number, before, after, .. } if before == after => {
                write!(f, "leave the right on {number} in the device filter as it is, {after}")
            }
            Step::Allow { number, after, .. } if after.is_none() => {
                write!(f, "take the right on {number} out of the device filter")
            }
            Step::Allow { number, after, .. } => write!(f, "allow {after} on {number} in the device filter"),
            Step::MakeNode(grant) => {
                let Node { path, uid, gid, mode, link_to } = &grant.node;
                match link_to {
                    Some(target) => write!(f, "make the link {path} to {target}"),
                    None => write!(f, "make the node {path} of {}, {mode:04o} {uid}:{gid}", grant.device.number),
                }
            }
            Step::RemoveNode { grant, directories } => {
                write!(f, "remove the node {}", grant.node.path)?;
                directories.last().map_or(Ok(()), |last| write!(f, ", and {last} if it is empty"))
            }
        }
    }
}

impl Step {
    /// The step that takes this one back.
    pub fn inverse(&self) -> Step {
        match self.clone() {
            Step::Record(entry) => Step::Forget(entry),
            Step::Leave(entry) | Step::Forget(entry) => Step::Record(entry),
            Step::Mark(holder) => Step::Unmark(holder),
            Step::Unmark(holder) => Step::Mark(holder),
            Step::Allow { holder, number, before, after } => {
                Step::Allow { holder, number, before: after, after: before }
            }
            Step::MakeNode(grant) => Step::RemoveNode { grant, directories: Vec::new() },
            Step::RemoveNode { grant, .. } => Step::MakeNode(grant),
        }
    }
}

/// What must change so that `desired` is in force and nothing else. Removals come first: a number or a path that
/// changes hands is free before the next one takes it. Of two grants for one path of one container the first counts.
/// `unplugged` says whether the device of an entry is gone.
pub fn changes(desired: &[Grant], observed: &[Entry], unplugged: impl Fn(&Entry) -> bool) -> Vec<Change> {
    let place = |grant: &Grant| {
        let Holder { id, pid, start_time, .. } = &grant.holder;
        (id.clone(), *pid, *start_time, grant.node.path.clone())
    };
    let mut wanted: HashMap<_, Vec<&Grant>> = HashMap::new();
    desired.iter().for_each(|grant| wanted.entry(place(grant)).or_default().push(grant));
    let (mut kept, mut changes) = (HashSet::new(), Vec::new());
    for entry in observed {
        // A rule's node follows the host's owner and mode, which udev's rules may set late.
        let fits = |grant: &&Grant| {
            grant.is_same(&entry.grant) && grant.node == entry.grant.node && grant.exclusive == entry.grant.exclusive
        };
        let place = place(&entry.grant);
        if entry.is_settled() && wanted.get(&place).is_some_and(|all| all.iter().any(fits)) {
            kept.insert(place);
        } else {
            changes.push(Change::Remove { entry: entry.clone(), unplugged: unplugged(entry) });
        }
    }
    changes.extend(desired.iter().filter(|grant| kept.insert(place(grant))).cloned().map(Change::Add));
    changes
}

impl Change {
    /// What is made or taken back.
    pub fn grant(&self) -> &Grant {
        match self {
            Change::Add(grant) => grant,
            Change::Remove { entry, .. } => &entry.grant,
        }
    }

    /// The steps of this change, given what the ledger holds before it, at least of the grant's cgroup.
    pub fn steps<'a>(&self, ledger: impl Iterator<Item = &'a Entry> + Clone) -> Vec<Step> {
        match self {
            Change::Add(grant) => {
                let (number, before) = (grant.device.number, rights(ledger.clone(), grant, None));
                let after = before.union(grant.access);
                let mut steps = vec![Step::Record(Entry::pending(grant.clone()))];
                if grant.holder.has_filter() {
                    if !ledger.clone().any(|other| other.grant.holder.whose() == grant.holder.whose()) {
                        steps.push(Step::Mark(grant.holder.clone()));
                    }
                    // The right first: a node that is seen can be opened.
                    steps.push(Step::Allow { holder: grant.holder.clone(), number, before, after });
                }
                steps.push(Step::MakeNode(grant.clone()));
                steps
            }
            Change::Remove { entry, unplugged } => {
                let grant = &entry.grant;
                let number = grant.device.number;
                let before = rights(ledger.clone(), grant, None);
                let after = rights(ledger.clone(), grant, Some(entry));
                let mut steps = vec![Step::Leave(entry.clone())];
                // The right first: whatever the container does to keep its node, it cannot open it any more.
                if grant.holder.has_filter() {
                    steps.push(Step::Allow { holder: grant.holder.clone(), number, before, after });
                }
                match &entry.placement {
                    Placement::Ours(directories) | Placement::Making(directories) => {
                        steps.push(Step::RemoveNode { grant: grant.clone(), directories: directories.clone() });
                    }
                    Placement::Pending => {
                        steps.push(Step::RemoveNode { grant: grant.clone(), directories: Vec::new() })
                    }
                    Placement::Container if *unplugged && matches!(grant.origin, Origin::Rule(_)) => {
                        steps.push(Step::RemoveNode { grant: grant.clone(), directories: Vec::new() });
                    }
                    Placement::Container | Placement::Host => {}
                }
                let others = |other: &&Entry| *other != entry && other.grant.holder.whose() == grant.holder.whose();
                if grant.holder.has_filter() && !ledger.clone().any(|other| others(&other)) {
                    steps.push(Step::Unmark(grant.holder.clone()));
                }
                steps.push(Step::Forget(entry.leaving()));
                steps
            }
        }
    }
}

/// The rights that the ledger's entries give the grant's cgroup on its device, leaving one entry out: two nodes may
/// stand for one device. What is left over gives none.
fn rights<'a>(ledger: impl Iterator<Item = &'a Entry>, grant: &Grant, without: Option<&Entry>) -> Access {
    ledger
        .filter(|entry| Some(*entry) != without && entry.left_over.is_none())
        .filter(|entry| {
            entry.grant.holder.whose() == grant.holder.whose() && entry.grant.device.number == grant.device.number
        })
        .fold(Access::NONE, |all, entry| all.union(entry.grant.access))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(crate) mod tests;
