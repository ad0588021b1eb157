//! `qm-hotplug monitor`.

use std::io;

use clap_complete::ArgValueCompleter;

use crate::agent::client::{self, End};
use crate::cli::complete::containers;
use crate::cli::output;
use crate::core::event::Event;
use crate::core::protocol::Monitor;
use crate::error::{Error, Result};

/// Arguments of `monitor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this container's events
    #[arg(value_name = "CTR", add = ArgValueCompleter::new(containers))]
    container: Option<String>,
    /// Print each event as a JSON object on a line of its own
    #[arg(long)]
    json: bool,
}

/// Runs it, until the agent ends or nobody reads what it prints.
pub(super) fn run(args: Args) -> Result<()> {
    let write = |event: &Event| match event {
        // Programs read on stdout from when on nothing is missed.
        Event::Ready { .. } if !args.json => {
            eprintln!("{}", crate::core::text::printable(&event.to_string()));
            Ok(true)
        }
        _ => output::event(event, args.json),
    };
    match client::monitor(Monitor { container: args.container }, io::stdout(), write)? {
        End::NobodyReads => Ok(()),
        End::AgentEnded => {
            eprintln!("the agent ended, so there are no more events");
            Ok(())
        }
        End::NoAgent => {
            let error = io::Error::other("no agent is running: start it with `systemctl start qm-hotplug`");
            Err(Error::host("tell of events")(error))
        }
    }
}
