//! `qm-hotplug verify`.

use clap_complete::ArgValueCompleter;

use crate::cli::complete::{containers, granted};
use crate::cli::{absolute, look, output};
use crate::core::info::Proven;
use crate::core::protocol::{Request, Verify};
use crate::error::Result;
use crate::ops::verify::{conclude, verify};
use crate::runtime;

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Container: name, id, ENGINE:NAME or pid:N
    #[arg(value_name = "CTR", add = ArgValueCompleter::new(containers))]
    container: String,
    /// Device on the host, or its path in the container [default: all that it was granted]
    #[arg(value_name = "DEV", add = ArgValueCompleter::new(granted))]
    device: Option<String>,
    /// Also open each device for a moment, which a driver may notice
    #[arg(long)]
    open: bool,
    /// Print an array of answers as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let device = args.device.as_deref().map(absolute).transpose()?;
    let open = args.open.then_some(true);
    let request = Verify { container: args.container.clone(), device: device.clone(), open };
    let proven: Vec<Proven> = look(&Request::Verify(request), "proofs", || {
        verify(&runtime::scan(), &args.container, device.as_deref(), args.open)
    })?;
    if args.json {
        output::json(&proven)?;
    } else if proven.is_empty() {
        output::line(&format!("{}: nothing is granted", args.container))?;
    }
    for one in proven.iter().filter(|_| !args.json) {
        let how = if one.opened { "was opened" } else { "is accessible" };
        output::line(&match &one.reason {
            None => format!("{}: {} {how} ({})", one.container, one.path, one.access),
            Some(reason) => format!("{}: {}: {reason}", one.container, one.path),
        })?;
    }
    conclude(&proven)
}
