//! A question that a child process asks from inside a container: what the kernel would answer to open(2) there.
//!
//! faccessat(2) passes the node's mode and the device filter (`devcgroup_inode_permission` in fs/namei.c) but not the
//! driver: no tty is opened, no watchdog is armed. The child makes system calls only, on what the parent has prepared.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags, Stat, StatVfsMountFlags, fstat, fstatvfs, open, openat, openat2};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};

use crate::core::device::{Access, Number};
use crate::core::proof::{Answer, Found, Seen};
use crate::error::{Error, Result};
use crate::sys::cgroup::Cgroup;
use crate::sys::host::Host;
use crate::sys::node::{number_of, split, what_is};
use crate::sys::process::{Process, User, has_exited};

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

/// Where a child stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i64)]
enum Step {
    Done = 0,
    JoinCgroup,
    Root,
    HostsRoot,
    Exited,
    JoinMounts,
    Resolve,
    Find,
    Look,
    BecomeUser,
}

const STEPS: [Step; 10] = [
    Step::Done,
    Step::JoinCgroup,
    Step::Root,
    Step::HostsRoot,
    Step::Exited,
    Step::JoinMounts,
    Step::Resolve,
    Step::Find,
    Step::Look,
    Step::BecomeUser,
];

/// What the child writes into the pipe, in one piece.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Record {
    step: i64,
    errno: i64,
    /// -1 where it was not asked.
    filter: i64,
    user: i64,
    open: i64,
    directory: i64,
    nodev: i64,
    stat: Stat,
}

const RECORD_SIZE: usize = size_of::<Record>();

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

/// What the child works on. All of it is made before it is born.
struct Prepared<'a> {
    procs: OwnedFd,
    answer: OwnedFd,
    inside: Option<Inside<'a>>,
    node: Option<BorrowedFd<'a>>,
    access: i32,
    flags: OFlags,
    user: Option<&'a User>,
    open: Option<Number>,
    parent: Pid,
}

struct Inside<'a> {
    pidfd: BorrowedFd<'a>,
    root: CString,
    path: CString,
    directory: CString,
    name: CString,
    host: Host,
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
    // SAFETY: the child calls nothing but `child`, which makes system calls and neither allocates nor takes a lock.
    let pid = match unsafe { libc::fork() } {
        0 => child(&prepared),
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

/// The child's whole life: system calls, one record, and the end.
fn child(prepared: &Prepared<'_>) -> ! {
    // SAFETY: a record is integers only.
    let mut record: Record = unsafe { std::mem::zeroed() };
    (record.filter, record.user, record.open) = (-1, -1, -1);
    if let Err((step, errno)) = answer(prepared, &mut record) {
        (record.step, record.errno) = (step as i64, i64::from(errno.raw_os_error()));
    }
    // SAFETY: the record is integers only; the pipe takes it whole, and nobody reads what is not written.
    unsafe {
        libc::write(prepared.answer.as_raw_fd(), (&raw const record).cast(), RECORD_SIZE);
        libc::_exit(0)
    }
}

fn answer(prepared: &Prepared<'_>, record: &mut Record) -> std::result::Result<(), (Step, Errno)> {
    let at = |step: Step| move |errno: Errno| (step, errno);
    stay_ours(prepared.parent);
    // What it is compared with and looked up by is the host's.
    let own_fds = open(c"/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let opened;
    let mut root = None;
    let node = match &prepared.inside {
        None => {
            rustix::io::write(&prepared.procs, b"0").map_err(at(Step::JoinCgroup))?;
            prepared.node.expect("a node or a path is given")
        }
        Some(inside) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let its_root = open(&*inside.root, flags, Mode::empty()).map_err(at(Step::Root))?;
            // It was opened by number: while the process has not exited it is sure whose it is.
            if has_exited(inside.pidfd) {
                return Err((Step::Exited, Errno::SRCH));
            }
            let stat = fstat(&its_root).map_err(at(Step::Root))?;
            if (stat.st_dev, stat.st_ino) == inside.host.root {
                return Err((Step::HostsRoot, Errno::PERM));
            }
            rustix::io::write(&prepared.procs, b"0").map_err(at(Step::JoinCgroup))?;
            // SAFETY: plain setns(2); this process has one thread.
            check(unsafe { libc::setns(inside.pidfd.as_raw_fd(), libc::CLONE_NEWNS) }.into())
                .map_err(at(Step::JoinMounts))?;
            let directory =
                resolve(its_root.as_fd(), &inside.directory, OFlags::DIRECTORY).map_err(at(Step::Resolve))?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            opened = openat(&directory, &*inside.name, flags, Mode::empty()).map_err(at(Step::Find))?;
            root = Some((its_root, &inside.path));
            opened.as_fd()
        }
    };
    record.stat = fstat(node).map_err(at(Step::Look))?;
    let Some(number) = number_of(&record.stat) else { return Ok(()) };
    let mount = fstatvfs(node).map_err(at(Step::Look))?;
    record.nodev = i64::from(mount.f_flag.contains(StatVfsMountFlags::NODEV));
    record.filter = may(node, prepared.access);
    let Some(user) = prepared.user else { return Ok(()) };
    become_user(user).map_err(at(Step::BecomeUser))?;
    stay_ours(prepared.parent);
    if let Some((root, path)) = &root
        && let Err(errno) = resolve(root.as_fd(), path, OFlags::NOFOLLOW)
    {
        (record.user, record.directory) = (i64::from(errno.raw_os_error()), 1);
        return Ok(());
    }
    record.user = may(node, prepared.access);
    if prepared.open == Some(number) && record.filter == 0 && record.user == 0 {
        record.open = match own_fds {
            Ok(own_fds) => really_open(own_fds.as_fd(), node, prepared.flags),
            Err(errno) => i64::from(errno.raw_os_error()),
        };
    }
    Ok(())
}

/// Dies with the parent, and is no business of the container's processes even where they see it (`--pid=host`).
/// Becoming another user takes both back.
fn stay_ours(parent: Pid) {
    // SAFETY: both requests take numbers.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        if rustix::process::getppid() != Some(parent) {
            libc::_exit(1);
        }
    }
}

