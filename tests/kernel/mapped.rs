//! Device nodes in a container with a user namespace: mounted from outside, and of no use to it when they are taken away.

use std::fs::{self, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use qm_hotplug::core::device::Number;
use qm_hotplug::core::ledger::Node;
use qm_hotplug::sys::held::Held;
use qm_hotplug::sys::host::Host;
use qm_hotplug::sys::namespace::{Inside, inside};
use qm_hotplug::sys::node::{self, Before, Made, NodeError};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

use crate::actor::Actor;
use crate::stage::{FULL, NULL, Nodes, ZERO, make_node, snapshot, wish};
use crate::support::wait_for;

pub const TESTS: &[(&str, fn())] = &[
    ("mapped::a_node_opens_and_leaves_nothing", a_node_opens_and_leaves_nothing),
    ("mapped::owner_and_mode_are_exact_and_directories_are_the_containers", owner_and_mode_are_exact),
    ("mapped::what_the_host_has_mounted_stays_as_it_is", what_the_host_has_mounted_stays),
    ("mapped::a_copy_is_of_no_use_when_the_node_is_taken_away", a_copy_is_of_no_use),
    ("mapped::a_node_of_the_hosts_is_unmounted_and_not_changed", a_node_of_the_hosts),
    ("mapped::a_file_system_like_ours_is_no_node_of_ours", a_file_system_like_ours),
    ("mapped::what_the_container_puts_in_its_place_stays", what_the_container_puts_in_its_place),
    ("mapped::a_read_only_dev_is_refused_in_words", a_read_only_dev_is_refused),
    ("mapped::where_its_root_may_not_write_nothing_is_made", where_its_root_may_not_write),
    ("mapped::a_namespace_that_knows_one_id_is_served", a_namespace_that_knows_one_id),
    ("mapped::a_container_that_swaps_and_unmounts_reaches_nothing", a_container_that_swaps_and_unmounts),
];

/// A process in a user namespace, with a root directory of the host's and a `/dev` of its own.
struct Mapped {
    actor: Actor,
    root: Nodes,
}

impl Mapped {
    fn new() -> Mapped {
        Mapped::with("0 100000 65536", |_| {})
    }

    fn with(map: &str, prepare: impl FnOnce(&Path)) -> Mapped {
        let root = Nodes::new();
        fs::create_dir(root.path().join("dev")).unwrap();
        rustix::fs::chown(root.path(), Some(Uid::from_raw(100_000)), Some(Gid::from_raw(100_000))).unwrap();
        prepare(root.path());
        let actor = Actor::start_mapped(root.path(), map);
        Mapped { actor, root }
    }

    /// Where the host sees a path of the container.
    fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.actor.pid()))
    }

    fn look(&self, path: &str) -> Option<Metadata> {
        fs::symlink_metadata(self.path(path)).ok()
    }

    /// Mode, owner and group.
    fn owner(&self, path: &str) -> Option<(u32, u32, u32)> {
        self.look(path).map(|it| (it.mode() & 0o7777, it.uid(), it.gid()))
    }

    fn visit<T: Send + 'static>(&self, work: impl FnOnce(Inside<'_>) -> T + Send + 'static) -> T {
        inside("test", &self.actor.process(), Host::observe().unwrap(), work).unwrap()
    }

    fn make(&self, number: Number, wanted: &Node, replace: bool) -> Result<Made, NodeError> {
        let wanted = wanted.clone();
        self.visit(move |inside| node::make(inside, number, &wanted, replace))
    }

    fn held(&self) -> Held {
        let process = self.actor.process();
        Held::of(process.pid, process.start_time)
    }

    /// As a removal does it.
    fn remove(&self, number: Number, path: &str, directories: &[String]) -> bool {
        self.held().end(path, number).unwrap();
        let (node, directories) = (Node::at(path), directories.to_vec());
        self.visit(move |inside| node::remove(inside, number, &node, &directories)).unwrap()
    }

    fn stands(&self, number: Number, wanted: &Node) -> bool {
        let wanted = wanted.clone();
        self.visit(move |inside| node::stands(inside, number, &wanted))
    }

    /// Paths of what is mounted, in their order.
    fn mounts(&self) -> Vec<String> {
        mounts(&self.actor.pid().to_string())
    }

    fn snapshot(&self) -> Vec<String> {
        snapshot(&self.path("/"))
    }
}

