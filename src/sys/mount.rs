//! A directory of the host's, mounted read-only into a container.

#![allow(unsafe_code)]

use std::ffi::c_long;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, fstat, mkdirat, open, openat, statat, statx};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::sys::directory::{resolve, split};
use crate::sys::namespace::Inside;
use crate::sys::node::NodeError;

/// Device and inode of a directory.
pub type DirectoryId = (u64, u64);

/// A directory, cloned as a mount that is nowhere yet, and what is needed to find the right place for it.
#[derive(Debug)]
pub struct Detached {
    tree: OwnedFd,
    proc: OwnedFd,
}

/// What is at the place for the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// This one; it was there, or was mounted now.
    Ours(DirectoryId),
    /// The host's own.
    Hosts,
    /// Something that the container keeps itself.
    Own,
}

/// The device and the inode of a directory.
pub fn id_of(path: &Path) -> io::Result<DirectoryId> {
    let stat = rustix::fs::stat(path)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Clones the mount of a directory: read-only, without devices, programs and set-user-id, and of no peer group
/// (open_tree(2), mount_setattr(2)).
pub fn detached(directory: &Path) -> io::Result<Detached> {
    /// `struct mount_attr`.
    #[repr(C)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let proc = open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let tree = open_tree(CWD, directory, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let attributes = Attributes { set, clear: 0, propagation: libc::MS_PRIVATE, user_namespace: 0 };
    // SAFETY: the path is an empty string that lives for ever, and the structure is as long as it says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    check(result)?;
    Ok(Detached { tree, proc })
}

fn check(result: c_long) -> io::Result<()> {
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts the directory at this path, which is made where it is missing; unless one of `ours` is there already, or the
/// host's own, or what the container itself `keeps` (a name in that directory, or an absolute path).
pub fn show(
    inside: Inside<'_>,
    detached: &Detached,
    path: &str,
    (ours, hosts): (&[DirectoryId], Option<DirectoryId>),
    keeps: &[&str],
) -> Result<At, NodeError> {
    let failed = |what: &str| NodeError::failed(format!("{what} {path}"));
    let (above, _) = split(path);
    if let Some(directory) = resolve(inside, path)? {
        let stat = fstat(&directory).map_err(failed("look at"))?;
        let id = (stat.st_dev, stat.st_ino);
        if ours.contains(&id) {
            return Ok(At::Ours(id));
        }
        if hosts == Some(id) {
            return Ok(At::Hosts);
        }
        let is_kept = |name: &&&str| match name.strip_prefix('/') {
            Some(_) => matches!(resolve(inside, name), Ok(Some(_))),
            None => statat(&directory, **name, AtFlags::SYMLINK_NOFOLLOW).is_ok(),
        };
        if keeps.iter().any(|name| is_kept(&name)) {
            return Ok(At::Own);
        }
    }
    // Where its directory is the host's, nothing is made.
    if let Some(directory) = resolve(inside, above)? {
        let stat = fstat(&directory).map_err(failed("look above"))?;
        if (stat.st_dev, stat.st_ino) == inside.host.run {
            return Ok(At::Hosts);
        }
    }
    let directory = make_directory(inside, path)?;
    if spreads(&directory, &detached.proc).map_err(failed("look at the mount of"))? {
        return Err(NodeError::Refused(format!(
            "what is mounted at {path} would be mounted elsewhere, too, since {above} is a shared mount"
        )));
    }
    if inside.is_given_up() {
        return Err(NodeError::Refused(format!("{above} answered too late")));
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&detached.tree, "", &directory, "", flags).map_err(failed("mount a directory at"))?;
    let stat = fstat(&detached.tree).map_err(failed("look at"))?;
    Ok(At::Ours((stat.st_dev, stat.st_ino)))
}

/// Opens a directory, which is made with those above it where it is missing.
fn make_directory(inside: Inside<'_>, path: &str) -> Result<OwnedFd, NodeError> {
    if let Some(directory) = resolve(inside, path)? {
        return Ok(directory);
    }
    let (above, name) = split(path);
    match mkdirat(make_directory(inside, above)?, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(NodeError::failed(format!("make the directory {path}"))(errno)),
    }
    resolve(inside, path)?.ok_or_else(|| NodeError::Refused(format!("{path} vanished while it was made")))
}

/// Whether what is mounted in this directory is mounted elsewhere, too: its mount is shared (mount_namespaces(7)). `proc`
/// is the host's `/proc`, which tells a thread of the mounts of the namespace that it is in.
pub(super) fn spreads(directory: impl AsFd, proc: impl AsFd) -> Result<bool, Errno> {
    let id = statx(&directory, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
    let file = openat(proc, "thread-self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = Vec::new();
    std::fs::File::from(file)
        .read_to_end(&mut text)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let id = format!("{id} ");
    let line = text.split(|byte| *byte == b'\n').find(|line| line.starts_with(id.as_bytes()));
    // The optional fields stand before a lone hyphen (proc_pid_mountinfo(5)). A mount that is not listed is out of the
    // container's sight, and nobody can tell.
    let Some(line) = line else { return Ok(true) };
    let fields = line.split(|byte| *byte == b' ').skip(6).take_while(|field| *field != b"-");
    Ok(fields.into_iter().any(|field| field.starts_with(b"shared:")))
}
