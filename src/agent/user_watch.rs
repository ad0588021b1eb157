//! inotify on the runtime directories of ordinary users, apart from root's: what a user can flood is his own.
//!
//! All below `/run/user/UID` is opened as [`Home`] does it, and watched by descriptor, so that no link leads elsewhere.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::runtime::places::STATE_FILES;
use crate::runtime::users::{Home, MOST, RUNTIMES, USERS, uid_of, uids};

/// What a watch is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    /// What is above the users' directories, which need not be there yet.
    Above,
    /// The directory of the users' directories.
    Users,
    /// A user's.
    User(u32),
    /// One of his runtimes'.
    Runtime(u32),
    /// One of his containers'.
    Container(u32),
}

/// How many watches there are for all users together: they count for root, and there are as few as 8192 on some hosts.
const MOST_WATCHES: usize = 4096;

/// How long a directory that is not its user's yet is looked at again: systemd makes it, then mounts a tmpfs on it, of which
/// inotify does not tell.
const PATIENCE: Duration = Duration::from_secs(10);

/// The users whose containers are looked for, as the configuration has them now.
pub(super) type Served = Arc<Mutex<BTreeSet<u32>>>;

/// The watches.
#[derive(Debug)]
pub(super) struct UserWatch {
    served: Served,
    /// Those of them who were looked at.
    known: BTreeSet<u32>,
    inotify: Inotify,
    subjects: HashMap<WatchDescriptor, Subject>,
    /// Users whose directory is not theirs yet, and since when.
    early: HashMap<u32, Instant>,
}

impl UserWatch {
    /// Watches nobody until [`UserWatch::follow`].
    pub(super) fn start(served: Served) -> io::Result<UserWatch> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let (known, subjects, early) = Default::default();
        Ok(UserWatch { served, known, inotify, subjects, early })
    }

    /// Watches what is there of users who have come into the configuration. Returns those, if any has.
    pub(super) fn follow(&mut self) -> BTreeSet<u32> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let is_more = !served.is_subset(&self.known);
        self.known = served;
        if is_more { self.look_at_all() } else { BTreeSet::new() }
    }

    /// The users of whose containers something changed. One portion of what there is: a user can make it endless.
    pub(super) fn receive(&mut self) -> io::Result<BTreeSet<u32>> {
        let (mut changed, mut again, mut containers) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN) => return Ok(changed),
            Err(errno) => return Err(errno.into()),
        };
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                // It was a user's doing, and is looked at no further than users go.
                changed.extend(self.look_at_all());
                continue;
            }
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                self.subjects.remove(&event.wd);
                continue;
            }
            let name = event.name.as_deref().and_then(|name| name.to_str()).unwrap_or_default();
            match self.subjects.get(&event.wd) {
                Some(Subject::Above) if USERS.rsplit('/').next() == Some(name) => changed.extend(self.look_at_all()),
                Some(Subject::Users) => {
                    if let Some(uid) = uid_of(name) {
                        again.insert(uid);
                    }
                }
                Some(Subject::User(uid)) if RUNTIMES.contains(&name) => {
                    again.insert(*uid);
                }
                Some(Subject::Runtime(uid)) => {
                    containers.insert((*uid, name.to_owned()));
                    changed.insert(*uid);
                }
                Some(Subject::Container(uid)) if STATE_FILES.contains(&name) => drop(changed.insert(*uid)),
                _ => {}
            }
        }
        // Once for all of them: he can rename his directories without end.
        for uid in &again {
            self.look_at(*uid);
        }
        for (uid, id) in containers.iter().filter(|(uid, _)| !again.contains(uid)) {
            self.look_at_container(*uid, id);
        }
        changed.extend(again);
        Ok(changed)
    }

    /// Whether [`UserWatch::look_again`] is to be called soon.
    pub(super) fn is_early(&self) -> bool {
        !self.early.is_empty()
    }

    /// Looks at the directories again that were not their users' when they were made. Returns those that are now.
    pub(super) fn look_again(&mut self) -> BTreeSet<u32> {
        let early: Vec<u32> = self.early.keys().copied().collect();
        early.into_iter().filter(|uid| self.look_at(*uid)).collect()
    }

    /// Returns the users that there are.
    fn look_at_all(&mut self) -> BTreeSet<u32> {
        let above = USERS.rsplit_once('/').map_or("/", |(above, _)| above);
        for (path, subject) in [(above, Subject::Above), (USERS, Subject::Users)] {
            self.add(path, subject);
        }
        let users: BTreeSet<u32> = uids().into_iter().filter(|uid| self.known.contains(uid)).collect();
        users.iter().for_each(|uid| {
            self.look_at(*uid);
        });
        users
    }

    /// Watches the directories of a user. Returns whether there is one of his.
    fn look_at(&mut self, uid: u32) -> bool {
        if !self.known.contains(&uid) {
            return false;
        }
        let home = match Home::open(uid) {
            Ok(Some(home)) => home,
            result => {
                let since = *self.early.entry(uid).or_insert_with(Instant::now);
                if result.is_err() || since.elapsed() > PATIENCE {
                    self.early.remove(&uid);
                }
                return false;
            }
        };
        self.early.remove(&uid);
        self.leave(uid);
        self.add_fd(home.as_fd(), Subject::User(uid));
        for runtime in RUNTIMES {
            // The directory first: what is made in it after the look tells of itself.
            if let Ok(Some(directory)) = home.runtime(runtime) {
                self.add_fd(directory.as_fd(), Subject::Runtime(uid));
                let ids = home.list(runtime).ok().flatten().map(|(_, ids)| ids).unwrap_or_default();
                ids.iter().for_each(|id| self.look_at_container(uid, id));
            }
        }
        true
    }

    /// Ends the watches of a user, also those of directories that he has renamed.
    fn leave(&mut self, uid: u32) {
        let is_his = |subject: &Subject| matches!(subject, Subject::User(its) | Subject::Runtime(its) | Subject::Container(its) if *its == uid);
        let his: Vec<WatchDescriptor> =
            self.subjects.iter().filter(|(_, subject)| is_his(subject)).map(|(descriptor, _)| *descriptor).collect();
        for descriptor in his {
            self.subjects.remove(&descriptor);
            // One that is gone has ended itself.
            let _ = self.inotify.rm_watch(descriptor);
        }
    }

    fn look_at_container(&mut self, uid: u32, id: &str) {
        let Ok(Some(home)) = Home::open(uid) else { return };
        for runtime in RUNTIMES {
            if let Ok(Some(above)) = home.runtime(runtime)
                && let Ok(Some(directory)) = home.directory(above.as_fd(), id)
                && self.subjects.values().filter(|subject| **subject == Subject::Container(uid)).count() < MOST
            {
                self.add_fd(directory.as_fd(), Subject::Container(uid));
            }
        }
    }

    fn add_fd(&mut self, fd: BorrowedFd<'_>, subject: Subject) {
        self.add(&format!("/proc/self/fd/{}", fd.as_raw_fd()), subject);
    }

    fn add(&mut self, path: &str, subject: Subject) {
        if self.subjects.len() >= MOST_WATCHES {
            return;
        }
        let flags = match subject {
            Subject::Container(_) => {
                AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_CLOSE_WRITE
            }
            _ => AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
        };
        match self.inotify.add_watch(path, flags | AddWatchFlags::IN_ONLYDIR) {
            Ok(descriptor) => drop(self.subjects.insert(descriptor, subject)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => tracing::warn!("cannot watch the containers of users: {path} ({subject:?}): {errno}"),
        }
    }
}

impl AsFd for UserWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
