//! Waits until a device may have come: a short wait for a program that looks again then.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys::udev::UdevEvents;
use crate::sys::uevent::{KernelEvents, Received};

/// Subscribed to the events of devices.
pub struct Arrivals {
    kernel: KernelEvents,
    udev: UdevEvents,
}

/// However quiet it is, somebody who waits looks again after this time.
const QUIET: Duration = Duration::from_millis(500);

impl Arrivals {
    /// Subscribes: what happens from now on ends a wait.
    pub fn listen() -> io::Result<Arrivals> {
        Ok(Arrivals { kernel: KernelEvents::listen()?, udev: UdevEvents::listen()? })
    }

    /// Waits for an event, or for half a second: then it is time to look again. `false` where the time was up before.
    pub fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let time = deadline.saturating_duration_since(Instant::now()).min(QUIET);
        if time.is_zero() {
            return Ok(false);
        }
        let mut polled = [self.kernel.as_fd(), self.udev.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        match poll(&mut polled, Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        while !matches!(self.kernel.receive()?, Received::Empty) {}
        let _ = self.udev.receive();
        Ok(true)
    }
}
