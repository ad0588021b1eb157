//! Work inside a container's mount namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno as NixErrno;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;

use crate::core::waits::Waits;
use crate::error::{Error, Result};
use crate::sys::group;
use crate::sys::held::Held;
use crate::sys::host::Host;
use crate::sys::mounted::{Errand, Mapped};
use crate::sys::node::NodeError;
use crate::sys::process::Process;
use crate::sys::user_namespace::{UserNamespace, made_by};

/// How long work inside a container may take. A container can mount a file system of its own making (FUSE) that never
/// answers, and a network file system may not; the work itself takes microseconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is longer than anything takes inside a container that answers.
const MOMENT: Duration = Duration::from_millis(50);

/// Processes (pid, start time) whose container has a thread of ours that did not come back yet.
static STUCK: Mutex<BTreeSet<(u32, u64)>> = Mutex::new(BTreeSet::new());

/// How long they have kept us waiting.
static WAITS: LazyLock<Mutex<Waits<(u32, u64)>>> = LazyLock::new(Mutex::default);
/// Since when that is counted.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A container's root directory, as seen by a thread that is in its mount namespace.
#[derive(Debug, Clone, Copy)]
pub struct Inside<'a> {
    /// Its root: all paths are resolved below this, with `RESOLVE_IN_ROOT`.
    pub root: BorrowedFd<'a>,
    /// The host that it is not.
    pub host: Host,
    /// Where it has a user namespace of its own: how nodes get there.
    pub mapped: Option<&'a Mapped<'a>>,
    given_up: &'a AtomicBool,
}

impl Inside<'_> {
    /// Whether nobody waits for the outcome any more: then nothing may be made.
    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// Has to be called before something is made or removed in a directory: no more is done there than the container's root
    /// may do.
    pub(super) fn change(&self, directory: &OwnedFd) -> std::result::Result<(), NodeError> {
        let Some(mapped) = self.mapped else { return Ok(()) };
        let result = mapped.users.minds_permissions_of(directory, mapped.made_by != 0);
        result.map_err(|source| NodeError::Failed { what: "act as its root".into(), source })
    }

    /// What is tried, in words, with what it takes.
    pub(super) fn as_its_root(&self, what: String) -> String {
        match self.mapped {
            Some(_) => format!("{what}, which root of its user namespace has to be allowed to do"),
            None => what,
        }
    }
}

/// Runs `work` on a thread of its own that has joined the container's mount namespace. The thread does nothing else, so no
/// other code of this process ever finds itself inside; its umask is zero. It ends with the work, unless somebody
/// [`stay`]s. It is waited for three seconds at most, and one that has taken as much lately is refused for a while:
/// others wait meanwhile.
///
/// Refused while the root of the process is the host's: early in a container's start the namespace is new but its root
/// is not yet, and a node would be made on the host.
pub fn inside<T: Send + 'static>(
    label: &str,
    process: &Process,
    host: Host,
    work: impl FnOnce(Inside<'_>) -> T + Send + 'static,
) -> Result<T> {
    let unresponsive = || {
        Error::TimedOut(format!(
            "container '{label}': a file system in it has not answered for {} seconds: see what is mounted on or below its /dev",
            PATIENCE.as_secs()
        ))
    };
    let key = (process.pid, process.start_time);
    if stuck().contains(&key) {
        return Err(unresponsive());
    }
    let now = || START.elapsed().as_millis() as u64;
    let waits = || WAITS.lock().unwrap_or_else(PoisonError::into_inner);
    waits().turn(&key, now()).map_err(|left| {
        Error::TimedOut(format!(
            "container '{label}': a file system in it answers too slowly, and others wait meanwhile: it has its turn again in {} seconds",
            left.div_ceil(1000)
        ))
    })?;
    let started = Instant::now();
    let given_up = Arc::new(AtomicBool::new(false));
    let (done, outcome) = mpsc::sync_channel(1);
    let its_given_up = Arc::clone(&given_up);
    let task: Task = Box::new(move |place| {
        let result =
            place.map(|Place { root, host, mapped }| work(Inside { root, host, mapped, given_up: &its_given_up }));
        // Under the lock, so that it is either in time or counted as stuck until now.
        let mut stuck = stuck();
        stuck.remove(&key);
        let _ = done.send(result);
    });
    let parked = parked().as_mut().and_then(|all| all.remove(&key));
    let visitor = parked.map_or_else(|| Visitor::start(label, process, host), Ok)?;
    // Who waits there does so until we let him go.
    let _ = visitor.tasks.send(task);
    let outcome_in_time = loop {
        let left = PATIENCE.saturating_sub(started.elapsed());
        match visitor.said.recv_timeout(left.min(MOMENT)) {
            Ok(Said::Errand(errand)) => errand(),
            Ok(Said::Done) => break outcome.try_recv().ok(),
            // Nobody is kept inside another container meanwhile.
            Err(mpsc::RecvTimeoutError::Timeout) if left > MOMENT => parked_home(),
            Err(_) => break None,
        }
    };
    waits().took(key, started.elapsed().as_millis() as u64, now());
    if let Some(result) = outcome_in_time {
        if result.is_ok() {
            visitor.park(key);
        }
        return result;
    }
    let mut stuck = stuck();
    match outcome.try_recv() {
        Ok(result) => result,
        // An errand is not done any more.
        Err(mpsc::TryRecvError::Empty) => {
            given_up.store(true, Ordering::SeqCst);
            stuck.insert(key);
            Err(unresponsive())
        }
        Err(mpsc::TryRecvError::Disconnected) => panic!("the thread inside container '{label}' panicked"),
    }
}

