//! The host's `/dev`, read directly.

use std::collections::BTreeSet;
use std::path::Path;

use crate::core::category::{Category, is_forbidden};
use crate::core::device::{Access, Kind, Number};
use crate::core::pattern::Pattern;
use crate::core::spec::SpecDevice;
use crate::sys::node::number_of;

/// The nodes of the category that are there now, sorted by path. What cannot be read is passed over.
pub fn nodes(category: &Category) -> Vec<SpecDevice> {
    let mut found = Vec::new();
    let places: BTreeSet<_> = category.patterns.iter().map(Pattern::place).collect();
    for (directory, deep) in places {
        visit(Path::new(directory), deep, &mut |path| {
            if category.contains_node(path)
                && let Some(device) = read(path)
                && device.number.kind == category.kind
                && !is_forbidden(device.number)
            {
                found.push(device);
            }
        });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found.dedup_by(|a, b| a.path == b.path);
    found
}

/// Whether the kernel, or a module's description, knows the node's numbers by this path. Who can make links below `/dev`
/// (a container that has the host's) could lay any device into any category else.
pub fn is_where_it_belongs(device: &SpecDevice) -> bool {
    let Some(name) = device.path.strip_prefix("/dev/") else { return false };
    let (kind, letter) = if device.number.kind == Kind::Block { ("block", 'b') } else { ("char", 'c') };
    let Number { major, minor, .. } = device.number;
    match std::fs::read_to_string(format!("/sys/dev/{kind}/{major}:{minor}/uevent")) {
        Ok(uevent) => uevent.lines().any(|line| line.strip_prefix("DEVNAME=") == Some(name)),
        // Its module is not loaded; depmod(8) has written down what would be.
        Err(_) => {
            let release = rustix::system::uname().release().to_string_lossy().into_owned();
            let nodes = std::fs::read_to_string(format!("/lib/modules/{release}/modules.devname")).unwrap_or_default();
            let known = format!(" {name} {letter}{major}:{minor}");
            nodes.lines().any(|line| line.ends_with(&known))
        }
    }
}

fn visit(directory: &Path, deep: bool, seen: &mut impl FnMut(&str)) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && deep => visit(&path, deep, seen),
            // Links (by-id, by-path) stand for nodes that are found themselves.
            Ok(kind) if !kind.is_dir() && !kind.is_symlink() => {
                if let Some(path) = path.to_str() {
                    seen(path);
                }
            }
            _ => {}
        }
    }
}

/// The device node at that path; `None` where there is none, or something else.
pub fn read(path: &str) -> Option<SpecDevice> {
    let stat = rustix::fs::lstat(path).ok()?;
    let number = number_of(&stat)?;
    let (mode, access) = (stat.st_mode & 0o777, Access::ALL);
    Some(SpecDevice { path: path.to_owned(), number, mode, uid: stat.st_uid, gid: stat.st_gid, access })
}
