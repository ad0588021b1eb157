//! The command line: one file a command.

mod attach;
pub mod complete;
mod detach;
mod devices;
mod doctor;
mod explain;
mod list;
pub mod lxc_device;
mod monitor;
mod output;
mod ps;
mod reload;
mod status;
mod verify;

use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};

use crate::agent::client;
use crate::core::container::Container;
use crate::core::ledger::Entry;
use crate::core::protocol::Request;
use crate::error::{Error, Result};
use crate::ops::store::{self, Store};
use crate::ops::{Executor, RUN_DIRECTORY};
use crate::precreate::discovery::Host;
use crate::precreate::{self, Hook, Surroundings};
use crate::runtime;
use crate::sys::host::require_fitness;

/// Hot-plugged devices in running containers.
#[derive(Debug, Parser)]
#[command(name = "qm-hotplug", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 no such container, 4 no such device, 5 refused, 6 timed out.\n\
                          CTR is a container's name, id, beginning of an id, ENGINE:NAME or pid:N;\n\
                          ENGINE is podman, docker, containerd, lxc, incus or nspawn.\n\
                          SELECTOR is a list such as ttyUSB,usb=10c4:ea60,serial=A1B2; see qm-hotplug-selectors(7).";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Give a running container a device
    Attach(attach::Args),
    /// Take a device back from a container
    Detach(detach::Args),
    /// Show the grants, those in force and those attached with --persist
    #[command(alias = "ls")]
    List(list::Args),
    /// Show the devices of this host, with what selectors can ask of them
    Devices(devices::Args),
    /// Show the running containers that are found, with what they ask for and what they have
    Ps(ps::Args),
    /// Say why a container can or cannot open a device, and what to do
    Explain(explain::Args),
    /// Prove that a container can open its devices, without touching them
    Verify(verify::Args),
    /// Show what happens from now on: plugs, grants, revocations, and the devices that containers were refused
    Monitor(monitor::Args),
    /// Show how the agent and the device filter are
    Status(status::Args),
    /// Look whether this host can do the work, and say what to do where it cannot; changes nothing
    Doctor(doctor::Args),
    /// Have the agent read its configuration again; what is wrong in it is told, and then all stays as it was
    Reload,
    /// Run the agent (a systemd service starts this)
    Agent(AgentArgs),
    /// Act as an OCI precreate hook: config.json on stdin, edited, on stdout
    Precreate,
}

/// Arguments of `agent`.
#[derive(Debug, clap::Args)]
pub struct AgentArgs {
    /// Take out every node, right and program of ours, and end
    #[arg(long)]
    pub release: bool,
}

/// Runs a command to its end.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Attach(args) => attach::run(args),
        Command::Detach(args) => detach::run(args),
        Command::List(args) => list::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Ps(args) => ps::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Monitor(args) => monitor::run(args),
        Command::Status(args) => status::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Reload => reload::run(),
        Command::Agent(args) if args.release => release(),
        Command::Agent(_) => crate::agent::run(),
        Command::Precreate => precreate(None),
    }
}

/// Acts as one of containers/qm's hooks, or as both.
pub fn precreate(hook: Option<&'static Hook>) -> Result<()> {
    let around = Surroundings { discovery: &Host::default(), log: None, has_udev: true };
    precreate::run(hook, &around, &mut std::io::stdin().lock(), &mut std::io::stdout().lock())
}

/// A device's path as typed, made absolute; links are kept.
fn absolute(path: &str) -> Result<String> {
    let path = std::path::absolute(path).ok().and_then(|path| path.into_os_string().into_string().ok());
    path.ok_or_else(|| Error::Usage("a device's path must not be empty".into()))
}

/// How long a command waits for another one, or for an agent that is just starting.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks into it here as root; others have the agent do it, and read that field of its answer.
fn look<T: serde::de::DeserializeOwned>(request: &Request, field: &str, here: impl FnOnce() -> Result<T>) -> Result<T> {
    if rustix::process::geteuid().is_root() {
        return here();
    }
    let Some(mut answer) = client::call::<serde_json::Value>(request)? else { return here() };
    serde_json::from_value(answer[field].take())
        .map_err(|error| Error::BadFile { path: client::socket_path(), reason: format!("the agent's answer: {error}") })
}

/// Prints what would be done, by what is in force now.
fn dry_run(steps: impl FnOnce(&[Entry], &[Container]) -> Result<Vec<String>>) -> Result<()> {
    require_fitness()?;
    let entries = Store::peek(RUN_DIRECTORY.as_ref(), store::warn)?;
    let steps = steps(&entries, &runtime::scan())?;
    if steps.is_empty() {
        return output::line("nothing would be done");
    }
    steps.iter().try_for_each(|step| output::line(&format!("would {step}")))
}

/// What came of asking for something to be done.
enum Done<T> {
    /// By the agent.
    ByAgent(T),
    /// By this process, since no agent runs.
    Here(T),
}

/// Has the agent do it, or does it here as root where none runs.
fn change<T: serde::de::DeserializeOwned>(
    request: &Request,
    here: impl FnOnce(&mut Executor) -> Result<T>,
) -> Result<Done<T>> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = client::call(request)? {
            return Ok(Done::ByAgent(answer));
        }
        if let Some(mut executor) = Executor::open()? {
            crate::ops::request::prune(&mut executor);
            let result = here(&mut executor);
            let released = executor.release_if_unused();
            return result.and_then(|value| released.map(|()| Done::Here(value)));
        }
        if Instant::now() > until {
            return Err(Error::TimedOut(format!(
                "another qm-hotplug has held the ledger for {} seconds and answers nothing: see `systemctl status qm-hotplug`",
                PATIENCE.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `agent --release`.
fn release() -> Result<()> {
    let mut executor = Executor::open()?.ok_or_else(|| {
        Error::Unfit(
            "an agent is running and would grant everything again: stop it first with `systemctl stop qm-hotplug`"
                .into(),
        )
    })?;
    let revoked = executor.revoke_all();
    executor.release_filter().and(revoked)
}
