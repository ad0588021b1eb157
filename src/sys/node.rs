//! Device nodes in a container, which is taken for hostile: every path is resolved below its root without following
//! any symbolic link, and nothing is opened that could have an effect.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid, chownat, fstat, major, makedev, minor, mknodat,
    open, openat, readlinkat, renameat, renameat_with, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::path::Arg;
use thiserror::Error;

use crate::core::device::{Kind, Number};
use crate::core::ledger::Node;
use crate::failpoint::reached;
use crate::sys::directory::{is_hosts, on_host, open_directory, remove_directories, resolve, split};
use crate::sys::held::Held;
use crate::sys::mounted;
use crate::sys::namespace::Inside;

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
    pub(super) fn failed(what: String) -> impl FnOnce(Errno) -> NodeError {
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

/// What [`make`] will find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Before {
    /// The node, or a link where one is wanted: it will be left as it is.
    There,
    /// Nothing of the kind; these directories are missing, outermost first.
    Missing {
        /// Their paths.
        directories: Vec<String>,
    },
}

/// Looks at what [`make`] will find. What stands in its way is not told here.
pub fn before(inside: Inside<'_>, number: Number, node: &Node) -> Before {
    let (parent, name) = split(&node.path);
    if let Ok(Some(directory)) = open_directory(inside, parent, None) {
        let found = look(&directory, name, &node.path).ok().flatten();
        let is_it = |stat: &Stat| {
            is_it(&directory, name, stat, number, node) && !is_forgotten(inside, &directory, number, node, stat)
        };
        return match found.is_some_and(|stat| is_it(&stat)) {
            true => Before::There,
            false => Before::Missing { directories: Vec::new() },
        };
    }
    let ends = parent.match_indices('/').map(|(at, _)| at).filter(|at| *at > 0).chain([parent.len()]);
    let all = ends.map(|end| parent[..end].to_owned());
    Before::Missing { directories: all.skip_while(|path| !matches!(resolve(inside, path), Ok(None))).collect() }
}

