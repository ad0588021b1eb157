//! `qm-hotplug list`.

use clap_complete::ArgValueCompleter;

use crate::agent::client;
use crate::cli::complete::containers_and_kept;
use crate::cli::output;
use crate::core::protocol::{Grants, List, Request};
use crate::error::Result;
use crate::ops::RUN_DIRECTORY;
use crate::ops::persist::Persisted;
use crate::ops::store::{self, Store};
use crate::sys::host::require_fitness;
use crate::{ops, runtime};

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this container's grants
    #[arg(value_name = "CTR", add = ArgValueCompleter::new(containers_and_kept))]
    container: Option<String>,
    /// Print an array of grants as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let request = List { container: args.container };
    let by_agent: Option<Grants> = client::call(&Request::List(request.clone()))?;
    let has_agent = by_agent.is_some();
    let grants = match by_agent {
        Some(Grants { grants }) => grants,
        None => {
            require_fitness()?;
            let entries = Store::peek(RUN_DIRECTORY.as_ref(), store::warn)?;
            ops::request::list(entries.iter(), &Persisted::look(), &runtime::scan(), &request)?
        }
    };
    if args.json {
        output::json(&grants)?;
    } else {
        let rows = grants.iter().map(|grant| {
            vec![
                grant.container.clone(),
                grant.path.clone(),
                grant.device.clone(),
                format!("{} {}:{}", grant.kind.letter(), grant.major, grant.minor),
                grant.access.to_string(),
                grant.right.clone(),
                format!("{:04o} {}:{}", grant.mode, grant.uid, grant.gid),
                grant.node.clone(),
                format!("{}{}", grant.origin, if grant.persist { "+persist" } else { "" }),
                grant.note.clone().unwrap_or_default(),
            ]
        });
        output::table(
            &["CONTAINER", "PATH", "DEVICE", "NUMBER", "ACCESS", "RIGHT", "MODE", "NODE", "ORIGIN", "NOTE"],
            rows,
        )?;
    }
    if !has_agent {
        eprintln!("no agent: plugs and unplugs are not followed");
    }
    Ok(())
}
