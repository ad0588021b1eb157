//! Everything that a command may change, to be compared before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use qm_hotplug::sys::bpf;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::{DeviceFilter, Entry};

use crate::support::Said;

/// The programs of the cgroups, the filter's map, the ledger and the files of containers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct State {
    programs: BTreeMap<String, Vec<(u32, String)>>,
    entries: Vec<Entry>,
    ledger: BTreeMap<String, String>,
    files: BTreeMap<String, String>,
}

/// Looks at everything; at the files of the containers with these inits.
pub(crate) fn observe(inits: &[u32]) -> State {
    let root = CgroupRoot::find().unwrap();
    let mut programs = BTreeMap::from([("/".to_owned(), describe(root.as_fd()))]);
    for path in root.walk().into_iter().filter(|path| path.starts_with("/libpod_parent")) {
        if let Ok(cgroup) = root.open(&path) {
            programs.insert(path, describe(cgroup.as_fd()));
        }
    }
    let mut files = BTreeMap::new();
    for init in inits {
        // Of the files in /proc, /sys and /dev/pts most change by themselves.
        for top in ["dev", "etc", "tmp", "run"] {
            list(Path::new(&format!("/proc/{init}/root/{top}")), &mut files);
        }
    }
    State { programs, entries: entries(), ledger: ledger(), files }
}

/// Runs a command that is to be refused, and asserts that nothing has changed. Returns its line.
#[track_caller]
pub(crate) fn refused(inits: &[u32], command: impl FnOnce() -> Said, code: i32, text: &str) -> String {
    let before = observe(inits);
    let line = command().fails(code, text);
    assert_eq!(observe(inits), before, "state before and after: {line}");
    line
}

/// Ids and names of the programs on a cgroup, in the order in which they run.
fn describe(cgroup: std::os::fd::BorrowedFd<'_>) -> Vec<(u32, String)> {
    let programs = bpf::attached(cgroup).unwrap();
    programs.iter().map(|program| program.info().unwrap()).map(|info| (info.id, info.name)).collect()
}

/// Names of the programs on a container's cgroup, in the order in which they run.
pub(crate) fn programs_on(cgroup: &str) -> Vec<String> {
    let cgroup = CgroupRoot::find().unwrap().open(cgroup).unwrap();
    describe(cgroup.as_fd()).into_iter().map(|(_, name)| name).collect()
}

/// The entries of the filter's map; none where no filter is attached.
pub(crate) fn entries() -> Vec<Entry> {
    let filter = DeviceFilter::existing(&CgroupRoot::find().unwrap()).unwrap();
    filter.map_or_else(Vec::new, |filter| filter.entries().unwrap())
}

/// The entries of the cgroup at that path.
pub(crate) fn entries_of(cgroup: &str) -> Vec<Entry> {
    let id = CgroupRoot::find().unwrap().open(cgroup).unwrap().id;
    entries().into_iter().filter(|entry| entry.cgroup == id).collect()
}

/// The ledger's files.
pub(crate) fn ledger() -> BTreeMap<String, String> {
    let files = fs::read_dir("/run/qm-hotplug/ledger").into_iter().flatten().flatten();
    // One may go while we look.
    files.filter_map(|file| Some((file.path().display().to_string(), fs::read_to_string(file.path()).ok()?))).collect()
}

fn list(path: &Path, files: &mut BTreeMap<String, String>) {
    let Ok(found) = fs::symlink_metadata(path) else { return };
    let kind = found.file_type();
    let mut what = format!("{:o} {}:{} {:x} {}", found.mode(), found.uid(), found.gid(), found.rdev(), found.ino());
    if !kind.is_dir() && !kind.is_char_device() {
        what +=
            &format!(" {} {} {} {:?}", found.size(), found.mtime_nsec(), found.ctime_nsec(), fs::read_link(path).ok());
    }
    files.insert(path.display().to_string(), what);
    if kind.is_dir() && !path.ends_with("dev/pts") {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            list(&entry.path(), files);
        }
    }
}
