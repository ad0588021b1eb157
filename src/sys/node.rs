//! Device nodes in a container, which is taken for hostile: every path is resolved below its root without following
//! any symbolic link, and nothing is opened that could have an effect.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, StatVfsMountFlags, Uid, chownat, fstat,
    fstatfs, fstatvfs, major, makedev, minor, mkdirat, mknodat, open, openat, openat2, readlinkat, renameat,
    renameat_with, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::core::device::{Kind, Number};
use crate::core::ledger::Node;
use crate::sys::namespace::Inside;

/// File systems that the kernel fills (linux/magic.h): proc, sysfs, cgroup, cgroup2, devpts, debugfs, tracefs, securityfs.
const KERNEL_FILE_SYSTEMS: [u64; 8] =
    [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270, 0x1cd1, 0x6462_6720, 0x7472_6163, 0x7363_6673];

/// Whose node is at the path after [`make`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Made {
    /// Ours, with the directories that had to be made for it, outermost first.
    Ours {
        /// Their paths.
        directories: Vec<String>,
    },
    /// The container had a node with these numbers; it is left as it is.
    Containers,
    /// The directory is the host's own; the host's node is left as it is.
    Hosts,
}

/// Why a node cannot be made or removed. Words follow `container 'X': `.
#[derive(Debug, Error)]
pub enum NodeError {
    /// Something stands in the way that is not ours to change.
    #[error("{0}")]
    Refused(String),
    /// A system call failed.
    #[error("cannot {what}")]
    Failed {
        /// What was tried, with the path.
        what: String,
        /// Why.
        source: io::Error,
    },
}

impl NodeError {
    fn failed(what: String) -> impl FnOnce(Errno) -> NodeError {
        move |errno| NodeError::Failed { what, source: errno.into() }
    }
}

/// Makes a node. Whatever is made on the way is taken back when it fails.
///
/// `replace` allows taking the place of a device node with other numbers (one that an unplugged device left behind).
pub fn make(inside: Inside<'_>, number: Number, node: &Node, replace: bool) -> Result<Made, NodeError> {
    let (parent, name) = split(&node.path);
    let mut made = Vec::new();
    let result = open_directory(inside, parent, Some(&mut made))
        .and_then(|directory| make_in(inside, &directory.expect("it was made"), parent, name, number, node, replace));
    match result {
        Ok(true) => Ok(Made::Ours { directories: made }),
        Ok(false) => Ok(if on_host(inside, parent)? { Made::Hosts } else { Made::Containers }),
        Err(error) => {
            remove_directories(inside, &made);
            Err(error)
        }
    }
}

/// Removes a node or a link that [`make`] made, if it is still there and still that one, and the directories made for it
/// as far as they are empty. Says whether it was still there. Of `node`, the path and what it links to count.
pub fn remove(inside: Inside<'_>, number: Number, node: &Node, directories: &[String]) -> Result<bool, NodeError> {
    let path = &*node.path;
    let (parent, name) = split(path);
    let mut removed = false;
    // A directory that is gone or became something else holds no node of ours.
    let directory = match open_directory(inside, parent, None) {
        Err(NodeError::Refused(_)) => None,
        result => result?,
    };
    if let Some(directory) = directory
        && !is_hosts(inside, &directory)?
        && let Some(stat) = look(&directory, name, path)?
        && is_it(&directory, name, &stat, number, node)
    {
        match unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) => removed = true,
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(NodeError::failed(format!("remove {path}"))(errno)),
        }
    }
    remove_directories(inside, directories);
    Ok(removed)
}

/// Whether a node was made; `false` where one with these numbers was there.
fn make_in(
    inside: Inside<'_>,
    directory: &OwnedFd,
    parent: &str,
    name: &str,
    number: Number,
    node: &Node,
    replace: bool,
) -> Result<bool, NodeError> {
    let path = &node.path;
    let found = look(directory, name, path)?;
    let same = found.as_ref().is_some_and(|stat| is_it(directory, name, stat, number, node));
    if is_hosts(inside, directory)? {
        // The host's own link leads there in its own way.
        let is_link = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        return if same || node.link_to.is_some() && found.as_ref().is_some_and(is_link) {
            Ok(false)
        } else {
            Err(NodeError::Refused(format!(
                "its {parent} is the host's own, where nothing is made: {path} is not the node of {number} there; use the path that the device has on the host"
            )))
        };
    }
    match &found {
        Some(_) if same => return Ok(false),
        Some(stat) if number_of(stat).is_some() && !replace => {
            return Err(NodeError::Refused(format!(
                "{path} is already the node of another device: name another destination"
            )));
        }
        Some(stat) if number_of(stat).is_none() => {
            return Err(NodeError::Refused(format!(
                "{path} is already there and is {}, which is left alone: name another destination",
                what_is(stat)
            )));
        }
        _ => {}
    }
    if inside.is_given_up() {
        return Err(NodeError::Refused(format!("{parent} answered too late")));
    }
    let temporary = temporary_name(name);
    let _ = unlinkat(directory, &*temporary, AtFlags::empty());
    match &node.link_to {
        Some(target) => symlinkat(&**target, directory, &*temporary),
        None => make_at(directory, &temporary, number, node.mode),
    }
    .map_err(NodeError::failed(format!("make a device node in {parent}")))?;
    let placed = match &node.link_to {
        Some(_) => Ok(()),
        None => own(directory, &temporary, number, node),
    };
    let placed = placed
        .and_then(|()| match found {
            Some(_) => renameat(directory, &*temporary, directory, name),
            // Whatever the container put there in the meantime is not overwritten.
            None => match renameat_with(directory, &*temporary, directory, name, RenameFlags::NOREPLACE) {
                Err(Errno::INVAL) => renameat(directory, &*temporary, directory, name),
                result => result,
            },
        })
        .map_err(NodeError::failed(format!("put the device node at {path}")));
    if placed.is_err() {
        let _ = unlinkat(directory, &*temporary, AtFlags::empty());
    }
    placed.map(|()| true)
}