fn stuck() -> MutexGuard<'static, BTreeSet<(u32, u64)>> {
    STUCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a visitor is.
struct Place<'a> {
    root: BorrowedFd<'a>,
    host: Host,
    mapped: Option<&'a Mapped<'a>>,
}

/// What a visitor is given to do; where it could not get there, why.
type Task = Box<dyn FnOnce(Result<Place<'_>>) + Send>;

/// What the thread inside says to the one that waits.
enum Said {
    Errand(Errand),
    Done,
}

/// A thread that is inside a container. When this is dropped, it ends with its last task.
struct Visitor {
    process: Process,
    tasks: mpsc::Sender<Task>,
    said: mpsc::Receiver<Said>,
}

impl Visitor {
    /// Sends one there.
    fn start(label: &str, process: &Process, host: Host) -> Result<Visitor> {
        let failed = |source| Error::InContainer {
            container: label.to_owned(),
            what: "start a thread to enter it".into(),
            source,
        };
        let visit = Visit { label: label.to_owned(), process: process.clone(), host };
        let ((tasks, its_tasks), (say, said)) = (mpsc::channel(), mpsc::channel());
        std::thread::Builder::new().name("inside".into()).spawn(move || visit.run(its_tasks, &say)).map_err(failed)?;
        Ok(Visitor { process: process.clone(), tasks, said })
    }

    /// Lets it wait for the next task, if somebody stays.
    fn park(self, key: (u32, u64)) {
        if let Some(all) = parked().as_mut().filter(|all| all.len() < MOST_PARKED) {
            all.insert(key, self);
        }
    }
}

/// The visitors who wait inside for the next task, by the process that they visit; `None` while nobody stays.
static PARKED: Mutex<Option<BTreeMap<(u32, u64), Visitor>>> = Mutex::new(None);

/// The process with this number and start time, if somebody waits where it is: it need not be looked for anew.
pub fn visited(pid: u32, start_time: u64) -> Option<Process> {
    let visited = parked().as_ref().and_then(|all| Some(all.get(&(pid, start_time))?.process.clone()));
    visited.filter(|process| !process.has_exited())
}

/// Lets all of them go.
fn parked_home() {
    if let Some(all) = parked().as_mut() {
        all.clear();
    }
}

/// How many wait at most: each is a thread.
const MOST_PARKED: usize = 32;

fn parked() -> MutexGuard<'static, Option<BTreeMap<(u32, u64), Visitor>>> {
    PARKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See [`stay`].
#[must_use]
#[derive(Debug)]
pub struct Stay(());

/// Until this is dropped, the threads that have work [`inside`] containers wait there for more: one event has several
/// things to do in each. That is for a moment, since they keep the containers' file systems busy.
pub fn stay() -> Stay {
    parked().get_or_insert_default();
    Stay(())
}

impl Drop for Stay {
    fn drop(&mut self) {
        *parked() = None;
    }
}

/// What the thread needs of its own.
struct Visit {
    label: String,
    process: Process,
    host: Host,
}

impl Visit {
    fn run(self, tasks: mpsc::Receiver<Task>, say: &mpsc::Sender<Said>) {
        let errands = |errand| drop(say.send(Said::Errand(errand)));
        let entered = self.enter(&errands);
        let mut tasks = tasks.into_iter();
        let (root, mapped) = match entered {
            Ok(entered) => entered,
            Err(error) => {
                if let Some(task) = tasks.next() {
                    task(Err(error));
                    let _ = say.send(Said::Done);
                }
                return;
            }
        };
        for task in tasks {
            let place = Place { root: root.as_fd(), host: self.host, mapped: mapped.as_ref() };
            task(self.begin(mapped.as_ref()).map(|()| place));
            let _ = say.send(Said::Done);
        }
    }

    /// Joins the mount namespace. Returns the container's root and what its user namespace needs.
    fn enter<'a>(&self, errands: &'a dyn Fn(Errand)) -> Result<(OwnedFd, Option<Mapped<'a>>)> {
        let path = format!("/proc/{}/root", self.process.pid);
        let root = match open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(root) => root,
            // A process that is ending has neither root nor namespaces any more, a moment before its end is reported.
            Err(Errno::NOENT | Errno::SRCH) => return Err(self.exited()),
            Err(error) => return Err(self.failed(&format!("open its root {path}"), error.into())),
        };
        let stat = fstat(&root).map_err(|error| self.failed("stat its root", error.into()))?;
        if (stat.st_dev, stat.st_ino) == self.host.root {
            return Err(Error::Refused {
                container: self.label.clone(),
                reason: "its root directory is the host's own: it is no container, or it is still starting".into(),
            });
        }
        let mapped = match self.mapped(errands) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Err(self.exited()),
            Err(error) => return Err(self.failed("prepare for its user namespace", error)),
            Ok(mapped) => mapped,
        };
        // A thread that shares its root and umask with others may not change mount namespaces (setns(2)).
        match unshare(CloneFlags::CLONE_FS).and_then(|()| setns(self.process.as_fd(), CloneFlags::CLONE_NEWNS)) {
            Err(NixErrno::ESRCH) => return Err(self.exited()),
            Err(error) => return Err(self.failed("join its mount namespace", error.into())),
            Ok(()) => {}
        }
        rustix::process::umask(Mode::empty());
        Ok((root, mapped))
    }

    /// Before each task: whatever the one before has changed of what this thread may do.
    fn begin(&self, mapped: Option<&Mapped<'_>>) -> Result<()> {
        // Root and ids were looked up by number before: only now it is sure whose they are. And a container that ends
        // takes its file systems along.
        if self.process.has_exited() {
            return Err(self.exited());
        }
        let act = |mapped: &Mapped<'_>| mapped.users.make_files_as_root(mapped.made_by != 0);
        mapped.map_or(Ok(()), act).map_err(|error| self.failed("act as its root", error))
    }

    /// Where it has a user namespace: what has to be at hand before its mount namespace is joined.
    fn mapped<'a>(&self, errands: &'a dyn Fn(Errand)) -> std::io::Result<Option<Mapped<'a>>> {
        let Some(users) = UserNamespace::of(self.process.pid)? else { return Ok(None) };
        let (made_by, held) = (made_by(self.process.pid)?, Held::of(self.process.pid, self.process.start_time));
        Ok(Some(Mapped { users, made_by, held, descriptors: group::own_descriptors()?, errands }))
    }

    fn exited(&self) -> Error {
        Error::ContainerExited(self.label.clone())
    }

    fn failed(&self, what: &str, source: std::io::Error) -> Error {
        if self.process.has_exited() {
            return self.exited();
        }
        Error::InContainer { container: self.label.clone(), what: what.to_owned(), source }
    }
}