fn mounts(pid: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    text.lines().map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect()
}

fn ours() -> Made {
    Made::Ours { directories: vec![] }
}

/// All that could be changed.
fn all_of(path: &Path) -> (u64, u64, u32, u32, u32, i64, i64) {
    let it = fs::symlink_metadata(path).unwrap();
    (it.dev(), it.ino(), it.mode(), it.uid(), it.gid(), it.ctime(), it.ctime_nsec())
}

fn a_node_opens_and_leaves_nothing() {
    let mut container = Mapped::new();
    let before = (container.snapshot(), container.mounts());
    assert_eq!(container.actor.mknod(ZERO, "/dev/byhand"), Err(Errno::PERM), "it can make none itself");
    for _ in 0..3 {
        assert_eq!(container.make(ZERO, &wish("/dev/zero"), false).unwrap(), ours());
        assert_eq!(container.actor.open("rw", "/dev/zero"), Ok(()));
        assert!(container.stands(ZERO, &wish("/dev/zero")));
        assert!(!container.stands(NULL, &wish("/dev/zero")) && !container.stands(ZERO, &wish("/dev/null")));
        let number = ZERO;
        // Whoever makes it once more knows nothing of it: it is ours all the same.
        let nothing = Before::Missing { directories: vec![] };
        assert_eq!(container.visit(move |it| node::before(it, number, &wish("/dev/zero"))), nothing);
        assert_eq!(container.make(ZERO, &wish("/dev/zero"), false).unwrap(), ours());
        assert_eq!(container.actor.open("rw", "/dev/zero"), Ok(()));
        assert!(matches!(container.make(FULL, &wish("/dev/zero"), false), Err(NodeError::Refused(_))));
        // A rule takes the place of another device's.
        assert_eq!(container.make(FULL, &wish("/dev/zero"), true).unwrap(), ours());
        assert!(!container.remove(ZERO, "/dev/zero", &[]));
        assert!(container.remove(FULL, "/dev/zero", &[]));
        assert_eq!((container.snapshot(), container.mounts()), before);
    }
}

fn owner_and_mode_are_exact() {
    let container = Mapped::with("0 100000 1000\n5000 500000 10\n", |_| {});
    let cases = [
        ((0, 0), (100_000, 100_000)),
        ((999, 20), (100_999, 100_020)),
        ((1000, 5009), (100_000, 500_009)),
        ((5010, 65_534), (100_000, 100_000)),
        ((u32::MAX, u32::MAX), (100_000, 100_000)),
    ];
    for (mask, mode) in [(0o000, 0o660), (0o077, 0o666), (0o777, 0o604), (0o022, 0)] {
        let before = rustix::process::umask(mask.into());
        for ((uid, gid), (host_uid, host_gid)) in cases {
            let wanted = Node { uid, gid, mode, ..Node::at("/dev/a/b/node") };
            let Made::Ours { directories } = container.make(NULL, &wanted, false).unwrap() else { panic!() };
            assert_eq!(container.owner("/dev/a/b/node"), Some((mode, host_uid, host_gid)), "{uid}:{gid}");
            assert_eq!(container.owner("/dev/a"), Some((0o755, 100_000, 100_000)));
            assert!(container.stands(NULL, &wanted) && !container.stands(NULL, &Node { mode: 0o611, ..wanted }));
            assert!(container.remove(NULL, "/dev/a/b/node", &directories));
            assert_eq!(container.look("/dev/a").map(|_| ()), None);
        }
        assert_eq!(rustix::process::umask(before).as_raw_mode(), mask, "this process keeps its umask");
    }
    // A link, and a place that only root of the container may write to.
    fs::set_permissions(container.path("/dev"), fs::Permissions::from_mode(0o1555)).unwrap();
    rustix::fs::chown(container.path("/dev"), Some(Uid::from_raw(100_007)), Some(Gid::from_raw(100_007))).unwrap();
    let link = Node { link_to: Some("/dev/a/node".into()), ..Node::at("/dev/c/link") };
    let Made::Ours { directories } = container.make(NULL, &link, false).unwrap() else { panic!() };
    assert_eq!((container.look("/dev/c/link").unwrap().uid(), directories.len()), (100_000, 1));
    assert!(container.visit(move |it| node::remove(it, NULL, &link, &directories)).unwrap());
    assert!(container.look("/dev/c").is_none());
    // This thread is who it was.
    assert_eq!(fs::symlink_metadata(Nodes::new().node(NULL)).unwrap().uid(), 0);
}

