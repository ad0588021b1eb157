//! One thread that waits for everything the agent hears of, and hands it on as owned values. It never waits for the
//! loop that works on it, so that the kernel's buffers stay empty during a storm.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Sender, WeakSender};

use crate::agent::news::{News, What};
use crate::agent::state_watch::{CgroupWatch, Changed, StateWatch};
use crate::agent::user_watch::{Served, UserWatch};
use crate::core::uevent::{Action, Uevent, parse};
use crate::runtime::places::{Patterns, Place};
use crate::sys::ring::Ring;
use crate::sys::udev;
use crate::sys::uevent::{Received, Uevents};

const KERNEL: u64 = 0;
const UDEV: u64 = 1;
const STATE: u64 = 2;
const REFUSED: u64 = 3;
const PULSE: u64 = 4;
const USERS: u64 = 5;
/// Tokens from here on stand for processes.
const FIRST_PROCESS: u64 = 16;

/// Where processes and cgroups are added to what the thread waits for.
#[derive(Debug)]
pub(super) struct Watched {
    epoll: Arc<OwnedFd>,
    next: u64,
    cgroups: CgroupWatch,
    pulse: Arc<Pulse>,
    early: Arc<AtomicBool>,
    served: Served,
    told_of: Served,
    asked: u64,
    news: WeakSender<News>,
}

/// How the loop knows that the thread is at work: it counts the loop's questions.
#[derive(Debug)]
struct Pulse {
    questions: OwnedFd,
    answered: AtomicU64,
}

/// The shortest wait between two looks at a container that is starting.
const SHORTEST: Duration = Duration::from_millis(2);

impl Watched {
    /// Asks the thread whether it is at work. It wakes up for that.
    pub(super) fn ask(&mut self) {
        // A full counter takes more questions than there will ever be.
        if rustix::io::write(&self.pulse.questions, &1u64.to_ne_bytes()).is_ok() {
            self.asked += 1;
        }
    }

    /// From now on, news of these users' containers come.
    pub(super) fn serve(&mut self, users: &BTreeSet<u32>) {
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) = users.clone();
        self.ask();
    }

    /// Whether it has answered all questions.
    pub(super) fn has_answered(&self) -> bool {
        self.pulse.answered.load(Ordering::SeqCst) == self.asked
    }

    /// News will come to look again at this place, where a container is starting since then: late by an eighth of the time
    /// that its start takes at most, and ever more seldom where it never does.
    pub(super) fn look_again(&self, place: Place, since: Instant) {
        self.later(SHORTEST.max(since.elapsed() / 8), What::State(place, Some(since)));
    }

    /// This will come as news in that time.
    pub(super) fn later(&self, time: Duration, what: What) {
        // It keeps no channel open that the thread has left.
        let news = self.news.clone();
        drop(tokio::task::spawn_local(async move {
            tokio::time::sleep(time).await;
            if let Some(news) = news.upgrade() {
                let _ = news.send(News { at: Instant::now(), what }).await;
            }
        }));
    }

    /// Whether news of a device come before udev has spoken of it, too, from now on.
    pub(super) fn tell_early(&self, early: bool) {
        if self.early.swap(early, Ordering::SeqCst) != early {
            tracing::debug!("a device counts {} udev has spoken of it", if early { "before" } else { "once" });
        }
    }

    /// Of this user, news come again: what was told until now is being looked at.
    pub(super) fn take_up(&self, uid: u32) {
        self.told_of.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
    }

    /// News of writes to this directory will carry the id.
    pub(super) fn watch_cgroup(&self, directory: &Path, id: &str) -> io::Result<()> {
        self.cgroups.add(directory, id)
    }

    /// News will come when the ring has something. It is for its reader to take all then: the thread is told once each
    /// time. Closing the ring ends the watch.
    pub(super) fn watch_refusals(&self, ring: &Ring) -> io::Result<()> {
        epoll::add(&*self.epoll, ring.as_fd(), EventData::new_u64(REFUSED), EventFlags::IN | EventFlags::ET)?;
        Ok(())
    }

    /// News of this process's end will carry the returned token. Closing the pidfd ends the watch.
    pub(super) fn watch_exit(&mut self, process: impl AsFd) -> io::Result<u64> {
        let token = self.next;
        self.next += 1;
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        epoll::add(&*self.epoll, process.as_fd(), EventData::new_u64(token), flags)?;
        Ok(token)
    }
}

