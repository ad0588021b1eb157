//! Which rights that a runtime granted at a container's start are withdrawn, and which hold.

use std::collections::{BTreeSet, HashSet};

use crate::agent::registry::{Known, Registry};
use crate::core::device::{Device, Kind, Number};
use crate::core::ledger::{Grant, Holder, Origin, Withdrawal};
use crate::core::withdrawal::{self, Presence};
use crate::ops::Executor;
use crate::sys::{block, udev};

/// Withdraws what runtimes granted at a container's start where that is due, and lets it hold again where not: for the
/// containers and numbers that pass the test, of which `desired` has all grants. `gone` is a number whose device was just
/// unplugged.
pub(super) fn settle(
    executor: &mut Executor,
    registry: &Registry,
    desired: &[Grant],
    test: impl Fn(&Known, Number) -> bool,
    gone: Option<Number>,
) {
    executor.restore_ended();
    let granted: HashSet<_> = desired.iter().map(|grant| (grant.holder.whose(), grant.device.number)).collect();
    for known in registry.containers.values() {
        let (Some(holder), container) = (&known.holder, &known.container) else { continue };
        let numbers: BTreeSet<Number> = container.devices.iter().map(|(number, _)| *number).collect();
        for number in numbers.into_iter().filter(|number| test(known, *number)) {
            let paths = container.devices.iter().filter(|(its, _)| *its == number).map(|(_, path)| path.as_str());
            let paths: Vec<&str> = paths.collect();
            let presence = || match registry.devices.values().find(|device| device.number == number) {
                _ if gone == Some(number) => Presence::Gone,
                // Another one than was granted, perhaps; the host's own use of it comes first.
                Some(device) if !has_grant(executor, holder, number) && is_used_by_host(device) => Presence::Unclear,
                Some(device) => {
                    Presence::Here { node: &device.node, wanted: granted.contains(&(holder.whose(), number)) }
                }
                None if paths.iter().any(|path| udev::has_number(number, path)) => Presence::Unclear,
                None => Presence::Gone,
            };
            let is_withdrawn = executor.is_withdrawn(holder, number);
            let is_granted = has_grant(executor, holder, number);
            let due =
                withdrawal::is_due(&known.rules, &known.at_start, number, &paths, is_withdrawn || is_granted, presence);
            let result = match (due, is_withdrawn) {
                // Also what is withdrawn already: the act may have failed.
                (Some(true), _) => executor.withdraw(holder, number).map(|()| {
                    if !is_withdrawn && !is_granted {
                        paths.iter().for_each(|path| executor.remove_stale_node(holder, number, path));
                    }
                }),
                (Some(false), true) => executor.restore(&Withdrawal { holder: holder.clone(), number }),
                _ => Ok(()),
            };
            if let Err(error) = result {
                tracing::error!(container = holder.label(), device = %number, "{}", error.chain());
            }
            // Another device that it asks for has the number now, under another name: this one is not that device's.
            let is_here = due == Some(false) && gone != Some(number);
            for path in paths.iter().filter(|path| is_here && known.at_start.iter().any(|its| its == *path)) {
                let is_at = |grant: &Grant| grant.holder.is_same_run(holder) && grant.node.path == **path;
                let is_known =
                    desired.iter().any(is_at) || executor.ledger.of(&holder.id).any(|entry| is_at(&entry.grant));
                if !is_known {
                    executor.remove_stale_node(holder, number, path);
                }
            }
        }
    }
}

/// Whether the ledger holds a rule's grant of that number, which the container has from its start.
fn has_grant(executor: &Executor, holder: &Holder, number: Number) -> bool {
    executor.ledger.of(&holder.id).map(|entry| &entry.grant).any(|grant| {
        grant.at_start
            && grant.origin != Origin::Manual
            && grant.device.number == number
            && grant.holder.is_same_run(holder)
    })
}

fn is_used_by_host(device: &Device) -> bool {
    device.number.kind == Kind::Block && block::in_use(&device.node, device.number).is_some()
}
