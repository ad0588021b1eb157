//! Containers whose `/dev`, or a directory below it, is the host's own: only the filter changes.

use std::fs::{Metadata, metadata};
use std::os::unix::fs::MetadataExt;

use crate::Case;
use crate::attach::REFUSED;
use crate::plug::block;
use crate::state::{entries, entries_of, refused};
use crate::support::podman::Container;
use crate::support::{Agent, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("host_dev::only_the_filter_changes", only_the_filter_changes),
    ("host_dev::a_directory_below_dev", a_directory_below_dev),
    ("host_dev::nothing_is_made_there", nothing_is_made_there),
    ("host_dev::with_the_agent_too", with_the_agent_too),
];

/// All that `chown`, `chmod`, `rename` or a new node would change.
fn identity(path: &str) -> [i64; 7] {
    let m: Metadata = metadata(path).unwrap();
    [m.ino() as i64, m.uid().into(), m.gid().into(), m.mode().into(), m.rdev() as i64, m.ctime(), m.ctime_nsec()]
}

/// `/dev/mqueue` and its like, which podman makes on the host where it was asked to take the host's /dev.
struct Podmans(Vec<std::ffi::OsString>);

fn names() -> Vec<std::ffi::OsString> {
    std::fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.file_name()).collect()
}

impl Drop for Podmans {
    fn drop(&mut self) {
        for name in names().into_iter().filter(|name| !self.0.contains(name)) {
            let _ = std::fs::remove_dir(std::path::Path::new("/dev").join(name));
        }
    }
}

fn only_the_filter_changes(runtime: &str) {
    let _podmans = Podmans(names());
    let device = block(41).owned_by(7, 8, 0o640);
    let c = Container::start(runtime, "qmh-hostdev", &["-v", "/dev:/dev"]);
    let (before, there) = (identity(&device.path), names().len());
    assert_eq!(c.open("<", &device.path), REFUSED.map_err(Into::into), "the node is there, the right is not");

    qm(&["attach", &c.name, &device.path, "--mode", "0666", "--uid", "1"]).ok();
    assert!(c.opens("<>", &device.path));
    assert_eq!((grants()[0]["node"].as_str(), entries_of(&c.cgroup()).len()), (Some("host's"), 1));
    assert_eq!((identity(&device.path), names().len()), (before, there));

    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.open("<", &device.path), REFUSED.map_err(Into::into));
    assert_eq!((identity(&device.path), names().len()), (before, there));
    assert_eq!(entries(), []);
}

fn a_directory_below_dev(runtime: &str) {
    // Any directory of nodes will do: /dev/snd, /dev/input, or what this machine has.
    let path = "/dev/cpu/0/cpuid";
    let c = Container::start(runtime, "qmh-below", &["-v", "/dev/cpu:/dev/cpu"]);
    let before = identity(path);
    assert_eq!(c.open("<", path), REFUSED.map_err(Into::into));
    qm(&["attach", &c.name, path]).ok();
    assert!(c.opens("<", path));
    assert_eq!(grants()[0]["node"], "host's");
    // Beside it the container's own /dev gets a node as ever.
    qm(&["attach", &c.name, path, "/dev/mine"]).ok();
    assert!(c.opens("<", "/dev/mine"));
    qm(&["detach", &c.name, path]).ok();
    assert!(c.opens("<", "/dev/mine"), "that one keeps its right");
    qm(&["detach", &c.name, "/dev/mine"]).ok();
    assert_eq!(c.open("<", path), REFUSED.map_err(Into::into));
    assert_eq!(c.node("/dev/mine"), None);
    assert_eq!(identity(path), before);
}

fn nothing_is_made_there(runtime: &str) {
    let _podmans = Podmans(names());
    let device = block(42);
    let c = Container::start(runtime, "qmh-nothing", &["-v", "/dev:/dev"]);
    let there = names().len();
    for destination in ["/dev/zigbee", "/dev/null", "/dev/net/zigbee", "/dev/qmh-new/zigbee"] {
        let line = refused(&[], || qm(&["attach", &c.name, &device.path, destination]), 5, "its /dev");
        assert!(line.contains("the host's own"), "{line}");
        assert_eq!(names().len(), there, "{destination}");
    }
}

fn with_the_agent_too(runtime: &str) {
    let _podmans = Podmans(names());
    let before: Vec<_> = (0..8).map(|n| identity(&format!("/dev/tty{n}"))).collect();
    let agent = Agent::start();
    let c = Container::start(
        runtime,
        "qmh-hostttys",
        &["-v", "/dev:/dev", "--annotation", "org.containers.qm.device.ttys=true"],
    );
    wait_for("the rights", || entries().len() == 8);
    assert!(c.opens("<>", "/dev/tty3"));
    assert!(grants().iter().all(|grant| grant["node"] == "host's"));
    let device = block(43);
    qm(&["attach", &c.name, &device.path]).ok();
    device.unplug();
    wait_for("the right to go", || entries().len() == 8);
    agent.stop();
    qm(&["agent", "--release"]).ok();
    assert_eq!(c.open("<>", "/dev/tty3"), REFUSED.map_err(Into::into));
    assert_eq!((0..8).map(|n| identity(&format!("/dev/tty{n}"))).collect::<Vec<_>>(), before);
}
