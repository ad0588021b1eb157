//! inotify on the places of containers and on the directories above them, which come and go: a runtime makes its own with
//! its first container, containerd those of a namespace, and some take them away again.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::runtime::places::{Match, Patterns, Place, STATE_FILES, entries};

/// What a watch is on.
#[derive(Debug, Clone)]
enum Subject {
    /// A directory above containers.
    Above(PathBuf),
    /// A container's directory, in which files tell of its state.
    Container(Place),
    /// The cgroup of a container that has grants.
    Cgroup(String),
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Changed {
    /// What is at a container's place appeared or changed.
    State(Place),
    /// Somebody wrote to the cgroup of the container with this id, as a runtime's update does: it may have replaced the
    /// device programs, and our mark with them (crun 1.21, `podman update`, which leaves `status` alone).
    Cgroup(String),
}

/// Where cgroups are added to what is watched, also from another thread.
#[derive(Debug, Clone)]
pub(super) struct CgroupWatch {
    inotify: Arc<Inotify>,
    subjects: Arc<Mutex<HashMap<WatchDescriptor, Subject>>>,
}

impl CgroupWatch {
    /// Watches the cgroup of a container until that cgroup is removed.
    pub(super) fn add(&self, directory: &Path, id: &str) -> io::Result<()> {
        // Under the lock, so that no event comes before its subject is known.
        let mut subjects = lock(&self.subjects);
        let descriptor =
            self.inotify.add_watch(directory, AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_ONLYDIR)?;
        subjects.insert(descriptor, Subject::Cgroup(id.to_owned()));
        Ok(())
    }
}

/// Files of a cgroup that are written when processes come or are frozen: no update does that.
const NO_UPDATE: [&str; 3] = ["cgroup.procs", "cgroup.threads", "cgroup.freeze"];

/// The watches.
#[derive(Debug)]
pub(super) struct StateWatch {
    patterns: Patterns,
    inotify: Arc<Inotify>,
    subjects: Arc<Mutex<HashMap<WatchDescriptor, Subject>>>,
}

impl StateWatch {
    /// For adding cgroups.
    pub(super) fn cgroups(&self) -> CgroupWatch {
        CgroupWatch { inotify: Arc::clone(&self.inotify), subjects: Arc::clone(&self.subjects) }
    }

    /// Watches what is there now, and what is above it.
    pub(super) fn start(patterns: Patterns) -> io::Result<StateWatch> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut watch = StateWatch { patterns, inotify: Arc::new(inotify), subjects: Arc::default() };
        watch.look_at_all()?;
        Ok(watch)
    }

