//! `qm-hotplug status`.

use crate::agent::client;
use crate::cli::output;
use crate::core::protocol::{Nothing, Request, StatusInfo};
use crate::error::Result;
use crate::ops::RUN_DIRECTORY;
use crate::ops::request::status;
use crate::ops::store::Store;
use crate::runtime;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::host::require_fitness;

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print it as a JSON object
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let status = match client::call(&Request::Status(Nothing {}))? {
        Some(status) => status,
        None => {
            require_fitness()?;
            let grants = Store::peek(RUN_DIRECTORY.as_ref())?.len();
            status(&CgroupRoot::find()?, runtime::scan().len(), grants, None)?
        }
    };
    if args.json { output::json(&status) } else { output::line(&text(&status)) }
}

fn text(status: &StatusInfo) -> String {
    let filter = match status.filter.as_str() {
        "degraded" => format!(
            "degraded: {} at the cgroup root runs after ours and may refuse what is granted",
            status.after.join(", ")
        ),
        "none" => "not loaded, since nothing is granted".to_owned(),
        other => other.to_owned(),
    };
    format!(
        "agent:      {}\nevents:     {}\nfilter:     {filter}\nentries:    {}\ncontainers: {}\ngrants:     {}",
        if status.agent { format!("running, version {}", status.version) } else { "not running".into() },
        status.events,
        status.entries,
        status.containers,
        status.grants
    )
}