/// Subscribes to everything and starts the thread. What happens from now on is in the channel, so a scan that comes
/// after this misses nothing.
pub(super) fn start(news: Sender<News>) -> io::Result<Watched> {
    let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
    let (kernel, udev, state) = (Uevents::of_kernel()?, Uevents::of_udev()?, StateWatch::start(Patterns::of_host())?);
    let (served, told_of) = (Served::default(), Served::default());
    let users = UserWatch::start(Arc::clone(&served))?;
    let questions = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let pulse = Arc::new(Pulse { questions, answered: AtomicU64::new(0) });
    let sources = [
        (kernel.as_fd(), KERNEL),
        (udev.as_fd(), UDEV),
        (state.as_fd(), STATE),
        (users.as_fd(), USERS),
        (pulse.questions.as_fd(), PULSE),
    ];
    for (source, token) in sources {
        epoll::add(&*epoll, source, EventData::new_u64(token), EventFlags::IN)?;
    }
    let (its_pulse, cgroups, its_news) = (Arc::clone(&pulse), state.cgroups(), news.downgrade());
    let early = Arc::new(AtomicBool::new(false));
    let its_early = Arc::clone(&early);
    let (next, epoll_too) = (FIRST_PROCESS, Arc::clone(&epoll));
    let watched = Watched {
        epoll: epoll_too,
        next,
        cgroups,
        pulse,
        early,
        served,
        told_of: Arc::clone(&told_of),
        asked: 0,
        news: its_news,
    };
    let had_udevd = udev::is_running();
    let (pulse, early) = (its_pulse, its_early);
    let watch = Watch { kernel, udev, state, users, news, told_of, pulse, early, overflowed: false, had_udevd };
    std::thread::Builder::new().name("watch".into()).spawn(move || watch.run(&epoll))?;
    Ok(watched)
}

struct Watch {
    kernel: Uevents,
    udev: Uevents,
    state: StateWatch,
    users: UserWatch,
    news: Sender<News>,
    /// Users of whom there are news that nobody has taken up: more would say no more.
    told_of: Served,
    pulse: Arc<Pulse>,
    /// Whether devices matter before udev has spoken of them.
    early: Arc<AtomicBool>,
    /// News did not fit into the channel: everything must be compared.
    overflowed: bool,
    /// Whether udevd ran at the last addition.
    had_udevd: bool,
}

/// How many messages are read before the other sources get their turn: whoever may send to udev's group could keep us
/// reading.
const AT_ONCE: usize = 256;

/// How soon a full channel is tried again.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

