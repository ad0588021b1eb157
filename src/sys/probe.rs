//! A question that a child process asks from inside a container: what the kernel would answer to open(2) there.
//!
//! faccessat(2) passes the node's mode and the device filter (`devcgroup_inode_permission` in fs/namei.c) but not the
//! driver: no tty is opened, no watchdog is armed.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};

use crate::core::device::{Access, Number};
use crate::core::proof::{Answer, Found, Seen};
use crate::error::{Error, Result};
use crate::sys::asker::{Inside, Prepared, RECORD_SIZE, Record, STEPS, Step, live};
use crate::sys::cgroup::Cgroup;
use crate::sys::directory::split;
use crate::sys::host::Host;
use crate::sys::node::{number_of, what_is};
use crate::sys::process::{Process, User};

/// How long the child may take. It takes microseconds, but a container can mount what never answers, or be frozen.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is asked about.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// A node that is open with `O_PATH`, wherever it is.
    Node(BorrowedFd<'a>),
    /// A path inside a container, resolved below its root without following links.
    Inside {
        /// Its init, whose mount namespace is joined.
        process: &'a Process,
        /// What it must not be.
        host: Host,
        /// Absolute.
        path: &'a str,
    },
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The container, for messages.
    pub label: &'a str,
    /// The cgroup to ask from. It must not be frozen.
    pub cgroup: &'a Cgroup,
    /// The node.
    pub place: Place<'a>,
    /// Reading, writing or both.
    pub access: Access,
    /// Who asks, after root.
    pub user: Option<&'a User>,
    /// Whether to open the node too, if it is this device's and nothing else refuses.
    pub open: Option<Number>,
}

/// Asks, and waits three seconds at most. Errors are those of asking; what the kernel answers is in the answer.
pub fn ask(question: &Question<'_>) -> Result<Answer> {
    let record = run(question)?;
    let Question { label, cgroup, .. } = *question;
    let failed = |what: String| Error::InContainer {
        container: label.to_owned(),
        what,
        source: io::Error::from_raw_os_error(record.errno as i32),
    };
    let path = if let Place::Inside { path, .. } = question.place { path } else { "" };
    let parent = split(path).0;
    let found = match (STEPS[record.step.clamp(0, STEPS.len() as i64 - 1) as usize], record.errno as i32) {
        (Step::Done, _) => seen(&record),
        (Step::Exited, _) | (Step::Root | Step::JoinMounts, libc::ENOENT | libc::ESRCH) => {
            return Err(Error::ContainerExited(label.to_owned()));
        }
        (Step::HostsRoot, _) => {
            return Err(Error::Refused {
                container: label.to_owned(),
                reason: "its root directory is the host's own: it is no container, or it is still starting".into(),
            });
        }
        (Step::JoinCgroup, _) => return Err(failed(format!("have a process ask from its cgroup {}", cgroup.path))),
        (Step::Root, _) => return Err(failed("open its root".into())),
        (Step::JoinMounts, _) => return Err(failed("join its mount namespace".into())),
        (Step::Resolve | Step::Find, libc::ENOENT) => Found::Missing,
        (Step::Resolve, libc::ELOOP) => {
            Found::Blocked(format!("{parent} is or contains a symbolic link inside, which is not followed"))
        }
        (Step::Resolve, libc::ENOTDIR) => Found::Blocked(format!("{parent} is not a directory inside")),
        (Step::Resolve, _) => return Err(failed(format!("open {parent}"))),
        (Step::Find | Step::Look, _) => return Err(failed(format!("look at {path}"))),
        (Step::BecomeUser, libc::EPERM) => {
            return Err(Error::Unfit(
                "CAP_SETUID or CAP_SETGID is missing, which is needed to ask as the user of a container: run as root, with sudo"
                    .into(),
            ));
        }
        (Step::BecomeUser, _) => return Err(failed("ask as the user of its init".into())),
    };
    let errno = |value: i64| (value >= 0).then_some(value as i32);
    Ok(Answer {
        found,
        filter: errno(record.filter),
        user: errno(record.user),
        directory: record.directory != 0,
        open: errno(record.open),
    })
}