/// Whether the node or the link stands there as [`make`] would have made it, on a file system of the container's.
pub fn stands(inside: Inside<'_>, number: Number, node: &Node) -> bool {
    let (parent, name) = split(&node.path);
    let Ok(Some(directory)) = open_directory(inside, parent, None) else { return false };
    let Ok(Some(stat)) = look(&directory, name, &node.path) else { return false };
    let (uid, gid) = inside.mapped.map_or((node.uid, node.gid), |mapped| mapped.users.owner_of(node));
    let is_as_made = match node.link_to {
        Some(_) => number_of(&stat).is_none(),
        None => {
            (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (uid, gid, node.mode)
                && inside.mapped.is_none_or(|mapped| mounted::is_ours(mapped, &directory, name, &node.path))
        }
    };
    is_as_made && is_it(&directory, name, &stat, number, node) && is_hosts(inside, &directory).is_ok_and(|its| !its)
}

/// Removes a node or a link that [`make`] made, if it is still there and still that one, what an interrupted one left
/// under its temporary name, and the directories made for it as far as they are empty. Says whether it was still there.
/// Of `node`, the path and what it links to count.
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
    {
        inside.change(&directory)?;
        sweep(&directory, &temporary_name(name));
        match look(&directory, name, path)? {
            Some(stat) if is_it(&directory, name, &stat, number, node) => {
                removed = take_out(inside, &directory, name, &stat)
                    .map_err(|source| NodeError::Failed { what: format!("remove {path}"), source })?;
                reached("node: removed");
            }
            Some(_) if let Some(mapped) = inside.mapped => {
                mounted::remove_placeholder(mapped, &directory, name)
                    .map_err(NodeError::failed(format!("remove the empty file {path}")))?;
            }
            _ => {}
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
    let mut found = look(directory, name, path)?;
    let is_same = |found: &Option<Stat>| found.as_ref().is_some_and(|stat| is_it(directory, name, stat, number, node));
    if is_hosts(inside, directory)? {
        let same = is_same(&found);
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
    inside.change(directory)?;
    // One that was taken back, or that no entry tells of any more, and is still there.
    if let (Some(mapped), Some(stat)) = (inside.mapped, &found)
        && is_forgotten(inside, directory, number, node, stat)
        && let Some(number) = number_of(stat)
    {
        let failed = |source| NodeError::Failed { what: format!("remove {path}"), source };
        mounted::take_out(mapped, directory, name, number).map_err(failed)?;
        found = look(directory, name, path)?;
    }
    let same = is_same(&found);
    let is_placeholder =
        |stat: &Stat| inside.mapped.is_some_and(|it| node.link_to.is_none() && mounted::is_placeholder(it, stat));
    match &found {
        Some(_) if same => return Ok(false),
        Some(stat) if number_of(stat).is_some() && !replace => {
            return Err(NodeError::Refused(format!(
                "{path} is already the node of another device: name another destination"
            )));
        }
        Some(stat) if number_of(stat).is_none() && !is_placeholder(stat) => {
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
    if let Some(mapped) = inside.mapped {
        let failed = |source| NodeError::Failed { what: format!("mount a device node at {path}"), source };
        mounted::refuse_shared(mapped, directory, parent)?;
        // What is mounted there cannot be renamed over.
        if let Some(number) = found.as_ref().and_then(number_of) {
            mounted::take_out(mapped, directory, name, number).map_err(failed)?;
            found = None;
        }
        if node.link_to.is_none() {
            if !Held::can_hold(path) {
                return Err(NodeError::Refused(format!(
                    "{path} is too long for a container with a user namespace: name a shorter destination"
                )));
            }
            return mounted::put(inside, mapped, directory, name, found.is_some(), number, node).map(|()| true);
        }
    }
    let temporary = temporary_name(name);
    sweep(directory, &temporary);
    let placed = match &node.link_to {
        Some(target) => {
            let failed = NodeError::failed(inside.as_its_root(format!("make a link in {parent}")));
            symlinkat(&**target, directory, &*temporary).map_err(failed)?;
            reached("node: a link is made under its temporary name");
            Ok(())
        }
        None => {
            let failed = NodeError::failed(format!("make a device node in {parent}"));
            make_at(directory, &temporary, number, node.mode).map_err(failed)?;
            reached("node: made under its temporary name");
            own(directory, &temporary, number, node).inspect(|()| reached("node: has its owner"))
        }
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
    reached("node: in its place");
    placed.map(|()| true)
}

/// Removes a node or a link that was looked at. Says whether it was still that one.
pub(super) fn take_out(inside: Inside<'_>, directory: &OwnedFd, name: &str, stat: &Stat) -> io::Result<bool> {
    inside.change(directory).map_err(io::Error::other)?;
    let result = match (inside.mapped, number_of(stat)) {
        (Some(mapped), Some(number)) => mounted::take_out(mapped, directory, name, number),
        _ => unlinkat(directory, name, AtFlags::empty()).map(|()| true).map_err(io::Error::from),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result,
    }
}

/// Removes what an interrupted [`make`] left under its temporary name. A container may put other things there: of what is
/// its own, no more than device nodes and links of that name can go.
fn sweep(directory: &OwnedFd, temporary: &str) {
    let is_kind_of_ours =
        |stat: &Stat| number_of(stat).is_some() || FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
    if statat(directory, temporary, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_kind_of_ours(&stat)) {
        let _ = unlinkat(directory, temporary, AtFlags::empty());
    }
}

/// Gives the new node its owner, through a descriptor that is checked to be that node: the name may be swapped.
fn own(directory: &OwnedFd, name: &str, number: Number, node: &Node) -> Result<(), Errno> {
    let fd = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if number_of(&fstat(&fd)?) != Some(number) {
        return Err(Errno::STALE);
    }
    chownat(&fd, "", Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)), AtFlags::EMPTY_PATH)
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

/// Whether a node that is there is one of ours, in a container with a user namespace: of this device, or one that is useless
/// already. A grant in force is not made again, so no entry tells of it any more.
fn is_forgotten(inside: Inside<'_>, directory: &OwnedFd, number: Number, node: &Node, stat: &Stat) -> bool {
    let (_, name) = split(&node.path);
    let is_it = number_of(stat) == Some(number);
    let is_ours =
        |mapped| mounted::is_useless(mapped, stat) || is_it && mounted::is_ours(mapped, directory, name, &node.path);
    inside.mapped.is_some_and(is_ours)
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

pub(super) fn make_at(directory: impl AsFd, name: impl Arg, number: Number, mode: u32) -> Result<(), Errno> {
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

/// What a node is made under before it is renamed into place. There is one executor at a time, so that one name a node
/// is enough, and what a killed one left goes with what its ledger says is half done.
fn temporary_name(name: &str) -> String {
    // Names have 255 bytes at most.
    format!(".qm-hotplug.{}", name.get(name.len().saturating_sub(200)..).unwrap_or("node"))
}
