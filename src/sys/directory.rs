//! Directories in a container, which is taken for hostile: resolved below its root without following any symbolic link.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatfs, fstatvfs, mkdirat, openat2, unlinkat,
};
use rustix::io::Errno;

use crate::failpoint::reached;
use crate::sys::namespace::Inside;
use crate::sys::node::NodeError;

/// File systems that the kernel fills (linux/magic.h): proc, sysfs, cgroup, cgroup2, devpts, debugfs, tracefs, securityfs.
const KERNEL_FILE_SYSTEMS: [u64; 8] =
    [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270, 0x1cd1, 0x6462_6720, 0x7472_6163, 0x7363_6673];

/// Opens a directory below the container's root. With `made`, missing ones are made and their paths pushed; without,
/// a missing one is `None`.
pub(super) fn open_directory(
    inside: Inside<'_>,
    path: &str,
    mut made: Option<&mut Vec<String>>,
) -> Result<Option<OwnedFd>, NodeError> {
    let mut at = resolve(inside, "/")?.expect("the root is there");
    let mut so_far = String::new();
    if path != "/"
        && let Some(directory) = resolve(inside, path)?
    {
        at = directory;
    } else {
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let below = format!("{so_far}/{part}");
            at = match (resolve(inside, &below)?, &mut made) {
                (Some(next), _) => next,
                (None, None) => return Ok(None),
                (None, Some(made)) => {
                    let above = if so_far.is_empty() { "/" } else { &so_far };
                    if is_hosts(inside, &at)? {
                        return Err(NodeError::Refused(format!(
                            "its {above} is the host's own, where nothing is made: use the path that the device has on the host"
                        )));
                    }
                    check_file_system(inside, &at, above)?;
                    inside.change(&at)?;
                    match mkdirat(&at, part, Mode::from_raw_mode(0o755)) {
                        Ok(()) => {
                            made.push(below.clone());
                            reached("node: a directory is made");
                        }
                        Err(Errno::EXIST) => {}
                        Err(errno) => {
                            let what = inside.as_its_root(format!("make the directory {below}"));
                            return Err(NodeError::failed(what)(errno));
                        }
                    }
                    resolve(inside, &below)?
                        .ok_or_else(|| NodeError::Refused(format!("{below} vanished while it was made")))?
                }
            };
            so_far = below;
        }
    }
    if made.is_some() {
        check_file_system(inside, &at, path)?;
    }
    Ok(Some(at))
}

/// Resolves a directory without following links; `None` where it does not exist.
pub(super) fn resolve(inside: Inside<'_>, path: &str) -> Result<Option<OwnedFd>, NodeError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // EAGAIN: a rename went on somewhere and the kernel could not be sure (openat2(2)).
    for _ in 0..64 {
        return match openat2(inside.root, path, flags, Mode::empty(), how) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::AGAIN) => continue,
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::LOOP) => Err(NodeError::Refused(format!(
                "{path} is or contains a symbolic link inside the container, which is not followed: give the real path"
            ))),
            Err(Errno::NOTDIR) => Err(NodeError::Refused(format!(
                "{path} is not a directory inside the container: name another destination"
            ))),
            Err(errno) => Err(NodeError::failed(format!("open {path}"))(errno)),
        };
    }
    Err(NodeError::Refused(format!("{path} is renamed all the time inside the container: try again when it is quiet")))
}

/// A node is of use only where the file system takes it and lets it be opened.
fn check_file_system(inside: Inside<'_>, directory: &OwnedFd, path: &str) -> Result<(), NodeError> {
    let kind =
        fstatfs(directory).map_err(NodeError::failed(format!("look at the file system of {path}")))?.f_type as u64;
    if KERNEL_FILE_SYSTEMS.contains(&kind) {
        return Err(NodeError::Refused(format!(
            "{path} is a file system of the kernel's, where no node can be: name another destination"
        )));
    }
    let flags = fstatvfs(directory).map_err(NodeError::failed(format!("look at the mount of {path}")))?.f_flag;
    // What is mounted over a file there has flags of its own.
    if flags.contains(StatVfsMountFlags::NODEV) && inside.mapped.is_none() {
        return Err(NodeError::Refused(format!(
            "{path} is mounted nodev, so no device can be opened there: name another destination"
        )));
    }
    if flags.contains(StatVfsMountFlags::RDONLY) {
        return Err(NodeError::Refused(format!(
            "{path} is mounted read-only: name a destination on a writable file system"
        )));
    }
    Ok(())
}

pub(super) fn on_host(inside: Inside<'_>, path: &str) -> Result<bool, NodeError> {
    match resolve(inside, path)? {
        Some(directory) => is_hosts(inside, &directory),
        None => Ok(false),
    }
}

/// Whether a directory lies on the file system that is the host's `/dev` (`-v /dev:/dev`, `-v /dev/snd:/dev/snd`).
pub(super) fn is_hosts(inside: Inside<'_>, directory: &OwnedFd) -> Result<bool, NodeError> {
    let stat = fstat(directory).map_err(NodeError::failed("stat a directory".into()))?;
    Ok(stat.st_dev == inside.host.dev_fs)
}

pub(super) fn remove_directories(inside: Inside<'_>, directories: &[String]) {
    for path in directories.iter().rev() {
        let (parent, name) = split(path);
        // One that is not empty any more, or gone, is the container's business.
        if let Ok(Some(parent)) = open_directory(inside, parent, None)
            && inside.change(&parent).is_ok()
            && unlinkat(&parent, name, AtFlags::REMOVEDIR).is_ok()
        {
            reached("node: a directory is removed");
        }
    }
}

/// Directory and name of an absolute path.
pub(super) fn split(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
        None => ("/", path),
    }
}
