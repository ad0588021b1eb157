//! `qm-hotplug status`.

use crate::agent::client;
use crate::cli::output;
use crate::config;
use crate::core::figures::Latency;
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

/// How many containers are named.
const SHOWN: usize = 10;

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
        ("override", _) => "override, last at the cgroup root".to_owned(),
        (other, _) => other.to_owned(),
    };
    let agent = match status.uptime {
        Some(seconds) => format!("running for {}, version {}", span(seconds), status.version),
        None if status.agent => format!("running, version {}", status.version),
        None => "not running".to_owned(),
    };
    let events = match (status.agent, status.lost) {
        (false, _) => status.events.clone(),
        (true, lost) => {
            let (events, seen, compared) = (&status.events, status.seen, status.compared);
            let lost = if lost == 0 { "none lost".to_owned() } else { format!("some lost {lost} times") };
            format!("{events}, {seen} since then, {lost}; all compared {compared} times")
        }
    };
    let shown = status.of_container.iter().take(SHOWN).map(|(name, count)| format!("{name} {count}"));
    let more = (status.of_container.len() > SHOWN).then(|| "…".to_owned());
    let grants = match &*shown.chain(more).collect::<Vec<_>>() {
        [] => status.grants.to_string(),
        all => format!("{}: {}", status.grants, all.join(", ")),
    };
    let configuration = match (&*status.configuration, status.agent) {
        ([], _) => "read".to_owned(),
        (problems, true) => format!("not in force as it is written: {}", problems.join("; ")),
        (problems, false) => problems.join("; "),
    };
    let mut lines = vec![
        format!("agent:      {agent}"),
        format!("events:     {events}"),
        format!("filter:     {filter}"),
        format!("entries:    {}", status.entries),
        format!("withdrawn:  {}", status.withdrawn),
        format!("containers: {}", status.containers),
        format!("grants:     {grants}"),
        format!("config:     {configuration}"),
    ];
    if let Some(Latency { count, p50, p90, p99, most }) = status.latency {
        let times = format!("{p50} µs median, {p90} 90 %, {p99} 99 %, {most} at most");
        lines.push(format!("granted:    {times} after the event, of the last {count}"));
    }
    lines
}

/// A time as a person says it: two units at most.
fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}