/// Gives the new node its owner, through a descriptor that is checked to be that node: the name may be swapped.
fn own(directory: &OwnedFd, name: &str, number: Number, node: &Node) -> Result<(), Errno> {
    let fd = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if number_of(&fstat(&fd)?) != Some(number) {
        return Err(Errno::STALE);
    }
    chownat(&fd, "", Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)), AtFlags::EMPTY_PATH)
}

/// Opens a directory below the container's root. With `made`, missing ones are made and their paths pushed; without,
/// a missing one is `None`.
fn open_directory(
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
                    check_file_system(&at, above)?;
                    match mkdirat(&at, part, Mode::from_raw_mode(0o755)) {
                        Ok(()) => made.push(below.clone()),
                        Err(Errno::EXIST) => {}
                        Err(errno) => return Err(NodeError::failed(format!("make the directory {below}"))(errno)),
                    }
                    resolve(inside, &below)?
                        .ok_or_else(|| NodeError::Refused(format!("{below} vanished while it was made")))?
                }
            };
            so_far = below;
        }
    }
    if made.is_some() {
        check_file_system(&at, path)?;
    }
    Ok(Some(at))
}

/// Resolves a directory without following links; `None` where it does not exist.
fn resolve(inside: Inside<'_>, path: &str) -> Result<Option<OwnedFd>, NodeError> {
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
fn check_file_system(directory: &OwnedFd, path: &str) -> Result<(), NodeError> {
    let kind =
        fstatfs(directory).map_err(NodeError::failed(format!("look at the file system of {path}")))?.f_type as u64;
    if KERNEL_FILE_SYSTEMS.contains(&kind) {
        return Err(NodeError::Refused(format!(
            "{path} is a file system of the kernel's, where no node can be: name another destination"
        )));
    }
    let flags = fstatvfs(directory).map_err(NodeError::failed(format!("look at the mount of {path}")))?.f_flag;
    if flags.contains(StatVfsMountFlags::NODEV) {
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

fn on_host(inside: Inside<'_>, path: &str) -> Result<bool, NodeError> {
    match resolve(inside, path)? {
        Some(directory) => is_hosts(inside, &directory),
        None => Ok(false),
    }
}

/// Whether a directory lies on the file system that is the host's `/dev` (`-v /dev:/dev`, `-v /dev/snd:/dev/snd`).
fn is_hosts(inside: Inside<'_>, directory: &OwnedFd) -> Result<bool, NodeError> {
    let stat = fstat(directory).map_err(NodeError::failed("stat a directory".into()))?;
    Ok(stat.st_dev == inside.host.dev_fs)
}

fn look(directory: &OwnedFd, name: &str, path: &str) -> Result<Option<Stat>, NodeError> {
    match statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(NodeError::failed(format!("look at {path}"))(errno)),
    }
}

/// Whether that is the node already: one with its numbers or, where a link is wanted, a link to the same place.
fn is_it(directory: &OwnedFd, name: &str, stat: &Stat, number: Number, node: &Node) -> bool {
    let leads_to =
        |target: &str| readlinkat(directory, name, Vec::new()).is_ok_and(|found| found.as_bytes() == target.as_bytes());
    number_of(stat) == Some(number) || node.link_to.as_deref().is_some_and(leads_to)
}

/// The host's node of a device, open to be asked about.
pub fn of_host(path: &str, number: Number) -> io::Result<OwnedFd> {
    let fd = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if number_of(&fstat(&fd)?) != Some(number) {
        return Err(Errno::STALE.into());
    }
    Ok(fd)
}

/// A node of a device that the host has no node of. Its name is gone at once.
pub fn anonymous(number: Number) -> io::Result<OwnedFd> {
    let path = format!("/run/.qm-hotplug-probe-{}", std::process::id());
    make_at(CWD, &path, number, 0o600)?;
    let fd = of_host(&path, number);
    unlinkat(CWD, &*path, AtFlags::empty())?;
    fd
}

fn make_at(directory: impl AsFd, name: &str, number: Number, mode: u32) -> Result<(), Errno> {
    let kind = match number.kind {
        Kind::Char => FileType::CharacterDevice,
        Kind::Block => FileType::BlockDevice,
    };
    mknodat(directory, name, kind, Mode::from_raw_mode(mode), makedev(number.major, number.minor))
}

/// The device of a node; `None` for anything that is no device node.
pub fn number_of(stat: &Stat) -> Option<Number> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => Kind::Char,
        FileType::BlockDevice => Kind::Block,
        _ => return None,
    };
    Some(Number { kind, major: major(stat.st_rdev), minor: minor(stat.st_rdev) })
}

/// `a directory`, `a regular file`, …
pub fn what_is(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device node",
        _ => "a file of unknown kind",
    }
}

fn remove_directories(inside: Inside<'_>, directories: &[String]) {
    for path in directories.iter().rev() {
        let (parent, name) = split(path);
        // One that is not empty any more, or gone, is the container's business.
        if let Ok(Some(parent)) = open_directory(inside, parent, None) {
            let _ = unlinkat(&parent, name, AtFlags::REMOVEDIR);
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

/// What a node is made under before it is renamed into place. There is one executor at a time, so that one name a node
/// is enough, and what a killed one left is replaced by the next.
fn temporary_name(name: &str) -> String {
    // Names have 255 bytes at most.
    format!(".qm-hotplug.{}", name.get(name.len().saturating_sub(200)..).unwrap_or("node"))
}
