//! `qm-hotplug explain`.

use clap_complete::ArgValueCompleter;

use crate::agent::client;
use crate::cli::complete::{containers, granted_or_devices};
use crate::cli::{absolute, look, output};
use crate::config;
use crate::core::info::Explained;
use crate::core::protocol::{Explain, Request};
use crate::error::Result;
use crate::ops::explain::explain;
use crate::runtime;

/// Arguments of `explain`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Container: name, id, ENGINE:NAME or pid:N
    #[arg(value_name = "CTR", add = ArgValueCompleter::new(containers))]
    container: String,
    /// Device on the host, or its path in the container
    #[arg(value_name = "DEV", add = ArgValueCompleter::new(granted_or_devices))]
    device: String,
    /// Print findings and advice as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let device = absolute(&args.device)?;
    let request = Explain { container: args.container.clone(), device: device.clone() };
    let explained: Explained = look(&Request::Explain(request), "explanation", || {
        explain(&config::settings_or_warn(), &runtime::scan(), &args.container, &device, client::is_there())
    })?;
    if args.json {
        return output::json(&explained);
    }
    let explanation = &explained.explanation;
    let width = explanation.findings.iter().map(|finding| finding.topic.len()).max().unwrap_or(0);
    for finding in &explanation.findings {
        output::line(&format!("{:width$}  {}", finding.topic, finding.text))?;
    }
    if explanation.accessible == Some(true) {
        output::line(&format!("→ {} can open {}", args.container, explained.path))?;
    }
    explanation.advice.iter().try_for_each(|advice| output::line(&format!("→ {advice}")))
}