fn resolve(root: BorrowedFd<'_>, path: &CStr, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // EAGAIN: a rename went on somewhere and the kernel could not be sure (openat2(2)).
    let mut result = Err(Errno::AGAIN);
    for _ in 0..64 {
        result = openat2(root, path, flags, Mode::empty(), how);
        if !matches!(result, Err(Errno::AGAIN)) {
            break;
        }
    }
    result
}

/// faccessat2(2) on the node itself, with the effective ids.
fn may(node: BorrowedFd<'_>, access: i32) -> i64 {
    let flags = libc::AT_EMPTY_PATH | libc::AT_EACCESS;
    // SAFETY: the path is an empty string that lives for ever.
    let result = unsafe { libc::syscall(libc::SYS_faccessat2, node.as_raw_fd(), c"".as_ptr(), access, flags) };
    check(result).map_or_else(|errno| i64::from(errno.raw_os_error()), |()| 0)
}

/// Opens the very node that was asked about, by the link that /proc has to it, and closes it.
fn really_open(own_fds: BorrowedFd<'_>, node: BorrowedFd<'_>, flags: OFlags) -> i64 {
    let mut name = [0u8; 12];
    let mut at = name.len() - 1;
    let mut rest = node.as_raw_fd();
    while at == name.len() - 1 || rest > 0 {
        at -= 1;
        name[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let Ok(name) = CStr::from_bytes_until_nul(&name[at..]) else { return i64::from(libc::EINVAL) };
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    openat(own_fds, name, flags, Mode::empty()).map_or_else(|errno| i64::from(errno.raw_os_error()), |_| 0)
}

/// Takes on ids, groups and the capabilities that pass over permission bits. The raw calls are for this thread alone,
/// the only one; the C library's would look for others.
fn become_user(user: &User) -> std::result::Result<(), Errno> {
    #[repr(C)]
    struct Header(u32, i32);
    /// Effective, permitted, inheritable (linux/capability.h), low half and high half.
    type Data = [[u32; 3]; 2];
    const VERSION_3: u32 = 0x2008_0522;
    let held = user.capabilities as u32;
    let data: Data = [[held, held, 0], [0; 3]];
    let header = Header(VERSION_3, 0);
    // SAFETY: the list of groups and both structures live until the calls return and are as long as they say.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1).into())?;
        check(libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid))?;
        check(libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid))?;
        check(libc::syscall(libc::SYS_capset, &raw const header, &raw const data))
    }
}

fn check(result: libc::c_long) -> std::result::Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    // SAFETY: the address of this thread's errno is always valid.
    Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
}
