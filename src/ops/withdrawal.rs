//! Withdraws what a runtime's own filter grants, and lets it hold again.

use crate::core::device::{Access, Number};
use crate::core::ledger::{Holder, Node, Withdrawal};
use crate::error::Result;
use crate::ops::Executor;
use crate::sys::process::is_gone;

impl Executor {
    /// Withdraws a container's right; what is withdrawn already stays so. Written down before the act, as grants are.
    pub fn withdraw(&mut self, holder: &Holder, number: Number) -> Result<()> {
        let is_new = !self.is_withdrawn(holder, number);
        if is_new {
            self.ledger.withdraw(&Withdrawal { holder: holder.clone(), number })?;
        }
        self.set_withdrawn(holder.cgroup_id, number, Withdrawal::ACCESS)?;
        if is_new {
            tracing::info!(container = holder.label(), device = %number, "withdrawn what it had from its start");
        }
        Ok(())
    }

    /// Lets a withdrawn right hold again.
    pub fn restore(&mut self, withdrawal: &Withdrawal) -> Result<()> {
        self.set_withdrawn(withdrawal.holder.cgroup_id, withdrawal.number, Access::NONE)?;
        self.ledger.restore(withdrawal)
    }

    /// Removes a node of an unplugged device that the container has from its start and that no grant tells of. What
    /// stays is of no use to it.
    pub fn remove_stale_node(&self, holder: &Holder, number: Number, path: &str) {
        if let Err(error) = self.remove_node(holder, number, &Node::at(path), &[]) {
            tracing::warn!(container = holder.label(), "{path} stays: {}", error.chain());
        }
    }

    /// Whether a container's right is withdrawn.
    pub fn is_withdrawn(&self, holder: &Holder, number: Number) -> bool {
        let is_it = |it: &Withdrawal| (it.holder.whose(), it.number) == (holder.whose(), number);
        self.ledger.withdrawn().iter().any(is_it)
    }

    /// Strikes what was withdrawn from containers that ended. One whose cgroup still has processes, which may be while
    /// its init is gone, has not.
    pub fn restore_ended(&mut self) {
        let has_ended = |holder: &Holder, executor: &Executor| {
            is_gone(holder.pid, holder.start_time) && executor.cgroups.processes_below(&holder.cgroup).is_empty()
        };
        for withdrawal in self.ledger.withdrawn().to_vec() {
            if has_ended(&withdrawal.holder, self)
                && let Err(error) = self.restore(&withdrawal)
            {
                tracing::error!("{}", error.chain());
            }
        }
    }

    /// Lets all that is withdrawn hold again. Goes on after failures and returns the first one.
    pub fn restore_all(&mut self) -> Result<()> {
        let withdrawals = self.ledger.withdrawn().to_vec();
        let mut result = Ok(());
        for withdrawal in &withdrawals {
            result = result.and(self.restore(withdrawal));
        }
        result
    }

    pub(super) fn set_withdrawn(&mut self, cgroup: u64, number: Number, access: Access) -> Result<()> {
        self.filter()?;
        let Executor { filter, cgroups, .. } = self;
        filter.as_mut().expect("it was just loaded").withdraw(cgroups, cgroup, number, access)
    }
}
