//! Whether the host uses a block device: such a one is not given to a container by a rule.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::core::device::Number;

/// How often it is looked whether a program holds a device.
const LOOKS: usize = 5;

/// Why the device must not be given away, in words. It, its parent, a
/// partition or a holder is mounted or is swap space, or somebody holds it: then opening it with `O_EXCL` fails.
pub fn in_use(node: &str, number: Number) -> Option<String> {
    let used = in_use_by_host();
    let family = family(&Path::new("/sys/dev/block").join(format!("{}:{}", number.major, number.minor)));
    if let Some((_, what)) = used.iter().find(|(number, _)| family.contains(number)) {
        return Some(what.clone());
    }
    // Others look in the same way, hooks of other containers for one: they let go at once.
    for _ in 0..LOOKS {
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::open(node, flags, Mode::empty()) {
            Err(Errno::BUSY) => std::thread::sleep(Duration::from_millis(2)),
            // Other errors too: an empty drive, say, is nobody's.
            _ => return None,
        }
    }
    Some("another program holds it".into())
}

/// Numbers of the block devices that are mounted or are swap space, with words for each.
fn in_use_by_host() -> BTreeSet<(String, String)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut used = BTreeSet::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(2);
        let (Some(number), Some(mount_point)) = (fields.next(), fields.nth(1)) else { continue };
        used.insert((number.to_owned(), format!("it is mounted at {mount_point}, or a part of it is")));
        // Btrfs and others show a number of their own; the source is the device.
        if let Some(source) = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1))
            && let Some(number) = number_of_node(source)
        {
            used.insert((number, format!("it is mounted at {mount_point}, or a part of it is")));
        }
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let areas = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    used.extend(
        areas.filter_map(|area| Some((number_of_node(area)?, "it is swap space, or a part of it is".to_owned()))),
    );
    used
}

fn number_of_node(path: &str) -> Option<String> {
    let stat = rustix::fs::stat(path).ok()?;
    let is_block = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice;
    is_block.then(|| format!("{}:{}", rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}

/// Numbers of the device, of the disk that it is a partition of, of its partitions and of what is built on any of these.
fn family(directory: &Path) -> BTreeSet<String> {
    let Ok(directory) = fs::canonicalize(directory) else { return BTreeSet::new() };
    let mut found = BTreeSet::new();
    let mut open = vec![directory.clone()];
    if directory.join("partition").exists() {
        // Of the parent itself, not of its other partitions.
        found.extend(directory.parent().and_then(number_in));
    }
    while let Some(directory) = open.pop() {
        if !number_in(&directory).is_some_and(|number| found.insert(number)) {
            continue;
        }
        open.extend(below(&directory).filter(|path| path.join("partition").exists()));
        open.extend(below(&directory.join("holders")).filter_map(|link| fs::canonicalize(link).ok()));
    }
    found
}

fn number_in(directory: &Path) -> Option<String> {
    Some(fs::read_to_string(directory.join("dev")).ok()?.trim().to_owned())
}

fn below(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}
