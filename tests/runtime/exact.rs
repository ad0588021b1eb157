//! All that may be wrong after somebody was killed or lost what he knew.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use qm_hotplug::sys::bpf::{Program, attached};
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::{DeviceFilter, Entry};
use serde_json::Value;

use crate::state::{entries, ledger, programs_on};
use crate::support::Agent;
use crate::support::podman::{Container, describe};

/// The state, a line each, without what is never the same twice.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Exact(pub(crate) BTreeSet<String>);

impl Exact {
    pub(crate) fn of(all: &[&Container]) -> Exact {
        let root = CgroupRoot::find().unwrap();
        let mut lines = BTreeSet::new();
        let names = |programs: Vec<Program>| programs.iter().map(|it| it.info().unwrap().name).collect::<Vec<_>>();
        lines.insert(format!("programs at the root: {:?}", names(attached(root.as_fd()).unwrap())));
        for c in all {
            lines.insert(format!("programs of {}: {:?}", c.name, programs_on(&c.cgroup())));
            list(Path::new(&format!("/proc/{}/root/dev", c.pid())), &mut lines);
            // Each with its turn, since one may lie over another.
            let mounted = mounts(c).into_iter().filter(|path| path.starts_with("/dev/")).enumerate();
            lines.extend(mounted.map(|(turn, path)| format!("mount {turn} of {}: {path}", c.name)));
        }
        // Half-made nodes and what probes leave.
        for place in ["/dev", "/run"] {
            let found = fs::read_dir(place).unwrap().flatten().map(|entry| entry.path().display().to_string());
            lines.extend(found.filter(|path| path.contains("/.qm-hotplug")));
        }
        list(Path::new("/run/qm-hotplug"), &mut lines);
        list(Path::new("/var/lib/qm-hotplug"), &mut lines);
        lines.extend(entries().iter().map(|entry| format!("granted: {entry:?}")));
        lines.extend(withdrawn().iter().map(|entry| format!("withdrawn: {entry:?}")));
        lines.extend(ledger().into_iter().flat_map(|(path, text)| page(&path, &text)));
        Exact(lines)
    }
}

/// Where something is mounted in the container.
pub(crate) fn mounts(c: &Container) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{}/mountinfo", c.pid())).unwrap();
    text.lines().map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect()
}

fn withdrawn() -> Vec<Entry> {
    let filter = DeviceFilter::existing(&CgroupRoot::find().unwrap()).unwrap();
    filter.map_or_else(Vec::new, |filter| filter.withdrawn().unwrap())
}

/// The lines of a page of the ledger, without what tells one plugged-in device from the next.
fn page(path: &str, text: &str) -> Vec<String> {
    let Ok(page) = serde_json::from_str::<Value>(text) else { return vec![format!("{path}: {text}")] };
    let line = |what: &Value| {
        let mut what = what.clone();
        if let Some(inode) = what.pointer_mut("/grant/device/identity/inode") {
            *inode = 0.into();
        }
        format!("{path}: {what}")
    };
    ["entries", "withdrawn"].iter().flat_map(|key| page[key].as_array().into_iter().flatten().map(line)).collect()
}

fn list(path: &Path, lines: &mut BTreeSet<String>) {
    let Ok(found) = fs::symlink_metadata(path) else { return };
    // The socket and the mark that it runs are the agent's, whether killed or not, and terminals come and go.
    if ["run/qm-hotplug/io.qmhotplug", "run/qm-hotplug/agent", "dev/pts"].iter().any(|own| path.ends_with(own)) {
        return;
    }
    lines.insert(format!("{}: {} {:?}", path.display(), describe(&found), fs::read_link(path).ok()));
    if found.is_dir() {
        fs::read_dir(path).into_iter().flatten().flatten().for_each(|entry| list(&entry.path(), lines));
    }
}

/// Asserts that the state is one of these; says what differs from the last one.
#[track_caller]
pub(crate) fn expect(all: &[&Container], expected: &[&Exact], whence: &str) {
    let now = Exact::of(all);
    let last = expected.last().unwrap();
    let (more, less): (Vec<_>, Vec<_>) = (now.0.difference(&last.0).collect(), last.0.difference(&now.0).collect());
    assert!(expected.contains(&&now), "{whence}: there is {more:#?}\nand there is not {less:#?}");
}

/// Starts an agent, which compares everything, and ends it.
#[track_caller]
pub(crate) fn compare() {
    Agent::start().stop();
}

/// What a container asks for: a node in directories to be made, and a link in another one.
pub(crate) const STICK: &str = "devname=/dev/vcsa41;as=/dev/a/b/stick;link=/dev/c/link";
