//! The running containers, with what they ask for and what they have.

use std::path::Path;

use crate::core::annotation::rules;
use crate::core::container::Container;
use crate::core::info::ContainerInfo;
use crate::core::ledger::Entry;
use crate::core::settings::Settings;
use crate::error::Result;
use crate::ops::RUN_DIRECTORY;
use crate::ops::inspect::is_of;
use crate::ops::live::{hold, subject};
use crate::ops::store::{self, Store};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::host::require_fitness;

/// All of them, by name; what they ask for by this configuration.
pub fn containers(settings: &Settings, found: Vec<Container>) -> Result<Vec<ContainerInfo>> {
    require_fitness()?;
    let cgroups = CgroupRoot::find()?;
    let entries = Store::peek(Path::new(RUN_DIRECTORY), store::warn)?;
    let mut infos: Vec<ContainerInfo> =
        found.into_iter().map(|container| info(&cgroups, settings, &entries, container)).collect();
    infos.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    Ok(infos)
}

fn info(cgroups: &CgroupRoot, settings: &Settings, entries: &[Entry], container: Container) -> ContainerInfo {
    let mut asks = settings.rules_for(&subject(&container, None, false));
    asks.extend(rules(container.annotations(), &settings.categories).0);
    let held = hold(cgroups, &container);
    let its = entries.iter().filter(|entry| is_of(entry, &container) && entry.left_over.is_none());
    ContainerInfo {
        cgroup: held.as_ref().ok().map(|holder| holder.cgroup.clone()),
        problem: held.err().map(|error| error.chain()),
        asks: asks.iter().map(ToString::to_string).collect(),
        has: its.map(|entry| entry.grant.node.path.clone()).collect(),
        name: container.name,
        id: container.id,
        runtime: container.runtime.to_string(),
        pid: container.pid,
    }
}
