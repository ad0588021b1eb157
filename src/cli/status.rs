//! `qm-hotplug status`.

use crate::agent::client;
use crate::cli::output;
use crate::config;
use crate::core::info::StatusInfo;
use crate::core::protocol::{Nothing, Request};
use crate::error::Result;
use crate::ops::RUN_DIRECTORY;
use crate::ops::request::status;
use crate::ops::store::{self, Store};
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
            let grants = Store::peek(RUN_DIRECTORY.as_ref(), store::warn)?.len();
            let (_, configuration) = config::settings();
            StatusInfo { configuration, ..status(&CgroupRoot::find()?, runtime::scan().len(), grants, None)? }
        }
    };
    if args.json {
        return output::json(&status);
    }
    lines(&status).iter().try_for_each(|line| output::line(line))
}

fn lines(status: &StatusInfo) -> Vec<String> {
    let filter = match (status.filter.as_str(), status.grants) {
        ("degraded", _) => {
            let after = status.after.join(", ");
            format!("degraded: {after} at the cgroup root runs after ours and may refuse what is granted")
        }
        ("none", 0) => "not loaded, since nothing is granted".to_owned(),
        ("none", grants) => {
            format!("not attached, so {grants} grants do not hold: `systemctl restart qm-hotplug` puts it back")
        }
        (other, _) => other.to_owned(),
    };
    let agent = if status.agent { format!("running, version {}", status.version) } else { "not running".into() };
    let configuration = match (&*status.configuration, status.agent) {
        ([], _) => "read".to_owned(),
        (problems, true) => format!("not in force as it is written: {}", problems.join("; ")),
        (problems, false) => problems.join("; "),
    };
    vec![
        format!("agent:      {agent}"),
        format!("events:     {}", status.events),
        format!("filter:     {filter}"),
        format!("entries:    {}", status.entries),
        format!("withdrawn:  {}", status.withdrawn),
        format!("containers: {}", status.containers),
        format!("grants:     {}", status.grants),
        format!("config:     {configuration}"),
    ]
}
