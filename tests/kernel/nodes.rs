//! Device nodes in a container's mount namespace: what is made, exactly, and what is never touched.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use qm_hotplug::core::device::{Kind, Number};
use qm_hotplug::core::ledger::Node;
use qm_hotplug::error::Error;
use qm_hotplug::sys::host::Host;
use qm_hotplug::sys::namespace::inside;
use qm_hotplug::sys::node::{self, Made, NodeError};
use qm_hotplug::sys::process::Process;
use rustix::fs::Mode;
use rustix::process::umask;

use crate::stage::{ABSENT, Container, NULL, ZERO, bind, block_device, make_node, mount_tmpfs, snapshot, wish};

pub const TESTS: &[(&str, fn())] = &[
    ("nodes::numbers_owner_and_mode_are_exact_under_any_umask", numbers_owner_and_mode_are_exact),
    ("nodes::directories_come_and_go_with_the_node", directories_come_and_go_with_the_node),
    ("nodes::a_directory_in_use_stays", a_directory_in_use_stays),
    ("nodes::what_is_no_device_node_is_left_alone", what_is_no_device_node_is_left_alone),
    ("nodes::a_node_of_another_device_is_replaced_only_where_allowed", a_node_of_another_device),
    ("nodes::a_node_that_the_container_has_is_its_own", a_node_that_the_container_has_is_its_own),
    ("nodes::only_the_same_node_is_removed", only_the_same_node_is_removed),
    ("nodes::useless_file_systems_are_refused_in_words", useless_file_systems_are_refused),
    ("nodes::a_parent_that_is_no_directory_is_refused", a_parent_that_is_no_directory_is_refused),
    ("nodes::a_node_in_a_directory_that_became_something_else_is_gone", a_directory_that_became_something_else),
    ("nodes::the_hosts_own_dev_is_never_changed", the_hosts_own_dev_is_never_changed),
    ("nodes::a_directory_of_the_hosts_dev_is_never_changed", a_directory_of_the_hosts_dev_is_never_changed),
    ("nodes::an_exited_process_is_said_to_have_exited", an_exited_process),
    ("nodes::a_namespace_whose_root_is_still_the_hosts_is_refused", a_root_that_is_still_the_hosts),
];

fn number_of(path: &Path) -> Option<Number> {
    node::number_of(&rustix::fs::lstat(path).ok()?)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, NodeError>, text: &str) {
    match result {
        Err(NodeError::Refused(reason)) if reason.contains(text) && !reason.contains('\n') => {}
        other => panic!("a refusal with {text:?} was expected, not {other:?}"),
    }
}

/// Puts the umask back when dropped.
struct Umask(Mode);

impl Umask {
    fn set(bits: u32) -> Umask {
        Umask(umask(Mode::from_raw_mode(bits)))
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        umask(self.0);
    }
}

fn numbers_owner_and_mode_are_exact() {
    let container = Container::new();
    let numbers = [NULL, block_device(7, 0), block_device(259, 1_048_575), ABSENT];
    let mut at = 0;
    for mask in [0o000, 0o022, 0o077, 0o777] {
        let _umask = Umask::set(mask);
        for (mode, uid, gid) in
            [(0o660, 0, 0), (0o666, 1234, 5678), (0o000, 65534, 65534), (0o777, 0, 4_294_967_294), (0o640, 5, 0)]
        {
            at += 1;
            let number = numbers[at % numbers.len()];
            let path = format!("/dev/node{at}");
            let wanted = Node { path: path.clone(), uid, gid, mode, link_to: None };
            assert_eq!(container.make(number, &wanted, false).unwrap(), Made::Ours { directories: vec![] });
            let stat = fs::symlink_metadata(container.path(&path)).unwrap();
            assert_eq!(number_of(&container.path(&path)), Some(number));
            assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (mode, uid, gid), "umask {mask:o}");
            assert!(container.remove(number, &path, &[]).unwrap());
        }
        assert_eq!(umask(Mode::from_raw_mode(mask)).as_raw_mode(), mask, "this process keeps its umask");
    }
    assert_eq!(fs::read_dir(container.path("/dev")).unwrap().count(), 0);
}