    /// What appeared or changed since the last time. An error means that events were lost; everything that is there now is
    /// watched again then.
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
                    self.look_at_all()?;
                    return Err(io::Error::other("the queue overflowed"));
                }
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    lock(&self.subjects).remove(&event.wd);
                    continue;
                }
                let name = event.name.as_deref().and_then(|name| name.to_str()).unwrap_or_default();
                let subject = lock(&self.subjects).get(&event.wd).cloned();
                match subject {
                    Some(Subject::Above(directory)) => self.look_at(&directory.join(name), &mut changed),
                    Some(Subject::Container(place)) if STATE_FILES.contains(&name) => {
                        changed.push(Changed::State(place));
                    }
                    Some(Subject::Cgroup(id)) if !NO_UPDATE.contains(&name) => changed.push(Changed::Cgroup(id)),
                    _ => {}
                }
            }
        }
        changed.dedup();
        Ok(changed)
    }

    /// Watches all that is there, from the root on, since none of it has to be there.
    fn look_at_all(&mut self) -> io::Result<()> {
        for base in self.patterns.bases() {
            for directory in base.ancestors().collect::<Vec<_>>().into_iter().rev() {
                self.add(directory, Subject::Above(directory.to_owned()))?;
            }
            self.look_at(&base, &mut Vec::new());
        }
        Ok(())
    }

    /// Something is at that path, or was a moment ago.
    fn look_at(&mut self, path: &Path, changed: &mut Vec<Changed>) {
        let result = match self.patterns.matches(path) {
            None => Ok(false),
            Some(Match::Above) => self.add(path, Subject::Above(path.to_owned())),
            Some(Match::Container(adapter)) => {
                let place = Place { adapter, path: path.to_owned() };
                let result = match adapter.has_state_files() {
                    true => self.add(path, Subject::Container(place.clone())).map(drop),
                    false => Ok(()),
                };
                changed.push(Changed::State(place));
                result.map(|()| false)
            }
        };
        match result {
            // What is already in it made its event before there was a watch.
            Ok(true) => entries(path).iter().for_each(|entry| self.look_at(entry, changed)),
            Ok(false) => {}
            Err(error) => tracing::error!("cannot watch {}: {error}", path.display()),
        }
    }

    /// Watches a directory; what does not exist, or no longer, is no error.
    fn add(&mut self, path: &Path, subject: Subject) -> io::Result<bool> {
        let flags = match subject {
            Subject::Above(_) => AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
            Subject::Container(_) | Subject::Cgroup(_) => {
                AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_CLOSE_WRITE
            }
        };
        match self.inotify.add_watch(path, flags | AddWatchFlags::IN_ONLYDIR) {
            Ok(descriptor) => {
                lock(&self.subjects).insert(descriptor, subject);
                Ok(true)
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
            Err(errno) => Err(errno.into()),
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::runtime::places::Adapter;

    fn changed(watch: &mut StateWatch) -> Vec<String> {
        let name = |changed: Changed| match changed {
            Changed::State(place) => place.path.file_name().unwrap().to_string_lossy().into_owned(),
            Changed::Cgroup(id) => id,
        };
        let mut names: Vec<String> = watch.receive().unwrap().into_iter().map(name).collect();
        names.dedup();
        names
    }

    #[test]
    fn places_are_followed_through_directories_that_come_and_go() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let pattern = |adapter, path: &str| (adapter, at(path).display().to_string());
        let patterns = [
            pattern(Adapter::Docker, "docker/runtime-*/moby/*"),
            pattern(Adapter::Lxc, "lxc.payload.*"),
            pattern(Adapter::Nspawn, "machines/*"),
        ];
        let mut watch = StateWatch::start(Patterns::of(&patterns)).unwrap();
        assert_eq!(changed(&mut watch), [""; 0]);

        // All at once, so that what is deeper is there before what is above it is watched.
        fs::create_dir_all(at("docker/runtime-runc/moby/one")).unwrap();
        fs::create_dir_all(at("docker/swarm/moby/two")).unwrap();
        fs::create_dir_all(at("lxc.monitor.web")).unwrap();
        fs::create_dir_all(at("lxc.payload.web")).unwrap();
        assert_eq!(changed(&mut watch), ["one", "lxc.payload.web"]);
        fs::write(at("docker/runtime-runc/moby/one/state.json.new"), "{}").unwrap();
        assert_eq!(changed(&mut watch), [""; 0]);
        fs::rename(at("docker/runtime-runc/moby/one/state.json.new"), at("docker/runtime-runc/moby/one/state.json"))
            .unwrap();
        assert_eq!(changed(&mut watch), ["one"]);

        fs::create_dir_all(at("machines")).unwrap();
        fs::write(at("machines/.#web"), "").unwrap();
        fs::rename(at("machines/.#web"), at("machines/web")).unwrap();
        assert_eq!(changed(&mut watch), ["web"]);

        // A level goes and comes again, and is another directory then.
        fs::remove_dir_all(at("docker")).unwrap();
        changed(&mut watch);
        fs::create_dir_all(at("docker/runtime-crun/moby")).unwrap();
        assert_eq!(changed(&mut watch), [""; 0]);
        fs::create_dir(at("docker/runtime-crun/moby/three")).unwrap();
        assert_eq!(changed(&mut watch), ["three"]);
        fs::write(at("docker/runtime-crun/moby/three/status"), "{}").unwrap();
        assert_eq!(changed(&mut watch), ["three"]);
    }

    #[test]
    fn what_is_there_at_the_start_is_watched() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("runc/k8s.io/one");
        fs::create_dir_all(&directory).unwrap();
        let pattern = format!("{}/runc/*/*", root.path().display());
        let mut watch = StateWatch::start(Patterns::of(&[(Adapter::Containerd, pattern)])).unwrap();
        fs::write(directory.join("exec.fifo"), "").unwrap();
        fs::remove_file(directory.join("exec.fifo")).unwrap();
        assert_eq!(changed(&mut watch), ["one"]);
    }
}
