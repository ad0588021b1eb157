//! The host's `/dev`, read directly: what the hook needs, without libudev.

use std::collections::BTreeSet;
use std::path::Path;

use crate::core::category::{Category, is_forbidden};
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
    Some(SpecDevice { path: path.to_owned(), number, mode: stat.st_mode & 0o777, uid: stat.st_uid, gid: stat.st_gid })
}
