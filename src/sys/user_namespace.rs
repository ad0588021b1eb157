//! The user namespace of a container: its ids, and how to be its root among files.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use caps::{CapSet, Capability};

use crate::core::id_map::IdMap;
use crate::core::ledger::Node;

/// The ids of a user namespace. They belong to one process: read them anew for each visit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNamespace {
    uids: IdMap,
    gids: IdMap,
}

impl UserNamespace {
    /// That of a process; `None` where it is ours.
    pub fn of(pid: u32) -> io::Result<Option<UserNamespace>> {
        let of = |pid: &str| rustix::fs::stat(format!("/proc/{pid}/ns/user")).map(|stat| (stat.st_dev, stat.st_ino));
        if of(&pid.to_string())? == of("self")? {
            return Ok(None);
        }
        let map = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/{name}"))?;
            IdMap::parse(&text).ok_or_else(|| io::Error::other(format!("its {name} maps no id: it is still starting")))
        };
        Ok(Some(UserNamespace { uids: map("uid_map")?, gids: map("gid_map")? }))
    }

    /// Owner and group on the host for a node that names ids inside. What is not mapped goes to the container's root.
    pub fn owner_of(&self, node: &Node) -> (u32, u32) {
        let of = |map: &IdMap, id: u32| map.to_host(id).unwrap_or_else(|| map.root());
        (of(&self.uids, node.uid), of(&self.gids, node.gid))
    }

    /// Whether it has ids for an owner and a group on the host. Allocates nothing.
    pub fn knows(&self, uid: u32, gid: u32) -> bool {
        self.uids.to_inside(uid).is_some() && self.gids.to_inside(gid).is_some()
    }

    /// Owner and group as they are seen inside: `nobody` (65534) for those that it does not know.
    pub fn seen_inside(&self, uid: u32, gid: u32) -> (u32, u32) {
        const NOBODY: u32 = 65_534;
        (self.uids.to_inside(uid).unwrap_or(NOBODY), self.gids.to_inside(gid).unwrap_or(NOBODY))
    }

    /// The container's root on the host.
    pub fn root(&self) -> (u32, u32) {
        (self.uids.root(), self.gids.root())
    }

    /// Has this thread make files as the container's root: a file system of the container's knows no others (EOVERFLOW).
    /// In a container of an ordinary user it may no more among files than that user: he decides what lies where in it, and
    /// directories of the host that are not his may. In others, see [`UserNamespace::minds_permissions_of`].
    pub fn make_files_as_root(&self, is_users: bool) -> io::Result<()> {
        if is_users {
            give_up_groups()?;
        }
        let (uid, gid) = self.root();
        // SAFETY: both take a number and concern this thread alone. They return what was before: only asking again tells
        // whether it was done (setfsuid(2)).
        let now = unsafe {
            libc::setfsgid(gid);
            libc::setfsuid(uid);
            (libc::setfsuid(uid) as u32, libc::setfsgid(gid) as u32)
        };
        if now != (uid, gid) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        // An id other than 0 has lost the capabilities on files (capabilities(7)).
        pass_over_permissions(!is_users)
    }

    /// Before something is changed in a directory: permissions are passed over only where the container's root may do that
    /// itself, which takes an owner and a group that it knows (capable_wrt_inode_uidgid, kernel/capability.c).
    pub fn minds_permissions_of(&self, directory: impl AsFd, is_users: bool) -> io::Result<()> {
        if is_users {
            return Ok(());
        }
        let stat = rustix::fs::fstat(directory)?;
        pass_over_permissions(self.knows(stat.st_uid, stat.st_gid))
    }
}

/// Whether this thread passes over the permissions of files.
fn pass_over_permissions(passes: bool) -> io::Result<()> {
    let failed = |error: caps::errors::CapsError| io::Error::other(error);
    let mut permitted = caps::read(None, CapSet::Permitted).map_err(failed)?;
    if !passes {
        permitted.retain(|capability| !OVER_FILES.contains(capability));
    }
    caps::set(None, CapSet::Effective, &permitted).map_err(failed)
}

/// What passes over the permissions of files.
const OVER_FILES: [Capability; 3] =
    [Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_FOWNER];

/// Takes this thread out of the groups that it was started in.
fn give_up_groups() -> io::Result<()> {
    // SAFETY: with a length of 0 it writes nothing.
    if unsafe { libc::getgroups(0, std::ptr::null_mut()) } == 0 {
        return Ok(());
    }
    // The call itself concerns this thread alone, other than glibc's function of that name.
    // SAFETY: with a length of 0 it reads nothing.
    match unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The user who made the user namespace of a process, as the kernel knows it (ioctl_ns(2)).
pub fn made_by(pid: u32) -> io::Result<u32> {
    maker(std::fs::File::open(format!("/proc/{pid}/ns/user"))?)
}

/// The user who made a user namespace.
pub fn maker(namespace: impl AsFd) -> io::Result<u32> {
    /// NS_GET_OWNER_UID (linux/nsfs.h).
    const GET_OWNER: libc::Ioctl = 0xb704;
    let mut uid: libc::uid_t = 0;
    // SAFETY: the kernel writes a uid_t, which lives until the call returns.
    match unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), GET_OWNER, &raw mut uid) } {
        0 => Ok(uid),
        _ => Err(io::Error::last_os_error()),
    }
}
