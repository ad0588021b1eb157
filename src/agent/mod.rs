//! The agent: one loop that observes, plans and executes, and the socket that people and programs talk to.

mod answers;
mod api;
pub mod client;
mod conversation;
mod early;
mod monitors;
mod news;
mod operators;
mod reconcile;
mod refusals;
mod registry;
mod said;
mod service;
mod state_watch;
mod user_watch;
mod users;
mod watch;
mod withdrawals;

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::agent::answers::answer;
use crate::agent::api::Api;
use crate::agent::client::Running;
use crate::agent::news::{News, What};
use crate::agent::refusals::Refusals;
use crate::agent::registry::Registry;
use crate::agent::service::Service;
use crate::core::protocol::{Nothing, Reply, Request};
use crate::core::text::printable;
use crate::error::{Error, Result};
use crate::log;
use crate::ops::Executor;
use crate::sys::device_filter::DeviceFilter;
use crate::sys::{activation, caps, namespace, udev};

/// How long a start waits for a command that is just changing something.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many events may wait; when there are more, everything is compared instead.
const QUEUE: usize = 65_536;
/// How many events are worked through before signals and the watchdog get their turn.
const BATCH: usize = 1024;
/// How long the end waits for those who are connected to be told of it, and for what has happened to be worked through:
/// together less than the unit's TimeoutStopSec.
const FAREWELL: Duration = Duration::from_secs(1);
const DRAIN: Duration = Duration::from_secs(5);

/// Runs the agent until SIGTERM or SIGINT. Grants stay in force when it ends.
pub fn run() -> Result<()> {
    // Who has called to have it started is not left to wait, nor has it started again.
    let executor = prepare().inspect_err(|_| activation::turn_away())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::host("start the event loop"))?;
    LocalSet::new().block_on(&runtime, serve(executor))
}

fn prepare() -> Result<Executor> {
    let mut executor = wait_for_lock()?;
    raise_file_limit();
    caps::confine()?;
    // Whether this kernel can carry the filter is found out now, not at the first plug.
    executor.filter()?.prove_withdrawal()?;
    Ok(executor)
}