fn what_the_host_has_mounted_stays() {
    let container = Mapped::new();
    let shared = Nodes::new();
    nix::mount::mount(None::<&str>, shared.path(), None::<&str>, nix::mount::MsFlags::MS_SHARED, None::<&str>).unwrap();
    let before = mounts("self");
    for number in [NULL, ZERO, FULL] {
        container.make(number, &wish("/dev/node"), false).unwrap();
        assert_eq!(mounts("self"), before);
        container.remove(number, "/dev/node", &[]);
        assert_eq!(mounts("self"), before);
    }
    assert!(!Path::new("/run/qm-hotplug/nodes").exists(), "no file is left");
}

fn a_copy_is_of_no_use() {
    for how in ["as it is", "read-only", "unmounted", "covered", "hidden"] {
        let mut container = Mapped::new();
        for name in ["copy", "other"] {
            fs::write(container.root.path().join(name), "").unwrap();
        }
        container.make(ZERO, &Node { mode: 0o666, ..Node::at("/dev/zero") }, false).unwrap();
        assert_eq!(container.actor.mount("/dev/zero", "/copy"), Ok(()));
        assert_eq!(container.actor.open("rw", "/copy"), Ok(()));
        match how {
            // A mount that cannot be written to saves nothing.
            "read-only" => container.actor.remount_bound("/dev/zero"),
            "unmounted" => assert_eq!(container.actor.unmount("/dev/zero"), Ok(())),
            "covered" => assert_eq!(container.actor.mount("/other", "/dev/zero"), Ok(())),
            "hidden" => assert_eq!(container.actor.mount("tmpfs", "/dev"), Ok(())),
            _ => {}
        }
        let is_there = matches!(how, "as it is" | "read-only" | "covered");
        assert_eq!(container.remove(ZERO, "/dev/zero", &[]), is_there, "{how}");
        assert_eq!(container.actor.open("r", "/copy"), Err(Errno::ACCESS), "{how}");
        assert_eq!(container.owner("/copy"), Some((0, 0, 0)), "{how}");
        assert!(container.look("/dev/zero").is_none(), "{how}");
        assert!(!container.held().file("/dev/zero").exists(), "{how}");
        // It takes no other one's place.
        if is_there {
            assert_eq!(container.make(ZERO, &Node { mode: 0o666, ..Node::at("/copy") }, false).unwrap(), ours());
            assert_eq!(container.actor.open("rw", "/copy"), Ok(()));
            assert!(container.remove(ZERO, "/copy", &[]));
        }
    }
}

