//! The host's `/dev`, read directly: what the hook needs, without libudev.

use std::path::Path;

use crate::core::category::Category;
use crate::core::device::Kind;
use crate::core::spec::SpecDevice;
use crate::sys::node::number_of;

/// The nodes of these categories that are there now, sorted by path and each once. What cannot be read is passed over.
pub fn nodes(categories: &[&'static Category]) -> Vec<SpecDevice> {
    let mut found = Vec::new();
    for category in categories {
        for (directory, deep) in category.places() {
            visit(Path::new(directory), deep, &mut |path| {
                if category.contains_node(path)
                    && let Some(device) = read(path)
                {
                    found.push(device);
                }
            });
        }
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

fn read(path: &str) -> Option<SpecDevice> {
    let stat = rustix::fs::lstat(path).ok()?;
    let number = number_of(&stat).filter(|number| number.kind == Kind::Char)?;
    Some(SpecDevice { path: path.to_owned(), number, mode: stat.st_mode & 0o777, uid: stat.st_uid, gid: stat.st_gid })
}