fn directories_come_and_go_with_the_node() {
    let container = Container::new();
    let before = container.snapshot();
    let _umask = Umask::set(0o077);
    let path = "/dev/serial/by-id/zigbee";
    let directories = vec!["/dev/serial".to_owned(), "/dev/serial/by-id".to_owned()];
    assert_eq!(container.make(NULL, &wish(path), false).unwrap(), Made::Ours { directories: directories.clone() });
    for directory in &directories {
        let stat = fs::metadata(container.path(directory)).unwrap();
        assert_eq!((stat.mode() & 0o7777, stat.uid()), (0o755, 0), "processes inside reach the node");
    }
    // What is there already is nobody's to remove.
    assert_eq!(container.make(ZERO, &wish("/dev/serial/second"), false).unwrap(), Made::Ours { directories: vec![] });
    assert!(container.remove(ZERO, "/dev/serial/second", &[]).unwrap());
    assert!(container.remove(NULL, path, &directories).unwrap());
    assert_eq!(container.snapshot(), before);
    // Outside of /dev and at the top alike.
    for path in ["/new/place/node", "/node"] {
        let Made::Ours { directories } = container.make(NULL, &wish(path), false).unwrap() else { panic!("{path}") };
        assert_eq!(number_of(&container.path(path)), Some(NULL));
        assert!(container.remove(NULL, path, &directories).unwrap());
        assert_eq!(container.snapshot(), before);
    }
}

fn a_directory_in_use_stays() {
    let container = Container::new();
    let Made::Ours { directories } = container.make(NULL, &wish("/dev/a/b/node"), false).unwrap() else { panic!() };
    fs::write(container.path("/dev/a/mine"), "the container's").unwrap();
    assert!(container.remove(NULL, "/dev/a/b/node", &directories).unwrap());
    assert_eq!(fs::read_dir(container.path("/dev/a")).unwrap().count(), 1, "b is gone, the file is not");
    assert_eq!(fs::read_to_string(container.path("/dev/a/mine")).unwrap(), "the container's");
}

