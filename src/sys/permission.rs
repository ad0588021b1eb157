//! What decides who may open a file on this host.

use std::path::Path;

use rustix::fs::{FileType, Stat, lgetxattr, lstat};
use rustix::io::Errno;

use crate::core::device::{Device, Number};
use crate::core::permission::{Acl, File, READ, SEARCH, User, WRITE};
use crate::sys::node::number_of;
use crate::sys::user::{Account, group_name};

/// Why the user could not open the device on this host for reading and writing, in words that say what to do; `None` where
/// he could. Whoever has a node without a device filter above him reads and writes alike, so it has to be both.
pub fn refusal(device: &Device, account: &Account) -> Option<String> {
    let name = account.label();
    let node = &device.node;
    let policy = format!("a [[policy]] with owner = {} and an allow for it", account.user.uid);
    let (file, path) = match closed(node, device.number, &account.user) {
        Ok(None) => return None,
        Ok(Some(closed)) => closed,
        Err(errno) => return Some(format!("whether user {name} may open {node} cannot be told: {errno}")),
    };
    if path != *node {
        return Some(format!("user {name} may not search {path} on the host: use {policy}"));
    }
    let group =
        (file.mode >> 3 & (READ | WRITE) == READ | WRITE && file.gid != 0).then(|| group_name(file.gid)).flatten();
    let group = group.map(|group| format!("add {name} to the group {group}, or use ")).unwrap_or_else(|| "use ".into());
    Some(format!("user {name} may not open it for reading and writing on the host: {group}{policy}"))
}

/// The node, or the directory on the way to it, that the user may not use.
fn closed(node: &str, number: Number, user: &User) -> Result<Option<(File, String)>, Errno> {
    for directory in Path::new(node).ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
        let path = directory.to_str().ok_or(Errno::INVAL)?;
        let file = look(path)?.1;
        if !file.allows(user, SEARCH) {
            return Ok(Some((file, path.to_owned())));
        }
    }
    let (stat, file) = look(node)?;
    if number_of(&stat) != Some(number) {
        return Err(Errno::NODEV);
    }
    Ok((!file.allows(user, READ | WRITE)).then(|| (file, node.to_owned())))
}

/// Owner, mode and list of what lies at a path, which is no link.
pub fn look(path: &str) -> Result<(Stat, File), Errno> {
    let stat = lstat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        return Err(Errno::LOOP);
    }
    // The longest that an attribute may be (XATTR_SIZE_MAX).
    let mut value = vec![0; 65_536];
    let acl = match lgetxattr(path, "system.posix_acl_access", &mut value[..]) {
        Ok(length) => Some(Acl::parse(&value[..length]).ok_or(Errno::INVAL)?),
        // None, or a file system without any.
        Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
        Err(errno) => return Err(errno),
    };
    let file = File { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode & 0o777, acl };
    Ok((stat, file))
}
