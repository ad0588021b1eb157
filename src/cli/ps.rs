//! `qm-hotplug ps`.

use serde::Serialize;

use crate::cli::output;
use crate::config;
use crate::core::annotation::rules;
use crate::core::container::{Container, Runtime};
use crate::core::settings::Settings;
use crate::error::Result;
use crate::ops::live::{hold, subject};
use crate::runtime;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::host::require_fitness;

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print an array of containers as JSON
    #[arg(long)]
    json: bool,
}

/// A container as it is told to people and programs. The field names are stable.
#[derive(Debug, Serialize)]
struct ContainerInfo {
    name: Option<String>,
    id: String,
    runtime: Runtime,
    pid: u32,
    /// Its own cgroup, where it can be worked on.
    cgroup: Option<String>,
    /// The rules by which it asks for devices, by name: categories, seats, selectors, and those of the configuration.
    asks: Vec<String>,
    /// Why it cannot be worked on.
    problem: Option<String>,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    require_fitness()?;
    let cgroups = CgroupRoot::find()?;
    let settings = config::settings_or_warn();
    let mut containers: Vec<ContainerInfo> =
        runtime::scan().into_iter().map(|container| info(&cgroups, &settings, container)).collect();
    containers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    if args.json {
        return output::json(&containers);
    }
    let rows = containers.iter().map(|container| {
        vec![
            container.name.clone().unwrap_or_else(|| "-".into()),
            crate::core::container::short_id(&container.id).to_owned(),
            container.runtime.to_string(),
            container.pid.to_string(),
            if container.asks.is_empty() { "-".into() } else { container.asks.join(" ") },
            container.problem.clone().unwrap_or_default(),
        ]
    });
    output::table(&["NAME", "ID", "RUNTIME", "PID", "ASKS FOR", "PROBLEM"], rows)
}

fn info(cgroups: &CgroupRoot, settings: &Settings, container: Container) -> ContainerInfo {
    let mut asks = settings.rules_for(&subject(&container, None, false));
    asks.extend(rules(container.annotations(), &settings.categories).0);
    let held = hold(cgroups, &container);
    ContainerInfo {
        cgroup: held.as_ref().ok().map(|holder| holder.cgroup.clone()),
        problem: held.err().map(|error| error.chain()),
        asks: asks.iter().map(ToString::to_string).collect(),
        name: container.name,
        id: container.id,
        runtime: container.runtime,
        pid: container.pid,
    }
}
