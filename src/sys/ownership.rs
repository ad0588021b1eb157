//! Whose namespaces a process is in: what an ordinary user says of his containers counts only for processes in namespaces
//! that are his (ioctl_ns(2)).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fstat, open};

use crate::sys::process::Process;
use crate::sys::user_namespace::maker;

/// Why the process is no container of that user, in words; `None` where its user namespace was made by him, and its mount
/// namespace belongs to a user namespace that he made: then he may do everything in both anyway. The namespaces of the host
/// are root's, those of root's containers too, whoever runs in them.
pub fn refusal(process: &Process, uid: u32) -> io::Result<Option<String>> {
    let own = namespace("self", "user")?;
    let pid = process.pid.to_string();
    let users = namespace(&pid, "user")?;
    if is_same(&users, &own)? {
        return Ok(Some(format!("its process {pid} is in the user namespace of the host")));
    }
    let owner = maker(&users)?;
    if owner != uid {
        return Ok(Some(format!("its process {pid} is in a user namespace of user {owner}")));
    }
    let mounts = namespace(&pid, "mnt")?;
    let of_mounts = user_namespace_of(mounts.as_fd())?;
    let is_hosts = is_same(&of_mounts, &own)?;
    let owner = if is_hosts { 0 } else { maker(&of_mounts)? };
    if is_hosts || owner != uid {
        return Ok(Some(format!("its process {pid} is in a mount namespace of user {owner}")));
    }
    // All of it was looked at by number.
    if process.has_exited() {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(None)
}

fn namespace(pid: &str, kind: &str) -> io::Result<OwnedFd> {
    Ok(open(format!("/proc/{pid}/ns/{kind}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

fn is_same(a: &OwnedFd, b: &OwnedFd) -> io::Result<bool> {
    let (a, b) = (fstat(a)?, fstat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// `NS_GET_USERNS`: the user namespace that a namespace belongs to.
fn user_namespace_of(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: this request has no argument.
    match unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) } {
        // SAFETY: the kernel has just made this descriptor (with O_CLOEXEC, `ns_ioctl` in fs/nsfs.c) for us alone.
        fd if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
