//! Parses the command line, sets up logging, and turns an error into a message and an exit code.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use qm_hotplug::cli::{Cli, Command, precreate, run};
use qm_hotplug::core::text::printable;
use qm_hotplug::error::Error;
use qm_hotplug::precreate::Hook;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    let mut in_journal = false;
    match start(&mut in_journal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = printable(&format!("{error:#}"));
            // Podman throws away what a precreate hook writes to stderr, also when that fails.
            if in_journal {
                tracing::error!("{text}");
            }
            eprintln!("qm-hotplug: {text}");
            ExitCode::from(error.downcast_ref::<Error>().map_or(1, Error::exit_code))
        }
    }
}

/// Says before all else whether what is logged goes to the journal.
fn start(in_journal: &mut bool) -> anyhow::Result<()> {
    if let Some(hook) = std::env::args().next().and_then(|program| Hook::called_as(&program)) {
        *in_journal = start_logging(true, true).context("cannot set up logging")?;
        return Ok(precreate(Some(hook))?);
    }
    let cli = Cli::parse();
    let (is_agent, is_hook) = (matches!(cli.command, Command::Agent(_)), matches!(cli.command, Command::Precreate));
    // An engine throws away what its hook writes to stderr.
    *in_journal = start_logging(is_agent || is_hook, is_hook || is_agent && stderr_is_the_journal())
        .context("cannot set up logging")?;
    Ok(run(cli)?)
}

/// To the journal, where that is to be and it is there, else to stderr; says which. `QM_HOTPLUG_LOG` sets the level.
fn start_logging(is_service: bool, to_journal: bool) -> anyhow::Result<bool> {
    let journal = if to_journal { tracing_journald::layer().ok() } else { None };
    let is_heard = is_service && (journal.is_some() || !to_journal);
    let usual = || Targets::new().with_default(if is_heard { LevelFilter::INFO } else { LevelFilter::WARN });
    let set = std::env::var("QM_HOTPLUG_LOG").ok().and_then(|text| text.parse().ok());
    let filter = set.unwrap_or_else(usual);
    let registry = tracing_subscriber::registry().with(filter);
    if let Some(journal) = journal {
        registry.with(journal.with_syslog_identifier("qm-hotplug".into())).try_init()?;
        return Ok(true);
    }
    let plain = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    registry.with(plain.with_ansi(std::io::stderr().is_terminal())).try_init()?;
    Ok(false)
}

/// Whether stderr is what systemd connected to the journal: the variable is inherited by children whose stderr is not.
fn stderr_is_the_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = rustix::fs::fstat(std::io::stderr());
    stderr.is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}
