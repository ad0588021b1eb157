//! The running containers, with what they ask for and what they have.

use std::path::Path;

use crate::core::attachment::Attached;
use crate::core::container::Container;
use crate::core::info::ContainerInfo;
use crate::core::ledger::Entry;
use crate::core::settings::Settings;
use crate::error::Result;
use crate::ops::RUN_DIRECTORY;
use crate::ops::asks::rules_of;
use crate::ops::inspect::is_of;
use crate::ops::live::hold;
use crate::ops::persist::Persisted;
use crate::ops::store::{self, Store};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::host::require_fitness;

/// All of them, by name; what they ask for by this configuration.
pub fn containers(settings: &Settings, found: Vec<Container>) -> Result<Vec<ContainerInfo>> {
    require_fitness()?;
    let cgroups = CgroupRoot::find()?;
    let entries = Store::peek(Path::new(RUN_DIRECTORY), store::warn)?;
    let persisted = Persisted::look();
    let info = |container| info(&cgroups, settings, persisted.all(), &entries, container);
    let mut infos: Vec<ContainerInfo> = found.into_iter().map(info).collect();
    infos.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    Ok(infos)
}

fn info(
    cgroups: &CgroupRoot,
    settings: &Settings,
    attached: &[Attached],
    entries: &[Entry],
    container: Container,
) -> ContainerInfo {
    let (asks, _) = rules_of(settings, attached, &container);
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
