//! Nodes of a device in a container's `/dev` that no record tells of.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Stat, fstat, openat, readlinkat, statat, unlinkat};

use crate::core::device::Number;
use crate::sys::directory::{is_hosts, open_directory};
use crate::sys::namespace::Inside;
use crate::sys::node::{number_of, take_out};

/// How deep below `/dev`, and at how many names at most, is looked: a container can fill it as it likes.
const DEPTH: usize = 8;
const MOST: usize = 10_000;

/// Removes all nodes of that device in the container's `/dev`, the links to them, and directories that are empty then.
/// Returns the paths of what was a node. The host's own directories are left alone, and other file systems.
pub fn remove(inside: Inside<'_>, number: Number) -> Vec<String> {
    let Ok(Some(dev)) = open_directory(inside, "/dev", None) else { return Vec::new() };
    let Ok(stat) = fstat(&dev) else { return Vec::new() };
    if is_hosts(inside, &dev).unwrap_or(true) {
        return Vec::new();
    }
    let mut search = Search { inside, number, file_system: stat.st_dev, left: MOST, removed: Vec::new() };
    search.visit(&dev, "/dev", DEPTH, &|search, directory, name, path| {
        search.take_node(directory, name, path, |stat| take_out(inside, directory, name, stat).unwrap_or(false))
    });
    if !search.removed.is_empty() {
        search.left = MOST;
        search.visit(&dev, "/dev", DEPTH, &|search, directory, name, path| search.take_link(directory, name, path));
    }
    search.removed
}

struct Search<'a> {
    inside: Inside<'a>,
    number: Number,
    file_system: u64,
    left: usize,
    removed: Vec<String>,
}

impl Search<'_> {
    /// Takes out of a directory, and of those in it. Says whether something was.
    fn visit(
        &mut self,
        directory: &OwnedFd,
        path: &str,
        depth: usize,
        take: &dyn Fn(&mut Search, &OwnedFd, &str, String) -> bool,
    ) -> bool {
        let mut has_taken = false;
        // A descriptor of its own kind for reading names: the other one is for paths alone.
        let readable = openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        for entry in readable.and_then(Dir::new).into_iter().flatten().flatten() {
            if self.left == 0 {
                break;
            }
            self.left -= 1;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if matches!(name, "." | "..") {
                continue;
            }
            let below = format!("{path}/{name}");
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if take(self, directory, name, below.clone()) {
                has_taken = true;
            } else if depth > 0
                && let Ok(inner) = openat(directory, name, flags, Mode::empty())
                && fstat(&inner).is_ok_and(|stat| stat.st_dev == self.file_system)
                && self.visit(&inner, &below, depth - 1, take)
            {
                has_taken = true;
                // What was done below concerned another directory. One that is not empty stays.
                if self.inside.change(directory).is_err() {
                    break;
                }
                let _ = unlinkat(directory, name, AtFlags::REMOVEDIR);
            }
        }
        has_taken
    }

    fn take_node(&mut self, directory: &OwnedFd, name: &str, path: String, take_out: impl Fn(&Stat) -> bool) -> bool {
        let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
        let is_gone = found.is_ok_and(|stat| number_of(&stat) == Some(self.number) && take_out(&stat));
        if is_gone {
            self.removed.push(path);
        }
        is_gone
    }

    fn take_link(&mut self, directory: &OwnedFd, name: &str, _: String) -> bool {
        let leads_there = readlinkat(directory, name, Vec::new())
            .is_ok_and(|target| self.removed.iter().any(|path| path.as_bytes() == target.as_bytes()));
        leads_there && self.inside.change(directory).is_ok() && unlinkat(directory, name, AtFlags::empty()).is_ok()
    }
}
