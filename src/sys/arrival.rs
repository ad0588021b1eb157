//! Waits until a device may have come: a short wait for a program that looks again then.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys::uevent::{Received, Uevents};

/// Subscribed to the events of devices.
pub struct Arrivals([Uevents; 2]);

/// However quiet it is, somebody who waits looks again after this time.
const QUIET: Duration = Duration::from_millis(500);

impl Arrivals {
    /// Subscribes: what happens from now on ends a wait.
    pub fn listen() -> io::Result<Arrivals> {
        Ok(Arrivals([Uevents::of_kernel()?, Uevents::of_udev()?]))
    }

    /// Waits for an event, or for half a second: then it is time to look again. `false` where the time was up before.
    pub fn wait(&mut self, deadline: Instant) -> io::Result<bool> {
        let time = deadline.saturating_duration_since(Instant::now()).min(QUIET);
        if time.is_zero() {
            return Ok(false);
        }
        let mut polled = self.0.each_ref().map(|events| PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN));
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        match poll(&mut polled, Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for events in &mut self.0 {
            while events.receive()? != Received::Empty {}
        }
        Ok(true)
    }
}
