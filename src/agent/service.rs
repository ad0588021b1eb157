//! What systemd is told (sd_notify(3)): that the agent is ready, how it is, that it reloads, stops, and lives. Without
//! systemd nobody is told.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::agent::watch::Watched;

/// The agent as a service.
#[derive(Debug)]
pub(super) struct Service {
    /// What was last said.
    status: String,
    watchdog: Option<Interval>,
}

impl Service {
    /// Half the time that the watchdog allows is between two signs of life.
    pub(super) fn new() -> Service {
        let every = |timeout: Duration| {
            let mut interval = interval(timeout / 2);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        Service { status: String::new(), watchdog: sd_notify::watchdog_enabled().map(every) }
    }

    /// Ready, for the first time or after a reload.
    pub(super) fn ready(&mut self, status: String) {
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        self.status = status;
    }

    /// The configuration is being read again; [`Service::ready`] ends it.
    pub(super) fn reloading(&self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
    }

    /// On its way to the end.
    pub(super) fn stopping(&mut self) {
        self.status = "stopping: grants stay in force".into();
        notify(&[NotifyState::Stopping, NotifyState::Status(&self.status)]);
    }

    /// How the agent is, where that has changed.
    pub(super) fn say(&mut self, status: String) {
        if status != self.status {
            notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// When the next sign of life is due; never, where no watchdog is set.
    pub(super) async fn tick(&mut self) {
        match &mut self.watchdog {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }

    /// A sign of life, if the thread that hears of events has answered the question of the last time; then the next
    /// question. Called from the main loop and from nowhere else: where either is stuck, systemd starts the agent anew.
    pub(super) fn live(&self, watched: &mut Watched) {
        if watched.has_answered() {
            notify(&[NotifyState::Watchdog]);
            watched.ask();
        } else {
            tracing::error!("the thread that hears of events does not answer: the watchdog is not answered either");
        }
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("systemd was not notified: {error}");
    }
}
