//! Device nodes in a container with a user namespace. mknod(2) is refused there, and what is mounted from inside lets no
//! device be opened: so the node is a file of the host's ([`Held`]), mounted over an empty file of the container's.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Stat, StatxAttributes, StatxFlags, fstat, openat, statat, statx, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

use crate::core::device::Number;
use crate::core::ledger::Node;
use crate::failpoint::reached;
use crate::sys::held::{self, Held};
use crate::sys::label;
use crate::sys::mount::seen_on_host;
use crate::sys::namespace::Inside;
use crate::sys::node::{NodeError, number_of};
use crate::sys::user_namespace::UserNamespace;

/// What is done on the host, by the thread that waits for the one inside.
pub(super) type Errand = Box<dyn FnOnce() + Send>;

/// What is needed of the host for work in such a container.
pub struct Mapped<'a> {
    /// Its ids.
    pub users: UserNamespace,
    /// The user who made its user namespace: whose container it is.
    pub made_by: u32,
    /// The files of its nodes.
    pub held: Held,
    /// `/proc/self/fd` of the host's: the container's `/proc` may be anything.
    pub descriptors: OwnedFd,
    pub(super) errands: &'a dyn Fn(Errand),
}

impl fmt::Debug for Mapped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped").field("held", &self.held).finish_non_exhaustive()
    }
}

impl Mapped<'_> {
    /// Has the host do something with the files. Fails when nobody waits for the outcome any more.
    fn on_host<T: Send + 'static>(&self, work: impl FnOnce(&Held) -> T + Send + 'static) -> io::Result<T> {
        let (done, outcome) = mpsc::sync_channel(1);
        let held = self.held.clone();
        (self.errands)(Box::new(move || drop(done.send(work(&held)))));
        outcome.recv().map_err(|_| io::Error::other("it took too long"))
    }
}

/// Puts a node there. At the name is nothing, or an empty file of ours ([`is_placeholder`]), as `has_place` says. On failure
/// its file stays.
pub(super) fn put(
    inside: Inside<'_>,
    mapped: &Mapped<'_>,
    directory: &OwnedFd,
    name: &str,
    has_place: bool,
    number: Number,
    node: &Node,
) -> Result<(), NodeError> {
    let failed = |source| NodeError::Failed { what: format!("mount a device node at {}", node.path), source };
    let (path, owner, mode) = (node.path.clone(), mapped.users.owner_of(node), node.mode);
    // That of what is made beside it, as a node has it that is made by mknod(2).
    let label = label::of(directory).ok();
    let made = mapped.on_host(move |held| held.make(&path, number, owner, mode, label.as_deref()));
    let mount = made.and_then(|made| made).map_err(failed)?;
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Nobody inside but its root can open it in the moment before it is a device.
    let place = match has_place {
        true => openat(directory, name, flags | OFlags::PATH, Mode::empty()),
        false => openat(directory, name, flags | OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, Mode::empty()),
    };
    let place = place.map_err(NodeError::failed(inside.as_its_root(format!("make the file {}", node.path))))?;
    reached("node: an empty file is made");
    let over = || {
        if !is_placeholder(mapped, &fstat(&place).map_err(|errno| failed(errno.into()))?) {
            return Err(failed(Errno::STALE.into()));
        }
        if inside.is_given_up() {
            return Err(NodeError::Refused(format!("the directory of {} answered too late", node.path)));
        }
        // It may be bound there from elsewhere.
        refuse_shared(mapped, &place, &node.path)?;
        let by_descriptor = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", &place, "", by_descriptor).map_err(|errno| failed(errno.into()))
    };
    if let Err(error) = over() {
        let _ = remove_placeholder(mapped, directory, name);
        return Err(error);
    }
    reached("node: mounted");
    Ok(())
}

/// Refuses a place where what is mounted would appear on the host, too.
pub(super) fn refuse_shared(mapped: &Mapped<'_>, place: &OwnedFd, path: &str) -> Result<(), NodeError> {
    let looked = |source| NodeError::Failed { what: format!("look at the mount of {path}"), source };
    match seen_on_host(&mapped.descriptors, place).map_err(looked)? {
        Some(host) => Err(NodeError::Refused(format!(
            "{path} is mounted with shared propagation, and what is mounted there would appear in {host} on the host: mount it with private or slave propagation"
        ))),
        None => Ok(()),
    }
}

/// Takes a node of this device away; if it is ours, its file has made it useless before. What is mounted is unmounted, also the
/// host's own node that a runtime has bound there; of that, nothing changes. `false` where the name has come to mean something else.
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
    // The very mount, whatever the name means by now. Nothing else in a visit goes by where the thread is.
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

/// Whether the node at that path, with this name in its directory, was put there by [`put`].
pub(super) fn is_ours(mapped: &Mapped<'_>, directory: &OwnedFd, name: &str, path: &str) -> bool {
    let path = path.to_owned();
    let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| (stat.st_dev, stat.st_ino));
    found.is_ok_and(|id| mapped.on_host(move |held| held.id(&path)).ok().flatten() == Some(id))
}

/// Whether that is a node of ours which its file has made useless.
pub(super) fn is_useless(mapped: &Mapped<'_>, stat: &Stat) -> bool {
    (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (0, 0, 0)
        && number_of(stat).is_some()
        && mapped.on_host(|_| held::device()).ok().flatten() == Some(stat.st_dev)
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