fn a_node_of_the_hosts() {
    let place = Nodes::new();
    let node = place.node(ZERO);
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
    let bound = |root: &Path| {
        fs::write(root.join("bound"), "").unwrap();
        make_node(&root.join("lying"), ZERO);
        let (none, flags) = (None::<&str>, nix::mount::MsFlags::MS_BIND);
        nix::mount::mount(Some(&node), &root.join("bound"), none, flags, none).unwrap();
    };
    let container = Mapped::with("0 100000 65536", bound);
    let before = all_of(&node);
    assert_eq!(container.make(ZERO, &wish("/bound"), false).unwrap(), Made::Containers);
    assert!(!container.stands(ZERO, &Node { mode: 0o666, ..Node::at("/bound") }), "it is not ours");
    // What came along with the root directory is locked there.
    let result = container.visit(|it| node::remove(it, ZERO, &Node::at("/bound"), &[]));
    assert!(matches!(result, Err(NodeError::Failed { .. })), "{result:?}");
    assert_eq!(all_of(&node), before);
    // One that lies in a directory goes like any other.
    assert!(container.remove(ZERO, "/lying", &[]));
    // One that was bound inside is unmounted; the file below it goes if it is empty.
    let mut container = Mapped::with("0 100000 65536", |root| {
        make_node(&root.join("lying"), ZERO);
        fs::write(root.join("empty"), "").unwrap();
        fs::write(root.join("full"), "precious").unwrap();
    });
    let before = all_of(&container.root.path().join("lying"));
    for path in ["/empty", "/full"] {
        assert_eq!(container.actor.mount("/lying", path), Ok(()));
        assert!(container.remove(ZERO, path, &[]));
    }
    assert_eq!(all_of(&container.root.path().join("lying")), before);
    assert!(container.look("/empty").is_none());
    assert_eq!(fs::read_to_string(container.path("/full")).unwrap(), "precious");
}

fn a_file_system_like_ours() {
    let mut container = Mapped::new();
    fs::create_dir(container.root.path().join("like")).unwrap();
    assert_eq!(container.actor.mount("tmpfs", "/like"), Ok(()));
    assert_eq!(container.actor.mknod(ZERO, "/like/node"), Err(Errno::PERM));
    let before = container.mounts();
    assert!(!container.remove(ZERO, "/like", &[]));
    assert_eq!(container.mounts(), before);
}

fn what_the_container_puts_in_its_place() {
    let mut container = Mapped::new();
    let node = || wish("/dev/zero");
    // Unmounted: the empty file of ours goes, and is used again.
    container.make(ZERO, &node(), false).unwrap();
    assert_eq!(container.actor.unmount("/dev/zero"), Ok(()));
    assert_eq!(container.owner("/dev/zero"), Some((0, 100_000, 100_000)));
    assert_eq!(container.make(ZERO, &node(), false).unwrap(), ours());
    assert_eq!(container.actor.open("r", "/dev/zero"), Ok(()));
    assert_eq!(container.actor.unmount("/dev/zero"), Ok(()));
    assert!(!container.remove(ZERO, "/dev/zero", &[]));
    assert!(container.look("/dev/zero").is_none());
    // Something else of its own.
    container.make(ZERO, &node(), false).unwrap();
    assert_eq!(container.actor.unmount("/dev/zero"), Ok(()));
    container.actor.files(&["file", "/dev/zero", "precious"]);
    assert!(!container.remove(ZERO, "/dev/zero", &[]));
    assert_eq!(fs::read_to_string(container.path("/dev/zero")).unwrap(), "precious");
    assert!(matches!(container.make(ZERO, &node(), true), Err(NodeError::Refused(_))));
    container.actor.files(&["remove", "/dev/zero"]);
    // An empty file that somebody may read is not ours.
    container.actor.files(&["file", "/dev/zero", ""]);
    assert!(matches!(container.make(ZERO, &node(), true), Err(NodeError::Refused(_))));
    assert!(!container.remove(ZERO, "/dev/zero", &[]));
    assert!(container.look("/dev/zero").is_some());
    container.actor.files(&["remove", "/dev/zero"]);
    // What is mounted over it goes with it: nothing can be mounted on a file that is removed.
    fs::write(container.root.path().join("file"), "").unwrap();
    container.make(ZERO, &node(), false).unwrap();
    assert_eq!(container.actor.mount("/file", "/dev/zero"), Ok(()));
    assert!(container.remove(ZERO, "/dev/zero", &[]));
    assert!(container.look("/dev/zero").is_none() && container.look("/file").is_some());
    // A link in place of the file.
    container.actor.files(&["link", "/file", "/dev/zero"]);
    assert!(matches!(container.make(ZERO, &node(), true), Err(NodeError::Refused(_))));
}

