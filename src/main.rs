//! Parses the command line, sets up logging, and turns an error into a message and an exit code.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use qm_hotplug::cli::lxc_device::{self, LxcDevice};
use qm_hotplug::cli::{Cli, Command, complete, precreate, run};
use qm_hotplug::core::text::printable;
use qm_hotplug::error::Error;
use qm_hotplug::log::{self, Who};
use qm_hotplug::precreate::Hook;

fn main() -> ExitCode {
    if std::env::args().next().is_some_and(|program| LxcDevice::is_called(&program)) {
        return lxc_device();
    }
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

/// Under the name of LXC's command, whose failures all have the exit code 1.
fn lxc_device() -> ExitCode {
    let done = match lxc_device::parse(std::env::args_os()) {
        Ok(command) => log::start(Who::Command).context("cannot set up logging").and_then(|_| Ok(command.run()?)),
        Err(code) => return ExitCode::from(code),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {}", lxc_device::NAME, printable(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// Says before all else whether what is logged goes to the journal.
fn start(in_journal: &mut bool) -> anyhow::Result<()> {
    let start_logging = |who| log::start(who).context("cannot set up logging");
    if let Some(hook) = std::env::args().next().and_then(|program| Hook::called_as(&program)) {
        *in_journal = start_logging(Who::Hook)?;
        return Ok(precreate(Some(hook))?);
    }
    complete::answer_shell();
    let cli = Cli::parse();
    *in_journal = start_logging(match cli.command {
        Command::Agent(_) => Who::Agent,
        Command::Precreate => Who::Hook,
        _ => Who::Command,
    })?;
    Ok(run(cli)?)
}
