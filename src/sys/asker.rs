//! The child of [`crate::sys::probe`]: it makes system calls on what the parent has prepared, and nothing else. It
//! neither allocates nor takes a lock, so that it may be born of a process with more threads than one.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, Stat, StatVfsMountFlags, fstat, fstatvfs, open, openat, openat2};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::core::device::Number;
use crate::sys::host::Host;
use crate::sys::node::number_of;
use crate::sys::process::{User, has_exited};

/// Where a child stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i64)]
pub(super) enum Step {
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

pub(super) const STEPS: [Step; 10] = [
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
pub(super) struct Record {
    pub(super) step: i64,
    pub(super) errno: i64,
    /// -1 where it was not asked.
    pub(super) filter: i64,
    pub(super) user: i64,
    pub(super) open: i64,
    pub(super) directory: i64,
    pub(super) nodev: i64,
    pub(super) stat: Stat,
}

pub(super) const RECORD_SIZE: usize = size_of::<Record>();

/// What the child works on. All of it is made before it is born.
pub(super) struct Prepared<'a> {
    pub(super) procs: OwnedFd,
    pub(super) answer: OwnedFd,
    pub(super) inside: Option<Inside<'a>>,
    pub(super) node: Option<BorrowedFd<'a>>,
    pub(super) access: i32,
    pub(super) flags: OFlags,
    pub(super) user: Option<&'a User>,
    pub(super) open: Option<Number>,
    pub(super) parent: Pid,
}

pub(super) struct Inside<'a> {
    pub(super) pidfd: BorrowedFd<'a>,
    pub(super) root: CString,
    pub(super) path: CString,
    pub(super) directory: CString,
    pub(super) name: CString,
    pub(super) host: Host,
}

/// The child's whole life: system calls, one record, and the end.
pub(super) fn live(prepared: &Prepared<'_>) -> ! {
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
    close_others(prepared);
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
    become_user(user, &record.stat).map_err(at(Step::BecomeUser))?;
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

/// Whatever happens to this process in the container, it keeps no lock and no socket of its parent's.
fn close_others(prepared: &Prepared<'_>) {
    let pidfd = prepared.inside.as_ref().map_or(-1, |inside| inside.pidfd.as_raw_fd());
    let node = prepared.node.map_or(-1, |node| node.as_raw_fd());
    let mut kept = [2, prepared.procs.as_raw_fd(), prepared.answer.as_raw_fd(), pidfd, node];
    kept.sort_unstable();
    for (at, fd) in kept.into_iter().enumerate().filter(|(_, fd)| *fd >= 2) {
        let next = kept.get(at + 1).map_or(libc::c_uint::MAX, |next| *next as libc::c_uint);
        let first = fd as libc::c_uint + 1;
        if first < next {
            let last = next.saturating_sub(u32::from(next != libc::c_uint::MAX));
            // SAFETY: nobody in this process uses what is closed.
            unsafe { libc::close_range(first, last, 0) };
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
fn become_user(user: &User, node: &Stat) -> std::result::Result<(), Errno> {
    #[repr(C)]
    struct Header(u32, i32);
    /// Effective, permitted, inheritable (linux/capability.h), low half and high half.
    type Data = [[u32; 3]; 2];
    const VERSION_3: u32 = 0x2008_0522;
    // capable_wrt_inode_uidgid() of kernel/capability.c.
    let counts = user.namespace.as_ref().is_none_or(|namespace| namespace.knows(node.st_uid, node.st_gid));
    let held = if counts { user.capabilities as u32 } else { 0 };
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
