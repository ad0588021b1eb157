//! The kernel against the ledger: at the agent's start, whenever everything is compared, and with each sign of life.

use std::collections::BTreeMap;

use crate::core::device::{Access, Number};
use crate::core::ledger::{Entry, Holder, Withdrawal};
use crate::error::{Error, Result};
use crate::ops::Executor;
use crate::sys::device_filter;

type Rights = BTreeMap<(u64, Number), Access>;

impl Executor {
    /// Makes the filter's maps and the marks agree with the ledger. Entries that the ledger does not know were left by a
    /// process that was killed, or written by one that holds CAP_BPF: they are removed and reported.
    pub fn agree_with_ledger(&mut self) {
        // Looked up anew: somebody may have detached it.
        self.filter = None;
        let (mut granted, mut holders) = (Rights::new(), BTreeMap::<u64, Holder>::new());
        // What is left over has no right any more, at most a node.
        let counts = |entry: &&Entry| entry.left_over.is_none() && entry.grant.holder.has_filter();
        for entry in self.ledger.entries().filter(counts) {
            let grant = &entry.grant;
            let rights = granted.entry((grant.holder.cgroup_id, grant.device.number)).or_insert(Access::NONE);
            *rights = rights.union(grant.access);
            holders.insert(grant.holder.cgroup_id, grant.holder.clone());
        }
        for holder in holders.values() {
            if let Err(error) = self.mark(holder) {
                tracing::warn!("{}", error.chain());
            }
        }
        let withdrawn = self.ledger.withdrawn().iter();
        let withdrawn = withdrawn.map(|it| ((it.holder.cgroup_id, it.number), Withdrawal::ACCESS)).collect();
        if let Err(error) = self.agree(granted, withdrawn) {
            tracing::error!("{}", error.chain());
        }
    }

    fn agree(&mut self, granted: Rights, withdrawn: Rights) -> Result<()> {
        let failed = |error| Error::host::<std::io::Error>("read or change the device filter's maps")(error);
        for ((cgroup, number), access, before) in corrections(granted, self.filter()?.entries().map_err(failed)?) {
            if before.is_none() {
                tracing::warn!("cgroup {cgroup} had lost its access {access} to {number}, which is put back");
            } else {
                tracing::warn!("cgroup {cgroup} had access {before} to {number} that nobody granted");
            }
            self.filter()?.set(cgroup, number, access).map_err(failed)?;
        }
        for ((cgroup, number), access, before) in corrections(withdrawn, self.filter()?.withdrawn().map_err(failed)?) {
            tracing::warn!("cgroup {cgroup} had '{before}' on {number} withdrawn instead of '{access}': corrected");
            self.set_withdrawn(cgroup, number, access)?;
        }
        Ok(())
    }
}

/// What must be set so that the map holds what is expected: whose and on what, the rights, and those that it holds.
fn corrections(mut expected: Rights, found: Vec<device_filter::Entry>) -> Vec<((u64, Number), Access, Access)> {
    let mut corrections = Vec::new();
    for entry in found {
        let key = (entry.cgroup, entry.number);
        let right = expected.remove(&key).unwrap_or(Access::NONE);
        if right != entry.access {
            corrections.push((key, right, entry.access));
        }
    }
    corrections.extend(expected.into_iter().map(|(key, access)| (key, access, Access::NONE)));
    corrections
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::device::Kind;

    #[test]
    fn only_what_differs_is_corrected() {
        let number = |minor| Number { kind: Kind::Char, major: 188, minor };
        let entry = |minor, access| device_filter::Entry { cgroup: 1, number: number(minor), access };
        let expected = [((1, number(0)), Access::ALL), ((1, number(1)), Access::READ), ((1, number(2)), Access::READ)];
        let found = vec![entry(0, Access::ALL), entry(1, Access::ALL), entry(3, Access::WRITE)];
        assert_eq!(
            corrections(expected.into(), found),
            [
                ((1, number(1)), Access::READ, Access::ALL),
                ((1, number(3)), Access::NONE, Access::WRITE),
                ((1, number(2)), Access::READ, Access::NONE),
            ]
        );
        assert_eq!(corrections(expected.into(), expected.map(|((_, n), access)| entry(n.minor, access)).into()), []);
    }
}