fn what_is_no_device_node_is_left_alone() {
    let container = Container::new();
    fs::write(container.path("/dev/file"), "precious").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, container.path("/dev/fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(container.path("/dev/socket")).unwrap();
    fs::create_dir(container.path("/dev/directory")).unwrap();
    symlink("/dev/file", container.path("/dev/link")).unwrap();
    symlink("/nowhere", container.path("/dev/dangling")).unwrap();
    let before = container.snapshot();
    let cases = [
        ("file", "a regular file"),
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("directory", "a directory"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
    ];
    for (name, what) in cases {
        let path = format!("/dev/{name}");
        for replace in [false, true] {
            refused(container.make(NULL, &wish(&path), replace), what);
        }
        assert!(!container.remove(NULL, &path, &[]).unwrap());
    }
    assert_eq!(container.snapshot(), before);
}

fn a_node_of_another_device() {
    let container = Container::new();
    for stale in [ZERO, block_device(NULL.major, NULL.minor)] {
        make_node(&container.path("/dev/node"), stale);
        let before = container.snapshot();
        refused(container.make(NULL, &wish("/dev/node"), false), "another device");
        assert_eq!(container.snapshot(), before);
        // What an unplugged device left behind, at the same path.
        assert_eq!(container.make(NULL, &wish("/dev/node"), true).unwrap(), Made::Ours { directories: vec![] });
        assert_eq!(number_of(&container.path("/dev/node")), Some(NULL));
        assert_eq!(fs::symlink_metadata(container.path("/dev/node")).unwrap().mode() & 0o7777, 0o660);
        assert_eq!(fs::read_dir(container.path("/dev")).unwrap().count(), 1, "no temporary name is left");
        fs::remove_file(container.path("/dev/node")).unwrap();
    }
}

fn a_node_that_the_container_has_is_its_own() {
    let container = Container::new();
    make_node(&container.path("/dev/node"), NULL);
    fs::set_permissions(container.path("/dev/node"), fs::Permissions::from_mode(0o604)).unwrap();
    let before = container.snapshot();
    for replace in [false, true] {
        let wanted = Node { uid: 42, mode: 0o666, ..wish("/dev/node") };
        assert_eq!(container.make(NULL, &wanted, replace).unwrap(), Made::Containers);
    }
    assert_eq!(container.snapshot(), before);
}

fn only_the_same_node_is_removed() {
    let container = Container::new();
    let remove = |number| container.remove(number, "/dev/node", &[]).unwrap();
    assert!(!remove(NULL), "nothing is there");
    assert!(!container.remove(NULL, "/dev/no/such/node", &["/dev/no".into(), "/dev/no/such".into()]).unwrap());
    container.make(NULL, &wish("/dev/node"), false).unwrap();
    for other in [ZERO, Number { kind: Kind::Block, ..NULL }, Number { major: 2, ..NULL }] {
        assert!(!remove(other), "{other}");
    }
    assert_eq!(number_of(&container.path("/dev/node")), Some(NULL));
    assert!(remove(NULL));
    assert!(!remove(NULL));
}

fn useless_file_systems_are_refused() {
    let container = Container::prepared(|root| {
        let dev = root.join("dev");
        mount_tmpfs(&dev.join("nodev"), MsFlags::MS_NODEV);
        mount_tmpfs(&dev.join("read-only"), MsFlags::empty());
        mount(
            None::<&str>,
            &dev.join("read-only"),
            None::<&str>,
            MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
            None::<&str>,
        )
        .unwrap();
        // Not the file system but this mount of it is read-only or without devices.
        for (name, flag) in [("ro-bind", MsFlags::MS_RDONLY), ("nodev-bind", MsFlags::MS_NODEV)] {
            bind(root.to_str().unwrap(), &dev.join(name));
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flag;
            mount(None::<&str>, &dev.join(name), None::<&str>, flags, None::<&str>).unwrap();
        }
        for (name, kind) in [("proc", "proc"), ("sysfs", "sysfs"), ("pts", "devpts"), ("cgroup", "cgroup2")] {
            fs::create_dir(dev.join(name)).unwrap();
            mount(Some("none"), &dev.join(name), Some(kind), MsFlags::empty(), None::<&str>).unwrap();
        }
    });
    let before: Vec<String> = container.snapshot().into_iter().filter(|line| !is_kernels(line)).collect();
    let cases = [
        ("nodev", "nodev"),
        ("nodev-bind", "nodev"),
        ("read-only", "read-only"),
        ("ro-bind", "read-only"),
        ("proc", "of the kernel's"),
        ("sysfs", "of the kernel's"),
        ("pts", "of the kernel's"),
        ("cgroup", "of the kernel's"),
    ];
    for (name, text) in cases {
        for path in [format!("/dev/{name}/node"), format!("/dev/{name}/new/node")] {
            refused(container.make(NULL, &wish(&path), true), text);
            refused(container.make(NULL, &wish(&path), true), &format!("/dev/{name} is "));
        }
    }
    let after: Vec<String> = container.snapshot().into_iter().filter(|line| !is_kernels(line)).collect();
    assert_eq!(after, before);
}

/// What changes by itself below the container's `/dev`.
fn is_kernels(line: &str) -> bool {
    ["/dev/proc/", "/dev/sysfs/", "/dev/pts/", "/dev/cgroup/"].iter().any(|tree| line.contains(tree))
}

fn a_parent_that_is_no_directory_is_refused() {
    let container = Container::prepared(|root| {
        let dev = root.join("dev");
        fs::create_dir_all(root.join("etc/inner")).unwrap();
        symlink("/etc", dev.join("link")).unwrap();
        symlink("../etc", dev.join("relative")).unwrap();
        symlink("/nowhere", dev.join("dangling")).unwrap();
        symlink("loop", dev.join("loop")).unwrap();
        fs::write(dev.join("file"), "precious").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, dev.join("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        make_node(&dev.join("device"), ZERO);
    });
    let before = container.snapshot();
    let host = ["/etc", "/dev"].map(|path| fs::metadata(path).unwrap().mtime_nsec());
    for (name, text) in [
        ("link", "symbolic link"),
        ("relative", "symbolic link"),
        ("dangling", "symbolic link"),
        ("loop", "symbolic link"),
        ("file", "not a directory"),
        ("fifo", "not a directory"),
        ("device", "not a directory"),
    ] {
        for path in
            [format!("/dev/{name}/node"), format!("/dev/{name}/inner/node"), format!("/dev/{name}/new/inner/node")]
        {
            refused(container.make(NULL, &wish(&path), true), text);
        }
    }
    assert_eq!(container.snapshot(), before);
    assert_eq!(["/etc", "/dev"].map(|path| fs::metadata(path).unwrap().mtime_nsec()), host);

    // The whole /dev.
    let container = Container::prepared(|root| {
        nix::mount::umount(&root.join("dev")).unwrap();
        fs::remove_dir(root.join("dev")).unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        symlink("/etc", root.join("dev")).unwrap();
    });
    let before = container.snapshot();
    refused(container.make(NULL, &wish("/dev/node"), true), "/dev is or contains a symbolic link");
    assert_eq!(container.snapshot(), before);
}

/// A container cannot keep an unplugged device's right by hiding its node: the removal finds nothing and goes on.
fn a_directory_that_became_something_else() {
    let container = Container::new();
    let Made::Ours { directories } = container.make(NULL, &wish("/dev/a/b/node"), false).unwrap() else { panic!() };
    let (there, aside) = (container.path("/dev/a"), container.path("/dev/aside"));
    fs::rename(&there, &aside).unwrap();
    for is_link in [true, false] {
        if is_link {
            symlink("/dev/aside", &there).unwrap()
        } else {
            fs::write(&there, "a file").unwrap()
        }
        assert!(!container.remove(NULL, "/dev/a/b/node", &directories).unwrap());
        assert_eq!(number_of(&aside.join("b/node")), Some(NULL), "links are not followed");
        fs::remove_file(&there).unwrap();
    }
}

fn the_hosts_own_dev_is_never_changed() {
    let container = Container::prepared(|root| bind("/dev", &root.join("dev")));
    expect_host_unchanged(&container, "/dev");
}

/// `-v /dev/snd:/dev/snd`: a part of it.
fn a_directory_of_the_hosts_dev_is_never_changed() {
    let own = TemporaryInDev::new();
    make_node(&own.0.join("null"), NULL);
    let container = Container::prepared(|root| bind(own.0.to_str().unwrap(), &root.join("dev/snd")));
    expect_host_unchanged(&container, "/dev/snd");
    assert!(container.make(ZERO, &wish("/dev/zero"), false).is_ok(), "beside it the container's /dev is its own");
}

/// A directory on the file system of the host's `/dev`, removed when dropped.
struct TemporaryInDev(std::path::PathBuf);

impl TemporaryInDev {
    fn new() -> TemporaryInDev {
        let path = Path::new("/dev").join(format!("qm-hotplug-test-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        TemporaryInDev(path)
    }
}

impl Drop for TemporaryInDev {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn expect_host_unchanged(container: &Container, directory: &str) {
    let place = container.path(directory);
    let before = snapshot(&place);
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).unwrap();
    let changes =
        AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE | AddWatchFlags::IN_ATTRIB;
    watch.add_watch(&place, changes).unwrap();
    let null = format!("{directory}/null");
    for replace in [false, true] {
        let wanted = Node { uid: 42, mode: 0o604, ..wish(&null) };
        assert_eq!(container.make(NULL, &wanted, replace).unwrap(), Made::Hosts);
        refused(container.make(ZERO, &wish(&null), replace), "the host's own");
        refused(container.make(NULL, &wish(&format!("{directory}/new")), replace), "the host's own");
        refused(container.make(NULL, &wish(&format!("{directory}/new/deep/node")), replace), "the host's own");
    }
    assert!(!container.remove(NULL, &null, &[]).unwrap());
    let ours = watch.read_events().unwrap_or_default();
    let ours: Vec<_> = ours
        .into_iter()
        .filter(|event| {
            event
                .name
                .as_ref()
                .is_none_or(|name| name == "null" || name == "new" || name.to_string_lossy().starts_with(".qm"))
        })
        .collect();
    assert!(ours.is_empty(), "not even for a moment: {ours:?}");
    assert_eq!(snapshot(&place), before);
}

fn an_exited_process() {
    let host = Host::observe().unwrap();
    for reap in [false, true] {
        let mut container = Container::new();
        let process = container.actor.process();
        let pid = container.actor.pid();
        if reap {
            container.actor.kill()
        } else {
            container.actor.kill_only()
        }
        let result = inside("web", &process, host, |_| panic!("nobody is inside any more"));
        assert!(matches!(result, Err(Error::ContainerExited(ref name)) if name == "web"), "{result:?}");
        assert!(Process::open(pid).is_none(), "neither a zombie nor a number is a process");
    }
}

/// As in the first moments of a container, before the runtime's pivot_root(2).
fn a_root_that_is_still_the_hosts() {
    let mut child = std::process::Command::new("unshare").args(["--mount", "sleep", "100"]).spawn().unwrap();
    let process = Process::open(child.id()).unwrap();
    crate::support::wait_for("a mount namespace of its own", || !process.shares_host_mounts().unwrap());
    let result = inside("web", &process, Host::observe().unwrap(), |_| panic!("it must not get here"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        matches!(result, Err(Error::Refused { ref reason, .. }) if reason.contains("the host's own")),
        "{result:?}"
    );
}