fn a_read_only_dev_is_refused() {
    let mut container = Mapped::new();
    container.actor.remount("/dev", true);
    let before = container.snapshot();
    for path in ["/dev/zero", "/dev/a/zero"] {
        match container.make(ZERO, &wish(path), false) {
            Err(NodeError::Refused(reason)) => assert!(reason.contains("read-only"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(container.snapshot(), before);
    container.actor.remount("/dev", false);
    container.make(ZERO, &wish("/dev/zero"), false).unwrap();
    assert_eq!(container.actor.open("r", "/dev/zero"), Ok(()));
}

/// A directory of the host's, which is a stranger's inside.
fn where_its_root_may_not_write() {
    let container = Mapped::with("0 100000 65536", |root| fs::create_dir(root.join("out")).unwrap());
    make_node(&container.root.path().join("out/lying"), NULL);
    let before = container.snapshot();
    let link = |path: &str| Node { link_to: Some("/dev/zero".into()), ..Node::at(path) };
    for wanted in [wish("/out/zero"), wish("/out/a/zero"), link("/out/link"), link("/out/a/link")] {
        let error = match container.make(ZERO, &wanted, false) {
            Err(error @ NodeError::Failed { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(error.contains("root of its user namespace has to be allowed"), "{error}");
    }
    let removed = container.visit(|it| node::remove(it, NULL, &Node::at("/out/lying"), &[]));
    assert!(matches!(removed, Err(NodeError::Failed { .. })), "{removed:?}");
    assert_eq!(container.snapshot(), before);
    container.held().end("/out/zero", ZERO).unwrap();
}

/// As rootless engines map a user without further ids. Root of it is the only one there is.
fn a_namespace_that_knows_one_id() {
    let mut container = Mapped::with("0 4242 1", |_| {});
    container.make(ZERO, &Node { uid: 0, gid: 20, mode: 0o660, ..Node::at("/dev/zero") }, false).unwrap();
    assert_eq!(container.owner("/dev/zero"), Some((0o660, 4242, 4242)));
    assert_eq!(container.actor.open("rw", "/dev/zero"), Ok(()));
    assert!(container.remove(ZERO, "/dev/zero", &[]));
}

fn a_container_that_swaps_and_unmounts() {
    let prey = Nodes::new();
    fs::create_dir(prey.path().join("sub")).unwrap();
    fs::write(prey.path().join("victim"), "").unwrap();
    let before = snapshot(prey.path());
    let way_out = |root: &Path| {
        fs::create_dir(root.join("out")).unwrap();
        let (none, flags) = (None::<&str>, nix::mount::MsFlags::MS_BIND);
        nix::mount::mount(Some(prey.path()), &root.join("out"), none, flags, none).unwrap();
    };
    let host = mounts("self").len();
    for kind in ["swap", "unmount", "replace"] {
        let mut container = Mapped::with("0 100000 65536", way_out);
        container.actor.files(&["directory", "/dev/a/sub"]);
        container.actor.files(&["link", "/out", "/dev/b"]);
        let path = if kind == "swap" { "/dev/a/sub/node" } else { "/dev/a/node" };
        match kind {
            "swap" => container.actor.begin(&["swap", "/dev/a", "/dev/b"]),
            "unmount" => container.actor.begin(&["unmount", path]),
            _ => container.actor.begin(&["replace", path, "/out/victim"]),
        }
        let (process, seen) = (container.actor.process(), Host::observe().unwrap());
        let (mut made, mut visits) = (0, 0);
        while made < 200 && visits < 1000 {
            visits += 1;
            let wanted = wish(path);
            made += inside("test", &process, seen, move |inside| {
                let one = || {
                    let made = node::make(inside, ZERO, &wanted, true).is_ok();
                    let _ = node::remove(inside, ZERO, &wanted, &[]);
                    u32::from(made)
                };
                (0..20).map(|_| one()).sum::<u32>()
            })
            .unwrap();
        }
        container.held().end(path, ZERO).unwrap();
        let tries = container.actor.stop()[0].tries;
        assert!(made > 50 && tries > 20, "{kind}: no race took place: {made} made, {tries} tries");
        assert_eq!(snapshot(prey.path()), before, "{kind}");
        assert_eq!(mounts("self").len(), host + 2, "{kind}: nothing came to the host");
        drop(container);
        wait_for("its end", || mounts("self").len() <= host + 2);
    }
}
