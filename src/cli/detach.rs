//! `qm-hotplug detach`.

use clap_complete::ArgValueCompleter;

use crate::agent::client;
use crate::cli::complete::{containers_and_kept, granted};
use crate::cli::{Done, change, dry_run, output};
use crate::core::protocol::{Detach, Grants, Request};
use crate::error::Result;
use crate::ops::intention::steps_of_detach;
use crate::ops::persist::Persisted;
use crate::{ops, runtime};

/// Arguments of `detach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Container: name, id, ENGINE:NAME or pid:N
    #[arg(value_name = "CTR", add = ArgValueCompleter::new(containers_and_kept))]
    container: String,
    /// Path of the node in the container, or of the device on the host
    #[arg(value_name = "DEV|DEST", add = ArgValueCompleter::new(granted))]
    device: String,
    /// Print what would be done, and do nothing
    #[arg(long, conflicts_with = "json")]
    dry_run: bool,
    /// Print the grants that are gone as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let request = Detach { container: args.container, device: args.device };
    if args.dry_run {
        let agent = client::is_there();
        return dry_run(|entries, containers| {
            steps_of_detach(entries, &Persisted::look(), containers, &request, agent)
        });
    }
    let here = |executor: &mut ops::Executor| {
        ops::request::detach(executor, &runtime::scan(), &request, false).map(|grants| Grants { grants })
    };
    let (Done::ByAgent(Grants { grants: gone }) | Done::Here(Grants { grants: gone })) =
        change(&Request::Detach(request.clone()), here)?;
    if args.json {
        return output::json(&gone);
    }
    for grant in gone {
        let note = grant.note.map(|note| match grant.node.as_str() {
            "none" => format!("; it was {note}"),
            _ => format!("; {note}, where it stays usable until it is closed"),
        });
        output::line(&format!("{}: {} is gone{}", grant.container, grant.path, note.unwrap_or_default()))?;
    }
    Ok(())
}