/// A pidfd is held for each container; the soft limit is made for programs that use select(2).
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn wait_for_lock() -> Result<Executor> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(executor) = Executor::open()? {
            return Ok(executor);
        }
        if Instant::now() > until {
            return Err(Error::TimedOut("an agent is running already: see `systemctl status qm-hotplug`".into()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn serve(mut executor: Executor) -> Result<()> {
    let on = |kind| signal(kind).map_err(Error::host("handle signals"));
    // Before anything takes time: without a handler it would end the agent.
    let mut hang_up = on(SignalKind::hangup())?;
    // Subscribe first, then look: what happens in between is in the channel.
    let (sender, mut news) = mpsc::channel(QUEUE);
    let watched = watch::start(sender).map_err(Error::host("subscribe to device and container events"))?;
    let (mut registry, mut refusals) = (Registry::new(watched, executor.persisted.all()), Refusals::new());
    compare(&mut executor, &mut registry, &mut refusals);

    let mut api = Api::start(&client::socket_path(), registry.monitors.clone(), registry.in_force.subscribe())?;
    let running = Running::begin().map_err(Error::host("say that an agent runs"))?;
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    tracing::info!(
        "ready: {} containers, {} devices, {} grants, events from {}",
        registry.containers.len(),
        registry.devices.len(),
        executor.ledger.count(),
        events_from()
    );
    let mut service = Service::new();
    let mut after = behind_ours(&executor);
    service.ready(status(&executor, &registry, &after));
    let mut is_callers_turn = false;
    loop {
        let was_callers_turn = std::mem::take(&mut is_callers_turn);
        tokio::select! {
            // In this order: what has happened is worked through before the next request is answered, and neither
            // keeps systemd waiting. Nor does one of them keep the other waiting for ever.
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = service.tick() => {
                service.live(&mut registry.watched);
                // Somebody may have changed the maps: whoever holds CAP_BPF can.
                executor.agree_with_ledger();
                refusals.renew(&mut executor, &registry);
                after = behind_ours(&executor);
            }
            _ = hang_up.recv() => {
                service.reloading();
                // It is in the log.
                let _ = reload(&mut executor, &mut registry, &mut refusals);
                after = behind_ours(&executor);
                service.ready(status(&executor, &registry, &after));
            }
            first = news.recv(), if !was_callers_turn => {
                is_callers_turn = true;
                let Some(first) = first else {
                    let ended = std::io::Error::other("the thread that waits for them ended");
                    return Err(Error::host("hear of events")(ended));
                };
                let _stay = namespace::stay();
                for one in at_hand(first, &mut news) {
                    hear(&mut executor, &mut registry, &mut refusals, one);
                }
                reconcile::catch_up(&mut executor, &mut registry);
                refusals.follow(&mut executor, &registry);
            }
            call = api.calls.recv() => {
                let Some(call) = call else {
                    let ended = std::io::Error::other("the thread of the socket ended");
                    return Err(Error::host("answer callers")(ended));
                };
                let reply = match &call.request {
                    Request::Reload(_) if call.peer.uid == 0 => {
                        service.reloading();
                        let result = reload(&mut executor, &mut registry, &mut refusals);
                        after = behind_ours(&executor);
                        service.ready(status(&executor, &registry, &after));
                        result.map_or_else(|reason| Reply::bad(1, &reason), |()| Reply::good(Nothing {}))
                    }
                    _ => answer(&mut executor, &mut registry, &call),
                };
                refusals.follow(&mut executor, &registry);
                // A caller that hung up gets no answer; what it asked for is done all the same.
                let _ = call.answer.send(reply);
            }
            () = std::future::ready(()), if was_callers_turn => {}
        }
        service.say(status(&executor, &registry, &after));
        log::tell_repeats();
    }
    service.stopping();
    drop(running);
    api.end(FAREWELL).await;
    drain(&mut executor, &mut registry, &mut refusals, &mut news);
    refusals.stop(&mut executor);
    log::tell_all_repeats();
    let (granted, withdrawn) = (executor.ledger.count(), executor.ledger.withdrawn().len());
    tracing::info!("stopping; {granted} grants and {withdrawn} withdrawals stay in force");
    Ok(())
}

/// Works through what has happened until now, so that the kernel and the ledger are left as the last event wants them.
/// What there is no time for is found by the next agent, which compares everything.
fn drain(executor: &mut Executor, registry: &mut Registry, refusals: &mut Refusals, news: &mut mpsc::Receiver<News>) {
    let until = Instant::now() + DRAIN;
    while Instant::now() < until
        && let Ok(next) = news.try_recv()
    {
        at_hand(next, news).into_iter().for_each(|one| hear(executor, registry, refusals, one));
    }
    reconcile::catch_up(executor, registry);
    if !news.is_empty() {
        tracing::warn!("{} events are left for the next agent", news.len());
    }
}

/// Reads the configuration again and compares everything. The error says what is wrong with it, in words.
fn reload(
    executor: &mut Executor,
    registry: &mut Registry,
    refusals: &mut Refusals,
) -> std::result::Result<(), String> {
    // What was said under the old one may be said again.
    log::tell_all_repeats();
    let result = registry.reconfigure();
    compare(executor, registry, refusals);
    if result.is_ok() {
        tracing::info!("the configuration was read again");
    }
    result
}

/// Compares everything.
fn compare(executor: &mut Executor, registry: &mut Registry, refusals: &mut Refusals) {
    registry.figures.borrow_mut().compared += 1;
    reconcile::everything(executor, registry);
    refusals.renew(executor, registry);
}

/// What has happened until now, as far as it counts: of a device, the last event alone.
fn at_hand(first: News, news: &mut mpsc::Receiver<News>) -> Vec<News> {
    let mut all = vec![first];
    while all.len() < BATCH
        && let Ok(next) = news.try_recv()
    {
        all.push(next);
    }
    news::newest(all)
}

fn hear(executor: &mut Executor, registry: &mut Registry, refusals: &mut Refusals, News { at, what }: News) {
    if matches!(what, What::Plugged(..) | What::Appeared(_) | What::Unplugged(_)) {
        registry.figures.borrow_mut().seen += 1;
    }
    match what {
        What::Plugged(device, told) => reconcile::plugged(executor, registry, *device, &told, at),
        What::Appeared(device) => early::appeared(executor, registry, *device, at),
        What::Unplugged(event) => reconcile::unplugged(executor, registry, &event, at),
        What::State(place, since) => reconcile::container(executor, registry, place, since, at),
        What::User(uid) => users::changed(executor, registry, uid, at),
        What::Cgroup(id) => reconcile::mark_again(executor, &id),
        What::Exited(token) => {
            if let Some(id) = registry.forget(token) {
                reconcile::ended(executor, registry, &id);
            }
        }
        What::Lost => lost(executor, registry, refusals, at),
        What::Refused => refusals.take(registry),
    }
}

/// The last time that everything was compared since events were lost.
#[derive(Debug, Clone, Copy)]
struct Compared {
    started: Instant,
    took: Duration,
    /// Whether it is to be done again, and only has to wait.
    is_due: bool,
}

/// Compares everything, for a fifth of the time at most: whoever can have events lost at will keeps nobody waiting.
fn lost(executor: &mut Executor, registry: &mut Registry, refusals: &mut Refusals, at: Instant) {
    let Compared { started, took, is_due } = registry.compared;
    // What was lost before the last time was found then.
    if at < started && !is_due {
        return;
    }
    let rest = (took * 5).saturating_sub(started.elapsed());
    if !rest.is_zero() {
        if !is_due {
            registry.compared.is_due = true;
            registry.watched.later(rest, What::Lost);
        }
        return;
    }
    tracing::warn!("events were lost: comparing everything");
    registry.figures.borrow_mut().lost += 1;
    let started = Instant::now();
    compare(executor, registry, refusals);
    registry.compared = Compared { started, took: started.elapsed(), is_due: false };
}

fn events_from() -> &'static str {
    if udev::is_running() { "udev" } else { "kernel" }
}

/// Programs at the cgroup root that run after ours and may refuse what is granted.
fn behind_ours(executor: &Executor) -> Vec<String> {
    DeviceFilter::standing(&executor.cgroups).map_or_else(|error| vec![error.chain()], |standing| standing.after)
}

/// How the agent is, on one line.
fn status(executor: &Executor, registry: &Registry, after: &[String]) -> String {
    let (containers, grants) = (registry.containers.len(), executor.ledger.count());
    let mut text = format!("{containers} containers, {grants} grants, events from {}", events_from());
    if !after.is_empty() {
        text += &format!("; degraded: {} at the cgroup root may refuse what is granted", after.join(", "));
    }
    if let Some(problem) = registry.problems.first() {
        text += &format!("; configuration refused: {problem}");
    }
    printable(&text)
}
