//! A directory of the host's, mounted read-only into a container.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxFlags, fstat, fstatvfs, mkdirat, openat, statat, statx,
};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

use crate::core::mountinfo::{peer_group, receiver};
use crate::sys::directory::{remove_directories, resolve, split};
use crate::sys::group::own_descriptors;
use crate::sys::label;
use crate::sys::namespace::Inside;
use crate::sys::node::NodeError;

/// Device and inode of a directory.
pub type DirectoryId = (u64, u64);

/// A directory, cloned as a mount that is nowhere yet, and what is needed to find the right place for it.
#[derive(Debug)]
pub struct Detached {
    tree: OwnedFd,
    descriptors: OwnedFd,
}

/// What is at the place for the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// This one; it was there, or was mounted now.
    Ours(DirectoryId),
    /// The host's own.
    Hosts,
    /// What the container keeps itself: it runs systemd, or a udevd.
    Own {
        /// Whether that is, or will be, a udevd: systemd starts one where `/sys` can be written to
        /// (ConditionPathIsReadWrite= in systemd-udevd.service).
        has_udevd: bool,
    },
}

/// The device and the inode of a directory.
pub fn id_of(path: &Path) -> io::Result<DirectoryId> {
    let stat = rustix::fs::stat(path)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Clones the mount of a directory: read-only, without devices, programs and set-user-id, and of no peer group
/// (open_tree(2), mount_setattr(2)).
pub fn detached(directory: &Path) -> io::Result<Detached> {
    let descriptors = own_descriptors()?;
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    Ok(Detached { tree: clone(directory, set, 0)?, descriptors })
}

/// Clones the mount of what lies there, as one that is nowhere yet and of no peer group. Attributes are set and cleared.
pub(super) fn clone(path: &Path, set: u64, clear: u64) -> io::Result<OwnedFd> {
    /// `struct mount_attr`.
    #[repr(C)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let tree = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let attributes = Attributes { set, clear, propagation: libc::MS_PRIVATE, user_namespace: 0 };
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
    if result == 0 { Ok(tree) } else { Err(io::Error::last_os_error()) }
}

/// What a container keeps itself of udev's.
pub fn own(inside: Inside<'_>, path: &str, runs_systemd: bool) -> Result<Option<At>, NodeError> {
    let control = resolve(inside, path)?.is_some_and(|it| statat(&it, "control", AtFlags::SYMLINK_NOFOLLOW).is_ok());
    if control {
        return Ok(Some(At::Own { has_udevd: true }));
    }
    if !runs_systemd && resolve(inside, "/run/systemd/system")?.is_none() {
        return Ok(None);
    }
    let sys = resolve(inside, "/sys")?.and_then(|sys| fstatvfs(sys).ok());
    let has_udevd = sys.is_some_and(|sys| !sys.f_flag.contains(StatVfsMountFlags::RDONLY));
    Ok(Some(At::Own { has_udevd }))
}

/// What SELinux calls the container's files: those in its `/dev`.
pub fn label_of_files(inside: Inside<'_>) -> Option<String> {
    label::of(resolve(inside, "/dev").ok()??).ok()
}

/// Mounts the directory at this path, which is made where it is missing; unless one of `ours` is there already, or the
/// host's own, or the container keeps it itself, which `keeps` tells. What was `made` for it is pushed, outermost first.
pub fn show(
    inside: Inside<'_>,
    detached: &Detached,
    path: &str,
    (ours, hosts): (&[DirectoryId], Option<DirectoryId>),
    keeps: impl FnOnce() -> Result<Option<At>, NodeError>,
    made: &mut Vec<String>,
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
    }
    if let Some(own) = keeps()? {
        return Ok(own);
    }
    // Where its directory is the host's, nothing is made.
    if let Some(directory) = resolve(inside, above)? {
        let stat = fstat(&directory).map_err(failed("look above"))?;
        if (stat.st_dev, stat.st_ino) == inside.host.run {
            return Ok(At::Hosts);
        }
    }
    let directory = make_directory(inside, path, made)?;
    let look = |source| NodeError::Failed { what: format!("look at the mount of {path}"), source };
    if let Some(place) = seen_on_host(&detached.descriptors, &directory).map_err(look)? {
        return Err(NodeError::Refused(format!(
            "what is mounted at {path} would appear at {place} on the host, too: mount it with private or slave propagation"
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

/// Takes the mount of that directory away from this path, if it is there, and the directories that were `made` for it, as far
/// as they are empty. `descriptors` is our own `/proc/self/fd`.
pub fn hide(
    inside: Inside<'_>,
    descriptors: &OwnedFd,
    path: &str,
    id: DirectoryId,
    made: &[String],
) -> Result<(), NodeError> {
    let failed = |what: &str| NodeError::failed(format!("{what} {path}"));
    let Some(directory) = resolve(inside, path)? else { return Ok(()) };
    let stat = fstat(&directory).map_err(failed("look at"))?;
    if (stat.st_dev, stat.st_ino) != id {
        return Ok(());
    }
    // The very mount, whatever the path means by now. Nothing else in a visit goes by where the thread is.
    rustix::process::fchdir(descriptors).map_err(failed("find the mount of"))?;
    unmount(&*directory.as_raw_fd().to_string(), UnmountFlags::DETACH).map_err(failed("unmount"))?;
    remove_directories(inside, made);
    Ok(())
}

/// Opens a directory, which is made with those above it where it is missing.
fn make_directory(inside: Inside<'_>, path: &str, made: &mut Vec<String>) -> Result<OwnedFd, NodeError> {
    if let Some(directory) = resolve(inside, path)? {
        return Ok(directory);
    }
    let (above, name) = split(path);
    let at = make_directory(inside, above, made)?;
    inside.change(&at)?;
    match mkdirat(at, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => made.push(path.to_owned()),
        Err(Errno::EXIST) => {}
        Err(errno) => {
            return Err(NodeError::failed(inside.as_its_root(format!("make the directory {path}")))(errno));
        }
    }
    resolve(inside, path)?.ok_or_else(|| NodeError::Refused(format!("{path} vanished while it was made")))
}

/// Where on the host a mount in that directory would appear as well, if it would: there it would outlive the container.
/// `descriptors` is our own `/proc/self/fd`.
pub(super) fn seen_on_host(descriptors: &OwnedFd, directory: &OwnedFd) -> io::Result<Option<String>> {
    let read = |path: &str| {
        let mut text = String::new();
        let file = openat(descriptors, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(file).read_to_string(&mut text).map(|_| text)
    };
    let id = statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
    // This thread is in the container's mount namespace, the process is not.
    let Some(group) = peer_group(&read("../../thread-self/mountinfo")?, id) else { return Ok(None) };
    Ok(receiver(&read("../mountinfo")?, group).map(str::to_owned))
}
