//! Device nodes in a container with a user namespace. mknod(2) is refused there, and what is mounted from inside lets no
//! device be opened: so the node is made on a file system of ours and mounted over an empty file of the container's.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, StatxAttributes, StatxFlags, Uid, chmodat, chownat, fstat, openat,
    statat, statx, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

use crate::core::device::Number;
use crate::core::ledger::Node;
use crate::failpoint::reached;
use crate::sys::node::number_of;
use crate::sys::user_namespace::{UserNamespace, with_ownership};
use crate::sys::workshop;

/// What is needed of the host for work in such a container.
#[derive(Debug)]
pub struct Mapped<'a> {
    /// Its ids.
    pub users: UserNamespace,
    /// The user who made its user namespace: whose container it is.
    pub made_by: u32,
    /// Its process, to come back to it from the workshop.
    pub pidfd: BorrowedFd<'a>,
    /// `/proc/self/fd` of the host's: the container's `/proc` may be anything.
    pub descriptors: OwnedFd,
}

/// Puts a node there. At the name is nothing, or an empty file of ours ([`is_placeholder`]), as `has_place` says.
pub(super) fn put(
    mapped: &Mapped<'_>,
    directory: &OwnedFd,
    name: &str,
    has_place: bool,
    number: Number,
    node: &Node,
) -> io::Result<()> {
    let mount = workshop::node(number, mapped.users.owner_of(node), node.mode, mapped.pidfd)?;
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Nobody inside but its root can open it in the moment before it is a device.
    let place = match has_place {
        true => openat(directory, name, flags | OFlags::PATH, Mode::empty())?,
        false => openat(directory, name, flags | OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, Mode::empty())?,
    };
    reached("node: an empty file is made");
    let over = || {
        if !is_placeholder(mapped, &fstat(&place)?) {
            return Err(Errno::STALE);
        }
        let by_descriptor = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", &place, "", by_descriptor)
    };
    if let Err(errno) = over() {
        let _ = remove_placeholder(mapped, directory, name);
        return Err(errno.into());
    }
    reached("node: mounted");
    Ok(())
}

/// Takes a node of this device away. What is mounted is unmounted, also the host's own node that a runtime has bound there;
/// of that, nothing changes. `false` where the name has come to mean something else.
pub(super) fn take_out(mapped: &Mapped<'_>, directory: &OwnedFd, name: &str, number: Number) -> io::Result<bool> {
    let fd = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if number_of(&fstat(&fd)?) != Some(number) {
        return Ok(false);
    }
    let found = statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    if !found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        unlinkat(directory, name, AtFlags::empty())?;
        return Ok(true);
    }
    let own_name = fd.as_raw_fd().to_string();
    if workshop::is_from_here(&fd)? {
        make_useless(mapped, &fd, &own_name)?;
        reached("node: made useless");
    }
    // The very mount, whatever the name means by now. This thread ends with its visit, so where it is does not matter.
    rustix::process::fchdir(&mapped.descriptors)?;
    unmount(&*own_name, UnmountFlags::DETACH)?;
    reached("node: unmounted");
    remove_file(directory, name, is_empty_file)?;
    Ok(true)
}

/// Removes the empty file of ours from which the container has unmounted the node, or that is left of one who was killed.
pub(super) fn remove_placeholder(mapped: &Mapped<'_>, directory: &OwnedFd, name: &str) -> Result<(), Errno> {
    remove_file(directory, name, |stat| is_placeholder(mapped, stat))
}

/// Whether it is as the file that [`put`] makes. The container may have made such a one: it loses nothing with it.
pub(super) fn is_placeholder(mapped: &Mapped<'_>, stat: &Stat) -> bool {
    is_empty_file(stat) && stat.st_mode & 0o7777 == 0 && (stat.st_uid, stat.st_gid) == mapped.users.root()
}

/// Whether the node at that name was put there by [`put`].
pub(super) fn is_ours(directory: &OwnedFd, name: &str) -> bool {
    let fd = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    fd.is_ok_and(|fd| workshop::is_from_here(fd).unwrap_or(false))
}

fn is_empty_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == 0
}

fn remove_file(directory: &OwnedFd, name: &str, may_go: impl Fn(&Stat) -> bool) -> Result<(), Errno> {
    let result = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if may_go(&stat) => unlinkat(directory, name, AtFlags::empty()),
        Ok(_) => Ok(()),
        Err(errno) => Err(errno),
    };
    match result {
        // Busy: the container has mounted something over it, and that is its own business.
        Err(Errno::NOENT | Errno::BUSY) => Ok(()),
        result => result,
    }
}

/// The container may have bound the node elsewhere: there it opens for nobody any more.
fn make_useless(mapped: &Mapped<'_>, node: &OwnedFd, own_name: &str) -> io::Result<()> {
    // It may have made the mount read-only.
    let _ = clear_read_only(node);
    // By the link in /proc: chmod of a descriptor for paths alone is no older than Linux 6.6.
    with_ownership(|| {
        // The owner first: until it is the host's root, that of the container could give the mode back.
        chownat(node, "", Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::EMPTY_PATH)?;
        chmodat(&mapped.descriptors, own_name, Mode::empty(), AtFlags::empty())?;
        Ok(())
    })
}

/// mount_setattr(2).
fn clear_read_only(mount: &OwnedFd) -> io::Result<()> {
    /// `struct mount_attr` (linux/mount.h): set, clear, propagation, user namespace.
    type Attributes = [u64; 4];
    const READ_ONLY: u64 = 1;
    let attributes: Attributes = [0, READ_ONLY, 0, 0];
    // SAFETY: the path is an empty string that lives for ever; the attributes live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