fn seen(record: &Record) -> Found {
    let stat = &record.stat;
    match number_of(stat) {
        None => Found::Other(what_is(stat)),
        Some(number) => Found::Node(Seen {
            number,
            mode: stat.st_mode & 0o777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            nodev: record.nodev != 0,
        }),
    }
}

fn run(question: &Question<'_>) -> Result<Record> {
    let label = question.label;
    let here = |what: &str| {
        let (label, what) = (label.to_owned(), what.to_owned());
        move |errno: Errno| Error::InContainer { container: label, what, source: errno.into() }
    };
    let c_string =
        |text: &str| CString::new(text).map_err(|_| Error::Usage("a path must not contain a zero byte".into()));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let procs = openat(question.cgroup, c"cgroup.procs", flags, Mode::empty());
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(here("make a pipe"))?;
    let (inside, node) = match question.place {
        Place::Node(node) => (None, Some(node)),
        Place::Inside { process, host, path } => {
            let (directory, name) = split(path);
            let inside = Inside {
                pidfd: process.as_fd(),
                root: c_string(&format!("/proc/{}/root", process.pid))?,
                path: c_string(path)?,
                directory: c_string(directory)?,
                name: c_string(name)?,
                host,
            };
            (Some(inside), None)
        }
    };
    let has = |right: Access| question.access.bits() & right.bits() != 0;
    let (access, flags) = match (has(Access::READ), has(Access::WRITE)) {
        (true, true) => (libc::R_OK | libc::W_OK, OFlags::RDWR),
        (false, true) => (libc::W_OK, OFlags::WRONLY),
        (true, false) => (libc::R_OK, OFlags::RDONLY),
        (false, false) => (libc::F_OK, OFlags::RDONLY),
    };
    let prepared = Prepared {
        procs: procs.map_err(here("open its cgroup"))?,
        answer: writer,
        inside,
        node,
        access,
        flags,
        user: question.user,
        open: question.open,
        parent: rustix::process::getpid(),
    };
    // SAFETY: the child calls nothing but `live`, which makes system calls and neither allocates nor takes a lock.
    let pid = match unsafe { libc::fork() } {
        0 => live(&prepared),
        -1 => {
            let source = io::Error::last_os_error();
            return Err(Error::InContainer {
                container: label.to_owned(),
                what: "start a process to ask".into(),
                source,
            });
        }
        pid => Pid::from_raw(pid).expect("a child's pid is positive"),
    };
    // Our copy of the pipe's other end, so that the child's death is seen as its end.
    drop(prepared);
    let child = Child { pid, pidfd: pidfd_open(pid, PidfdFlags::empty()).map_err(here("hold the process that asks"))? };
    let until = Instant::now() + PATIENCE;
    if !is_ready(reader.as_fd(), until) {
        return Err(Error::TimedOut(format!(
            "container '{label}': a process that asks in it has not answered for {} seconds: see whether it is frozen, and what is mounted on or below its /dev",
            PATIENCE.as_secs()
        )));
    }
    let mut bytes = [0u8; RECORD_SIZE];
    let length = rustix::io::read(&reader, &mut bytes).map_err(here("hear the process that asks"))?;
    is_ready(child.pidfd.as_fd(), until);
    if length != RECORD_SIZE {
        return Err(Error::InContainer {
            container: label.to_owned(),
            what: "ask in it: the process was killed".into(),
            source: io::Error::from(io::ErrorKind::Interrupted),
        });
    }
    // SAFETY: a record is integers only, and as long as the array.
    Ok(unsafe { std::mem::transmute::<[u8; RECORD_SIZE], Record>(bytes) })
}

/// Killed and reaped when dropped. One that hangs in a file system that never answers cannot be reaped: after a second
/// it is left to its fate.
struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        is_ready(self.pidfd.as_fd(), Instant::now() + Duration::from_secs(1));
        let _ = waitpid(Some(self.pid), WaitOptions::NOHANG);
    }
}

fn is_ready(fd: BorrowedFd<'_>, until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)) {
            Err(Errno::INTR) => {}
            result => return result.is_ok_and(|ready| ready > 0),
        }
    }
}