impl Watch {
    /// Ends when the loop on the other side has, or when the kernel's events cannot be read any more.
    fn run(mut self, epoll: &OwnedFd) {
        let mut events = Vec::with_capacity(64);
        while !self.news.is_closed() {
            events.clear();
            let timeout = (self.overflowed || self.users.is_early()).then_some(&RETRY);
            match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return tracing::error!("cannot wait for events: {errno}"),
            }
            if self.overflowed {
                self.overflowed = false;
                self.tell(What::Lost);
            }
            if self.users.is_early() {
                let users = self.users.look_again();
                users.into_iter().for_each(|uid| self.tell_of(uid));
            }
            // The kernel's events first: its "remove" of a device comes before udev's "add" of the next one.
            let mut tokens: Vec<u64> = events.iter().map(|event| event.data.u64()).collect();
            tokens.sort_unstable();
            for token in tokens {
                let result = match token {
                    KERNEL => self.read_kernel(),
                    UDEV => self.read_kernel().and_then(|()| self.read_udev()),
                    STATE => {
                        self.read_state();
                        Ok(())
                    }
                    USERS => {
                        self.read_users();
                        Ok(())
                    }
                    REFUSED => {
                        self.tell(What::Refused);
                        Ok(())
                    }
                    PULSE => {
                        self.answer();
                        Ok(())
                    }
                    process => {
                        self.tell(What::Exited(process));
                        Ok(())
                    }
                };
                if let Err(error) = result {
                    return tracing::error!("cannot read the events of devices: {error}");
                }
            }
        }
    }

    fn answer(&mut self) {
        self.users.follow().into_iter().for_each(|uid| self.tell_of(uid));
        let mut count = [0; 8];
        if rustix::io::read(&self.pulse.questions, &mut count).is_ok() {
            self.pulse.answered.fetch_add(u64::from_ne_bytes(count), Ordering::SeqCst);
        }
    }

    fn tell(&mut self, what: What) {
        self.tell_at(Instant::now(), what);
    }

    fn tell_at(&mut self, at: Instant, what: What) {
        match self.news.try_send(News { at, what }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.overflowed = true,
            // The loop is gone: `run` sees that.
            Err(TrySendError::Closed(_)) => {}
        }
    }

    /// Removals act at once. Additions come from udev, after its rules ran; where no udevd runs, from here.
    fn read_kernel(&mut self) -> io::Result<()> {
        for _ in 0..AT_ONCE {
            let at = Instant::now();
            let event = match self.kernel.receive()? {
                Received::Message(message) => parse(message),
                Received::Nothing => None,
                Received::Lost => {
                    self.tell(What::Lost);
                    None
                }
                Received::Empty => return Ok(()),
            };
            match event {
                Some(event) if event.action == Action::Remove => self.tell_at(at, What::Unplugged(event)),
                Some(event) if event.action == Action::Add => self.added(at, &event),
                _ => {}
            }
        }
        Ok(())
    }

    fn added(&mut self, at: Instant, event: &Uevent) {
        let has_udevd = udev::is_running();
        if has_udevd != self.had_udevd {
            // Of what came while it started or ended, nobody may have told.
            self.tell(What::Lost);
        } else if !has_udevd && let Some(device) = udev::by_event(event) {
            self.tell_at(at, What::Plugged(Box::new(device), Vec::new()));
        } else if self.early.load(Ordering::SeqCst)
            && let Some(device) = udev::by_event(event)
        {
            self.tell_at(at, What::Appeared(Box::new(device)));
        }
        self.had_udevd = has_udevd;
    }

    fn read_udev(&mut self) -> io::Result<()> {
        for _ in 0..AT_ONCE {
            let at = Instant::now();
            let devices = match self.udev.receive()? {
                Received::Message(message) => udev::by_message(message),
                Received::Nothing => Vec::new(),
                Received::Lost => {
                    self.tell(What::Lost);
                    Vec::new()
                }
                Received::Empty => return Ok(()),
            };
            for (device, told) in devices {
                self.tell_at(at, What::Plugged(Box::new(device), vec![told]));
            }
        }
        Ok(())
    }

    fn tell_of(&mut self, uid: u32) {
        let is_new = self.told_of.lock().unwrap_or_else(PoisonError::into_inner).insert(uid);
        if is_new {
            self.tell(What::User(uid));
        }
        if self.overflowed {
            // The news may not have come through.
            self.told_of.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        }
    }

    fn read_users(&mut self) {
        match self.users.receive() {
            Ok(users) => users.into_iter().for_each(|uid| self.tell_of(uid)),
            Err(error) => tracing::warn!("inotify on the directories of users: {error}"),
        }
    }

    fn read_state(&mut self) {
        match self.state.receive() {
            Ok(changed) => changed.into_iter().for_each(|changed| {
                self.tell(match changed {
                    Changed::State(place) => What::State(place, None),
                    Changed::Cgroup(id) => What::Cgroup(id),
                });
            }),
            Err(error) => {
                tracing::warn!("inotify: {error}: looking at everything");
                self.tell(What::Lost);
            }
        }
    }
}
