//! Those who are told what happens.

use tokio::sync::broadcast::{self, Receiver, Sender};

use crate::core::event::Event;

/// Events that a reader may be behind.
const ROOM: usize = 1024;

/// Hands events to all who want them, and waits for none.
#[derive(Debug, Clone)]
pub(super) struct Monitors(Sender<Event>);

impl Monitors {
    pub(super) fn new() -> Monitors {
        Monitors(broadcast::channel(ROOM).0)
    }

    /// What happens from now on.
    pub(super) fn subscribe(&self) -> Receiver<Event> {
        self.0.subscribe()
    }

    /// Whether there is anybody to tell.
    pub(super) fn are_there(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// Tells them; the event is made only where there is somebody.
    pub(super) fn tell(&self, event: impl FnOnce() -> Event) {
        if self.are_there() {
            // Who hangs up just now hears nothing.
            let _ = self.0.send(event());
        }
    }
}
