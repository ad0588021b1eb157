//! The agent: one loop that observes, plans and executes, and the socket that people and programs talk to.

mod api;
pub mod client;
mod reconcile;
mod registry;
mod state_watch;
mod watch;

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::agent::api::Call;
use crate::agent::registry::Registry;
use crate::agent::watch::{News, What};
use crate::core::protocol::{Reply, Request};
use crate::error::{Error, Result};
use crate::ops::{Executor, request};
use crate::sys::udev;

/// How long a start waits for a command that is just changing something.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the agent until SIGTERM or SIGINT. Grants stay in force when it ends.
pub fn run() -> Result<()> {
    let mut executor = wait_for_lock()?;
    // Whether this kernel can carry the filter is found out now, not at the first plug.
    executor.filter()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::host("start the event loop"))?;
    LocalSet::new().block_on(&runtime, serve(executor))
}

fn wait_for_lock() -> Result<Executor> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(executor) = Executor::open()? {
            return Ok(executor);
        }
        if Instant::now() > until {
            return Err(Error::Unfit("an agent is running already: see `systemctl status qm-hotplug`".into()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn serve(mut executor: Executor) -> Result<()> {
    // Subscribe first, then look: what happens in between is in the channel.
    let (sender, mut news) = mpsc::unbounded_channel();
    let exits = watch::start(sender).map_err(Error::host("subscribe to device and container events"))?;
    let mut registry = Registry::new(exits);
    reconcile::everything(&mut executor, &mut registry);

    let path = client::socket_path();
    let listener = api::listen(&path).map_err(Error::host(format!("listen at {}", path.display())))?;
    let (caller, mut calls) = mpsc::channel::<Call>(16);
    let on = |kind| signal(kind).map_err(Error::host("handle signals"));
    let (mut terminate, mut interrupt, mut hang_up) =
        (on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?);
    let mut watchdog = sd_notify::watchdog_enabled().map(|timeout| tokio::time::interval(timeout / 2));
    tracing::info!(
        "ready: {} containers, {} devices, {} grants, events from {}",
        registry.containers.len(),
        registry.devices.len(),
        executor.ledger.entries().len(),
        events_from()
    );
    notify(&[NotifyState::Ready, NotifyState::Status(&status(&executor, &registry))]);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hang_up.recv() => reconcile::everything(&mut executor, &mut registry),
            Some(first) = news.recv() => {
                hear(&mut executor, &mut registry, first);
                // What else has come is worked through before systemd and callers are served.
                while let Ok(next) = news.try_recv() {
                    hear(&mut executor, &mut registry, next);
                }
                notify(&[NotifyState::Status(&status(&executor, &registry))]);
            }
            Some(call) = calls.recv() => {
                let reply = answer(&mut executor, &mut registry, &call.request);
                // A caller that hung up gets no answer; what it asked for is done all the same.
                let _ = call.answer.send(reply);
            }
            Ok((stream, _)) = listener.accept() => drop(tokio::task::spawn_local(api::serve(stream, caller.clone()))),
            _ = tick(&mut watchdog) => notify(&[NotifyState::Watchdog]),
        }
    }
    notify(&[NotifyState::Stopping]);
    let _ = std::fs::remove_file(&path);
    tracing::info!("stopping; {} grants stay in force", executor.ledger.entries().len());
    Ok(())
}

fn hear(executor: &mut Executor, registry: &mut Registry, News { at, what }: News) {
    match what {
        What::Plugged(device) => reconcile::plugged(executor, registry, *device, at),
        What::Unplugged(event) => reconcile::unplugged(executor, registry, &event.devpath, at),
        What::State(directory, id) => reconcile::container(executor, registry, directory, &id, at),
        What::Exited(token) => {
            if let Some(id) = registry.forget(token) {
                reconcile::ended(executor, &id);
            }
        }
        What::Lost => {
            tracing::warn!("events were lost: comparing everything");
            reconcile::everything(executor, registry);
        }
    }
}

fn answer(executor: &mut Executor, registry: &mut Registry, request: &Request) -> Reply {
    let containers = registry.snapshot();
    let result = match request {
        Request::Attach(attach) => request::attach(executor, &containers, attach).map(Reply::good),
        Request::Detach(detach) => request::detach(executor, &containers, detach, true).map(Reply::good),
        Request::List(list) => request::list(executor.ledger.entries(), &containers, list).map(Reply::good),
        Request::Status(_) => {
            let grants = executor.ledger.entries().len();
            request::status(&executor.cgroups, containers.len(), grants, Some(events_from())).map(Reply::good)
        }
    };
    for entry in executor.ledger.entries() {
        registry.follow(&entry.grant.holder);
    }
    result.unwrap_or_else(|error| {
        tracing::info!("refused: {}", error.chain());
        Reply::bad(error.exit_code(), &error.chain())
    })
}

fn events_from() -> &'static str {
    if udev::is_running() { "udev" } else { "kernel" }
}

fn status(executor: &Executor, registry: &Registry) -> String {
    format!("{} containers, {} grants", registry.containers.len(), executor.ledger.entries().len())
}

/// Tells systemd; without systemd nothing happens.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("systemd was not notified: {error}");
    }
}

/// Never, where no watchdog is set.
async fn tick(watchdog: &mut Option<tokio::time::Interval>) {
    match watchdog {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}
