//! inotify on the runtimes' state directories: a container starts when its state file is renamed into place, and its
//! own program when `exec.fifo` is deleted. The directories do not exist before a runtime's first container.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::runtime::{self, STATE_DIRECTORIES};

/// What a watch is on.
#[derive(Debug, Clone)]
enum Place {
    /// A parent of state directories, `/run`.
    Parent,
    /// A state directory, by its index.
    Directory(usize),
    /// A container's directory.
    Container(usize, String),
    /// The cgroup of a container that has grants.
    Cgroup(String),
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Changed {
    /// A container's state appeared or changed: index into `STATE_DIRECTORIES`, and its id.
    State(usize, String),
    /// Somebody wrote to the cgroup of the container with this id, as a runtime's update does: it may have replaced the
    /// device programs, and our mark with them (crun 1.21, `podman update`, which leaves `status` alone).
    Cgroup(String),
}

/// Where cgroups are added to what is watched, also from another thread.
#[derive(Debug, Clone)]
pub(super) struct CgroupWatch {
    inotify: Arc<Inotify>,
    places: Arc<Mutex<HashMap<WatchDescriptor, Place>>>,
}

impl CgroupWatch {
    /// Watches the cgroup of a container until that cgroup is removed.
    pub(super) fn add(&self, directory: &Path, id: &str) -> io::Result<()> {
        // Under the lock, so that no event comes before its place is known.
        let mut places = lock(&self.places);
        let descriptor =
            self.inotify.add_watch(directory, AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_ONLYDIR)?;
        places.insert(descriptor, Place::Cgroup(id.to_owned()));
        Ok(())
    }
}

/// Files of a cgroup that are written when processes come or are frozen: no update does that.
const NO_UPDATE: [&str; 3] = ["cgroup.procs", "cgroup.threads", "cgroup.freeze"];

/// The watches.
#[derive(Debug)]
pub(super) struct StateWatch {
    inotify: Arc<Inotify>,
    places: Arc<Mutex<HashMap<WatchDescriptor, Place>>>,
}

impl StateWatch {
    /// For adding cgroups.
    pub(super) fn cgroups(&self) -> CgroupWatch {
        CgroupWatch { inotify: Arc::clone(&self.inotify), places: Arc::clone(&self.places) }
    }

    /// Watches what is there now, and the parents of what is not.
    pub(super) fn start() -> io::Result<StateWatch> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut watch = StateWatch { inotify: Arc::new(inotify), places: Arc::default() };
        for directory in &STATE_DIRECTORIES {
            let parent = Path::new(directory.path).parent().expect("a state directory is not the root");
            watch.add(parent, Place::Parent)?;
        }
        watch.look_for_directories(&mut Vec::new());
        Ok(watch)
    }

    /// What appeared or changed since the last time. An
    /// error means that events were lost; everything that is there now is watched again then.
    pub(super) fn receive(&mut self) -> io::Result<Vec<Changed>> {
        let mut changed = Vec::new();
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno.into()),
            };
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    self.look_for_directories(&mut Vec::new());
                    return Err(io::Error::other("the queue overflowed"));
                }
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    lock(&self.places).remove(&event.wd);
                    continue;
                }
                let name = event.name.as_deref().and_then(|name| name.to_str()).unwrap_or_default();
                let place = lock(&self.places).get(&event.wd).cloned();
                match place {
                    Some(Place::Parent) if is_state_directory(name) => self.look_for_directories(&mut changed),
                    Some(Place::Directory(index)) if event.mask.contains(AddWatchFlags::IN_CREATE) => {
                        self.look_for_container(index, name, &mut changed);
                    }
                    Some(Place::Container(index, id))
                        if name == STATE_DIRECTORIES[index].file || name == "exec.fifo" =>
                    {
                        changed.push(Changed::State(index, id));
                    }
                    Some(Place::Cgroup(id)) if !NO_UPDATE.contains(&name) => changed.push(Changed::Cgroup(id)),
                    _ => {}
                }
            }
        }
        changed.dedup();
        Ok(changed)
    }

    /// Watches a path; what does not exist yet is no error.
    fn add(&mut self, path: &Path, place: Place) -> io::Result<bool> {
        let flags = match place {
            Place::Parent => AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
            Place::Directory(_) => AddWatchFlags::IN_CREATE,
            Place::Container(..) | Place::Cgroup(_) => {
                AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_CLOSE_WRITE
            }
        };
        match self.inotify.add_watch(path, flags | AddWatchFlags::IN_ONLYDIR) {
            Ok(descriptor) => {
                lock(&self.places).insert(descriptor, place);
                Ok(true)
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn look_for_directories(&mut self, changed: &mut Vec<Changed>) {
        for (index, directory) in STATE_DIRECTORIES.iter().enumerate() {
            match self.add(Path::new(directory.path), Place::Directory(index)) {
                // Those that are already in it made their event before there was a watch.
                Ok(true) => {
                    for id in runtime::ids(directory) {
                        self.look_for_container(index, &id, changed);
                    }
                }
                Ok(false) => {}
                Err(error) => tracing::error!("cannot watch {}: {error}", directory.path),
            }
        }
    }

    fn look_for_container(&mut self, index: usize, id: &str, changed: &mut Vec<Changed>) {
        let path = Path::new(STATE_DIRECTORIES[index].path).join(id);
        match self.add(&path, Place::Container(index, id.to_owned())) {
            Ok(true) => changed.push(Changed::State(index, id.to_owned())),
            Ok(false) => {}
            Err(error) => tracing::error!(container = id, "cannot watch {}: {error}", path.display()),
        }
    }
}

impl AsFd for StateWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_state_directory(name: &str) -> bool {
    STATE_DIRECTORIES.iter().any(|directory| Path::new(directory.path).ends_with(name))
}
