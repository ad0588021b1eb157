//! A mount namespace of our own in which nodes are made that are to be mounted elsewhere.
//!
//! Before Linux 6.15 open_tree(2) clones only what is mounted in the caller's namespace. A copy of the host's namespace for
//! each node would cost with the host's mounts; this one has nothing in it and keeps none of them busy.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid, chownat, fstatfs, mkdir, open};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, mount_change, move_mount, open_tree,
    unmount,
};

use crate::core::device::Number;
use crate::sys::node::make_at;

/// TMPFS_MAGIC (linux/magic.h).
const TMPFS: u64 = 0x0102_1994;
/// Size of a file system with a node: its root directory and the node, and no room for data.
const INODES: u64 = 2;
const BLOCKS: u64 = 1;

/// Where a node's file system is mounted for a moment.
const BENCH: &str = "/bench";

/// The namespace; it is made when it is first needed, and ends with this process.
static NAMESPACE: Mutex<Option<OwnedFd>> = Mutex::new(None);

fn namespace() -> MutexGuard<'static, Option<OwnedFd>> {
    NAMESPACE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the namespace, if there is none yet. The calling thread must be on the host.
pub fn prepare() -> io::Result<()> {
    let mut namespace = namespace();
    if namespace.is_none() {
        let made = std::thread::Builder::new().name("workshop".into()).spawn(build)?;
        *namespace = Some(made.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")))?);
    }
    Ok(())
}

/// On a thread that ends with it.
fn build() -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let namespace = open("/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // Any directory that every host has: nobody else sees it.
    mount("none", "/dev", "tmpfs", MountFlags::empty(), c"mode=0711,size=4k,nr_inodes=4")?;
    std::env::set_current_dir("/dev")?;
    // Both on one directory: the old root then lies over the new one until it is taken away (pivot_root(2)).
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    mkdir(BENCH, Mode::RWXU)?;
    Ok(namespace)
}

/// Makes a node on a file system of its own, and returns its mount, which is nowhere yet. The thread must share its root
/// directory with no other one. It goes to the workshop and `back` to the mount namespace of the process behind that pidfd.
pub fn node(number: Number, (uid, gid): (u32, u32), mode: u32, back: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let namespace = namespace();
    let place = namespace.as_ref().ok_or_else(|| io::Error::other("there is no place to make nodes in"))?;
    setns(place, CloneFlags::CLONE_NEWNS)?;
    let made = make(number, uid, gid, mode);
    setns(back, CloneFlags::CLONE_NEWNS)?;
    made
}

fn make(number: Number, uid: u32, gid: u32, mode: u32) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let (blocks, inodes) = ((BLOCKS * 4096).to_string(), INODES.to_string());
    for (key, value) in [("source", "qm-hotplug"), ("mode", "0700"), ("size", &blocks), ("nr_inodes", &inodes)] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)?;
    make_at(&root, "node", number, mode)?;
    chownat(&root, "node", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)?;
    move_mount(&root, "", CWD, BENCH, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let tree = open_tree(&root, "node", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC);
    unmount(BENCH, UnmountFlags::DETACH)?;
    Ok(tree?)
}

/// Whether a device node lies on a file system that was made here. A container can make such a file system, but no device
/// node on it: mknod(2) is refused in a user namespace.
pub fn is_from_here(node: impl AsFd) -> io::Result<bool> {
    let stat = fstatfs(node)?;
    Ok(stat.f_type as u64 == TMPFS && (stat.f_files, stat.f_blocks) == (INODES, BLOCKS))
}
