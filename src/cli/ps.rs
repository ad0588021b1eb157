//! `qm-hotplug ps`.

use crate::cli::{look, output};
use crate::config;
use crate::core::container::short_id;
use crate::core::info::ContainerInfo;
use crate::core::protocol::{Nothing, Request};
use crate::error::Result;
use crate::ops::containers::containers;
use crate::runtime;

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print an array of containers as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let found: Vec<ContainerInfo> = look(&Request::Containers(Nothing {}), "containers", || {
        containers(&config::settings_or_warn(), runtime::scan())
    })?;
    if args.json {
        return output::json(&found);
    }
    let or_dash = |all: &[String]| if all.is_empty() { "-".into() } else { all.join(" ") };
    let rows = found.iter().map(|container| {
        vec![
            container.name.clone().unwrap_or_else(|| "-".into()),
            short_id(&container.id).to_owned(),
            container.runtime.clone(),
            container.pid.to_string(),
            or_dash(&container.asks),
            or_dash(&container.has),
            container.problem.clone().unwrap_or_default(),
        ]
    });
    output::table(&["NAME", "ID", "RUNTIME", "PID", "ASKS FOR", "HAS", "PROBLEM"], rows)
}
