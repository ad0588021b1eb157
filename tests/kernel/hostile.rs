//! A container that works against us: nothing it does has an effect outside of its own root directory.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use qm_hotplug::core::ledger::Node;
use qm_hotplug::sys::node::{self, Made, NodeError};

use crate::stage::{Container, NULL, Nodes, snapshot, wish};

pub const TESTS: &[(&str, fn())] = &[
    ("hostile::a_directory_that_is_swapped_for_a_link_to_the_host", a_directory_that_is_swapped),
    ("hostile::a_new_directory_that_is_swapped_for_a_link_to_the_host", a_new_directory_that_is_swapped),
    ("hostile::a_temporary_name_that_is_swapped_for_a_link_to_the_host", a_temporary_name_that_is_swapped),
];

const ROUNDS: usize = 2000;

/// A directory of the host's, and the path by which a container with the host's `/proc` gets there.
struct Prey {
    place: Nodes,
    path_inside: String,
    before: Vec<String>,
}

impl Prey {
    fn new() -> Prey {
        let place = Nodes::new();
        fs::create_dir(place.path().join("sub")).unwrap();
        fs::write(place.path().join("victim"), "the host's").unwrap();
        fs::set_permissions(place.path().join("victim"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let path_inside = format!("/proc/{}/root{}", std::process::id(), place.path().display());
        let before = snapshot(place.path());
        Prey { place, path_inside, before }
    }

    #[track_caller]
    fn expect_untouched(&self) {
        assert_eq!(snapshot(self.place.path()), self.before);
    }
}

/// A container with the host's process ids (`--pid=host`), whose `/proc` leads out of it.
fn with_a_way_out(prepare: impl FnOnce(&Path)) -> Container {
    Container::prepared(|root| {
        fs::create_dir(root.join("proc")).unwrap();
        mount(Some("none"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&str>).unwrap();
        prepare(&root.join("dev"));
    })
}

/// Nothing of ours lies around in the container.
fn expect_no_temporary_names(directory: &Path) {
    for line in snapshot(directory) {
        assert!(!line.contains(".qm-hotplug."), "{line}");
    }
}

fn link(target: &str, path: PathBuf) {
    std::os::unix::fs::symlink(target, path).unwrap();
}

fn a_directory_that_is_swapped() {
    let prey = Prey::new();
    let mut container = with_a_way_out(|dev| {
        fs::create_dir_all(dev.join("a/sub")).unwrap();
        link(&prey.path_inside, dev.join("b"));
    });
    // The way out is real, for whoever follows links.
    assert_eq!(container.actor.open("r", "/dev/b/victim"), Ok(()));
    container.actor.begin(&["swap", "/dev/a", "/dev/b"]);
    let (mut made, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let path = format!("/dev/a/sub/node{round}");
        match container.make(NULL, &wish(&path), true) {
            Ok(Made::Ours { .. }) => made += 1,
            Ok(other) => panic!("{other:?}"),
            Err(NodeError::Refused(_)) => refused += 1,
            Err(NodeError::Failed { what, source }) => panic!("{what}: {source}"),
        }
        // It may be refused or find nothing, as the directory is this moment.
        let _ = container.remove(NULL, &path, &[]);
    }
    let swaps = container.actor.stop()[0].tries;
    assert!(
        made > 50 && refused > 50 && swaps > 500,
        "no race took place: {made} made, {refused} refused, {swaps} swaps"
    );
    prey.expect_untouched();
    expect_no_temporary_names(&container.path("/dev"));
}

fn a_new_directory_that_is_swapped() {
    let prey = Prey::new();
    let mut container = with_a_way_out(|dev| {
        fs::create_dir(dev.join("a")).unwrap();
        link(&prey.path_inside, dev.join("b"));
    });
    container.actor.begin(&["swap", "/dev/a", "/dev/b"]);
    let mut made = 0;
    for round in 0..ROUNDS {
        let path = format!("/dev/a/x{round}/y/node");
        if let Ok(Made::Ours { directories }) = container.make(NULL, &wish(&path), true) {
            made += 1;
            let _ = container.remove(NULL, &path, &directories);
        }
    }
    let swaps = container.actor.stop()[0].tries;
    assert!(made > 20 && made < ROUNDS && swaps > 500, "no race took place: {made} made, {swaps} swaps");
    prey.expect_untouched();
    expect_no_temporary_names(&container.path("/dev"));
}

/// The owner is given to the new node and to nothing else.
fn a_temporary_name_that_is_swapped() {
    let prey = Prey::new();
    let mut container = with_a_way_out(|_| {});
    let victim = format!("{}/victim", prey.path_inside);
    container.actor.begin(&["ambush", "/dev", &victim]);
    let host = qm_hotplug::sys::host::Host::observe().unwrap();
    let process = container.actor.process();
    let wanted = Node { uid: 4242, gid: 4242, mode: 0o666, ..Node::at("/dev/node") };
    let mut made = 0;
    for _ in 0..5 {
        // Many at a time, so that there is more to hit.
        let wanted = wanted.clone();
        made += qm_hotplug::sys::namespace::inside("test", &process, host, move |inside| {
            let one = || {
                let made = node::make(inside, NULL, &wanted, true).is_ok();
                let _ = node::remove(inside, NULL, &wanted, &[]);
                u32::from(made)
            };
            (0..ROUNDS).map(|_| one()).sum::<u32>()
        })
        .unwrap();
        // A link under the final name is the container's own doing, and refused from then on.
        let _ = fs::remove_file(container.path("/dev/node"));
    }
    let hits: u64 = container.actor.stop()[0].tries;
    assert!(hits > 0 && made > 0, "no race took place: {hits} hits, {made} made");
    prey.expect_untouched();
}
