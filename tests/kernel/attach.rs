//! The whole binary on what stands for a container: `attach`, `detach`, `list` with `pid:N`.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use qm_hotplug::sys::cgroup::CgroupRoot;
use rustix::io::Errno;

use crate::actor::Actor;
use crate::stage::{Chain, Container, FULL, NULL, Nodes, ZERO, bind, deny_all, make_node, mount_tmpfs, programs};
use crate::support::{Said, assert_nothing_left, grants, qm};

const REFUSED: Result<(), Errno> = Err(Errno::PERM);

pub const TESTS: &[(&str, fn())] = &[
    ("attach::opens_and_detach_closes", opens_and_detach_closes),
    ("attach::access_destination_owner_and_mode_are_as_asked", as_asked),
    ("attach::two_nodes_of_one_device_are_two_grants", two_nodes_of_one_device),
    ("attach::a_dev_that_is_the_hosts_is_not_changed", a_dev_that_is_the_hosts_is_not_changed),
    ("attach::a_nested_filter_keeps_its_word", a_nested_filter_keeps_its_word),
    ("attach::a_right_cannot_be_kept_by_hiding_the_node", a_right_cannot_be_kept_by_hiding_the_node),
    ("attach::a_right_cannot_be_kept_by_a_read_only_dev", a_right_cannot_be_kept_by_a_read_only_dev),
    ("attach::bad_devices_and_destinations_change_nothing", bad_devices_and_destinations),
    ("attach::a_dev_that_is_no_directory_changes_nothing", a_dev_that_is_no_directory),
    ("attach::what_is_no_container_is_refused", what_is_no_container_is_refused),
    ("attach::a_cgroup_that_is_shared_with_the_host_is_refused", a_cgroup_that_is_shared_with_the_host),
    ("attach::a_cgroup_that_is_too_deep_is_refused", a_cgroup_that_is_too_deep),
    ("attach::a_container_that_exited_leaves_nothing", a_container_that_exited_leaves_nothing),
];

/// The container's filter, tried with nodes that it had before.
struct Probe {
    container: Container,
}

impl Probe {
    fn new() -> Probe {
        Probe::prepared(|_| {})
    }

    fn prepared(prepare: impl FnOnce(&Path)) -> Probe {
        let container = Container::prepared(|root| {
            mount_tmpfs(&root.join("probe"), nix::mount::MsFlags::empty());
            for (name, number) in [("null", NULL), ("zero", ZERO), ("full", FULL)] {
                make_node(&root.join("probe").join(name), number);
            }
            prepare(root);
        });
        Probe { container }
    }

    fn open(&mut self, how: &str, path: &str) -> Result<(), Errno> {
        self.container.actor.open(how, path)
    }

    fn attach(&self, args: &[&str]) -> Said {
        qm(&[&["attach", &self.container.name()], args].concat())
    }

    fn detach(&self, device: &str) -> Said {
        qm(&["detach", &self.container.name(), device])
    }

    /// Asserts that a command fails so and leaves everything as it was.
    #[track_caller]
    fn refuses(&self, args: &[&str], code: i32, text: &str) {
        let before = self.container.snapshot();
        self.attach(args).fails(code, text);
        assert_eq!(self.container.snapshot(), before, "{args:?}");
        expect_nothing();
    }
}

/// No grant, and nothing of ours in the kernel.
#[track_caller]
fn expect_nothing() {
    assert_eq!(grants(), [serde_json::Value::Null; 0]);
    assert_nothing_left();
}

fn opens_and_detach_closes() {
    let (mut one, mut other) = (Probe::new(), Probe::new());
    let (before, its_programs) = (one.container.snapshot(), one.container.cgroup.programs());
    assert_eq!(one.open("r", "/probe/zero"), REFUSED);
    one.attach(&["/dev/zero"]).ok();
    let host = fs::metadata("/dev/zero").unwrap();
    let node = fs::symlink_metadata(one.container.path("/dev/zero")).unwrap();
    let of = |stat: &fs::Metadata| (stat.rdev(), stat.mode(), stat.uid(), stat.gid());
    assert_eq!(of(&node), of(&host));
    assert_eq!((one.open("rw", "/dev/zero"), one.open("r", "/probe/null")), (Ok(()), REFUSED));
    assert_eq!((other.open("r", "/probe/zero"), other.open("r", "/dev/zero")), (REFUSED, Err(Errno::NOENT)));
    let list = grants();
    assert_eq!(list.len(), 1);
    for (field, value) in [
        ("container", one.container.name().as_str()),
        ("path", "/dev/zero"),
        ("device", "/dev/zero"),
        ("access", "rwm"),
    ] {
        assert_eq!(list[0][field], value, "{field} in {list:?}");
    }
    // Asking twice is asking once.
    one.attach(&["/dev/zero"]).ok();
    assert_eq!(grants(), list);
    one.detach("/dev/zero").ok();
    assert_eq!(one.open("r", "/probe/zero"), REFUSED);
    assert_eq!((one.container.snapshot(), one.container.cgroup.programs()), (before, its_programs));
    expect_nothing();
    one.detach("/dev/zero").fails(4, "/dev/zero");
}

fn as_asked() {
    let mut probe = Probe::new();
    let before = probe.container.snapshot();
    let dest = "/dev/my/own/zero";
    probe.attach(&["/dev/zero", dest, "--access", "r", "--mode", "0640", "--uid", "12", "--gid", "34"]).ok();
    let node = fs::symlink_metadata(probe.container.path(dest)).unwrap();
    assert_eq!((node.mode() & 0o7777, node.uid(), node.gid()), (0o640, 12, 34));
    assert_eq!(probe.container.number_at(dest), Some(ZERO));
    assert_eq!((probe.open("r", dest), probe.open("rw", dest), probe.open("w", dest)), (Ok(()), REFUSED, REFUSED));
    assert_eq!(probe.container.actor.mknod(ZERO, "/dev/another"), REFUSED);
    probe.attach(&["/dev/full", dest]).fails(5, "detach it first");
    probe.detach(dest).ok();
    assert_eq!(probe.container.snapshot(), before);
    expect_nothing();
}

fn two_nodes_of_one_device() {
    let mut probe = Probe::new();
    probe.attach(&["/dev/zero", "/dev/reader", "--access", "r"]).ok();
    probe.attach(&["/dev/zero", "/dev/writer", "--access", "w"]).ok();
    assert_eq!(probe.open("rw", "/probe/zero"), Ok(()));
    probe.detach("/dev/writer").ok();
    assert_eq!((probe.open("r", "/probe/zero"), probe.open("w", "/probe/zero")), (Ok(()), REFUSED));
    assert_eq!(
        (probe.container.number_at("/dev/reader"), probe.container.number_at("/dev/writer")),
        (Some(ZERO), None)
    );
    probe.attach(&["/dev/zero", "/dev/writer", "--access", "w"]).ok();
    // The device's own name takes all of it back.
    probe.detach("/dev/zero").ok();
    assert_eq!(probe.open("r", "/probe/zero"), REFUSED);
    expect_nothing();
}

fn a_dev_that_is_the_hosts_is_not_changed() {
    let mut probe = Probe::prepared(|root| bind("/dev", &root.join("dev")));
    let look = || {
        let stat = fs::symlink_metadata("/dev/zero").unwrap();
        (stat.ino(), stat.mode(), stat.uid(), stat.gid(), stat.ctime(), stat.ctime_nsec())
    };
    let before = look();
    assert_eq!(probe.open("r", "/dev/zero"), REFUSED);
    probe.attach(&["/dev/zero", "--mode", "0600", "--uid", "42"]).ok();
    assert_eq!(probe.open("rw", "/dev/zero"), Ok(()));
    assert_eq!(look(), before);
    assert_eq!(grants()[0]["node"], "host's");
    probe.detach("/dev/zero").ok();
    assert_eq!(probe.open("r", "/dev/zero"), REFUSED);
    assert_eq!(look(), before);
    probe.refuses(&["/dev/zero", "/dev/qm-hotplug-test/zero"], 5, "the host's own");
    assert!(!Path::new("/dev/qm-hotplug-test").exists());
}

fn a_nested_filter_keeps_its_word() {
    let mut probe = Probe::new();
    let (denying, bare) = (probe.container.cgroup.child("denying"), probe.container.cgroup.child("bare"));
    denying.attach(&deny_all());
    probe.attach(&["/dev/zero"]).ok();
    let nodes = Nodes::new();
    let zero = nodes.node(ZERO);
    assert_eq!(probe.open("r", "/dev/zero"), Ok(()));
    assert_eq!((denying.actor().open("r", &zero), bare.actor().open("r", &zero)), (REFUSED, Ok(())));
    probe.detach("/dev/zero").ok();
    assert_eq!(bare.actor().open("r", &zero), REFUSED);
    expect_nothing();
}

fn a_right_cannot_be_kept_by_hiding_the_node() {
    let mut probe = Probe::new();
    probe.attach(&["/dev/zero", "/dev/sub/zero"]).ok();
    fs::rename(probe.container.path("/dev/sub"), probe.container.path("/dev/aside")).unwrap();
    symlink("/dev/aside", probe.container.path("/dev/sub")).unwrap();
    assert_eq!(probe.open("r", "/dev/aside/zero"), Ok(()));
    probe.detach("/dev/zero").ok();
    assert_eq!(probe.open("r", "/dev/aside/zero"), REFUSED);
    expect_nothing();
}

fn a_right_cannot_be_kept_by_a_read_only_dev() {
    let mut probe = Probe::new();
    probe.attach(&["/dev/zero"]).ok();
    probe.container.actor.remount("/dev", true);
    let said = probe.detach("/dev/zero");
    assert_eq!(probe.open("r", "/dev/zero"), REFUSED, "whatever becomes of the node: {said:?}");
    said.fails(1, "/dev/zero");
    assert_eq!(grants().len(), 1, "what is left over stays written down");
    probe.container.actor.remount("/dev", false);
    probe.detach("/dev/zero").ok();
    assert_eq!(probe.container.number_at("/dev/zero"), None);
    expect_nothing();
}

fn bad_devices_and_destinations() {
    let probe = Probe::prepared(|root| {
        fs::write(root.join("dev/file"), "precious").unwrap();
        symlink("/dev/file", root.join("dev/link")).unwrap();
        make_node(&root.join("dev/other"), NULL);
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    let file = file.path().to_str().unwrap();
    let bare_node = Nodes::new().node(crate::stage::ABSENT);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["/dev/no-such-device"], 4, "/dev/no-such-device"),
        (&[file], 4, "a regular file"),
        (&["/dev"], 4, "a directory"),
        (&[bare_node.to_str().unwrap()], 4, bare_node.to_str().unwrap()),
        (&["/dev/zero", "dev/zero"], 2, "relative"),
        (&["/dev/zero", "/dev/../etc/zero"], 2, "'..'"),
        (&["/dev/zero", "/proc/zero"], 2, "/proc"),
        (&["/dev/zero", "/dev/"], 2, "is a directory"),
        (&["/dev/zero", "/dev/file"], 5, "a regular file"),
        (&["/dev/zero", "/dev/file/zero"], 5, "not a directory"),
        (&["/dev/zero", "/dev/link"], 5, "a symbolic link"),
        (&["/dev/zero", "/dev/other"], 5, "another device"),
    ];
    for (args, code, text) in cases {
        probe.refuses(args, *code, text);
    }
    let missing = qm(&["attach", "no-such-container", "/dev/zero"]);
    missing.fails(3, "no-such-container");
}

fn a_dev_that_is_no_directory() {
    for kind in ["link", "fifo", "file"] {
        let probe = Probe::prepared(|root| {
            let dev = root.join("dev");
            nix::mount::umount(&dev).unwrap();
            fs::remove_dir(&dev).unwrap();
            fs::create_dir(root.join("etc")).unwrap();
            match kind {
                "link" => symlink("/etc", &dev).unwrap(),
                "fifo" => {
                    rustix::fs::mknodat(rustix::fs::CWD, &dev, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap()
                }
                _ => fs::write(&dev, "").unwrap(),
            }
        });
        let host = fs::metadata("/etc").unwrap();
        for path in ["/dev/zero", "/dev/sub/zero"] {
            probe.refuses(&["/dev/zero", path], 5, "/dev");
        }
        assert!(!Path::new("/etc/zero").exists() && !Path::new("/etc/sub").exists());
        assert_eq!(fs::metadata("/etc").unwrap().mtime_nsec(), host.mtime_nsec());
    }
}

fn what_is_no_container_is_refused() {
    qm(&["attach", "pid:1", "/dev/zero"]).fails(5, "pid:1");
    let host = Actor::start(None);
    qm(&["attach", &format!("pid:{}", host.pid()), "/dev/zero"]).fails(5, "host's mount namespace");
    qm(&["attach", "pid:4194304", "/dev/zero"]).fails(3, "pid:4194304");
    // In the cgroup that it was started from: the host's.
    let place = Nodes::new();
    let bare = Actor::start(Some(place.path()));
    put_into_root(bare.pid());
    qm(&["attach", &format!("pid:{}", bare.pid()), "/dev/zero"]).fails(5, "no cgroup of its own");
    // Nor one that has a user namespace, too.
    let mut child = std::process::Command::new("unshare").args(["-r", "--mount", "sleep", "100"]).spawn().unwrap();
    let its = |what: &str| fs::read_link(format!("/proc/{}/ns/{what}", child.id())).unwrap();
    let ours = |what: &str| fs::read_link(format!("/proc/self/ns/{what}")).unwrap();
    crate::support::wait_for("its namespaces", || its("mnt") != ours("mnt") && its("user") != ours("user"));
    let said = qm(&["attach", &format!("pid:{}", child.id()), "/dev/zero"]);
    child.kill().unwrap();
    child.wait().unwrap();
    said.fails(5, "no cgroup of its own");
    expect_nothing();
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

fn put_into_root(pid: u32) {
    fs::write(CgroupRoot::find().unwrap().path.join("cgroup.procs"), pid.to_string()).unwrap();
}

fn a_cgroup_that_is_shared_with_the_host() {
    let probe = Probe::new();
    let guest = Actor::start(None);
    probe.container.cgroup.put(guest.pid());
    probe.refuses(&["/dev/zero"], 5, "no cgroup of its own");
    drop(guest);
    probe.attach(&["/dev/zero"]).ok();
    probe.detach("/dev/zero").ok();
}

fn a_cgroup_that_is_too_deep() {
    let probe = Probe::new();
    let mut chain = Chain(Vec::new());
    for level in 2..=32 {
        chain.0.push(chain.0.last().unwrap_or(&probe.container.cgroup).child(&level.to_string()));
    }
    let [.., deepest, too_deep] = &chain.0[..] else { panic!("there are many") };
    too_deep.put(probe.container.actor.pid());
    probe.refuses(&["/dev/zero"], 5, "too deep");
    deepest.put(probe.container.actor.pid());
    probe.attach(&["/dev/zero"]).ok();
    probe.detach("/dev/zero").ok();
    expect_nothing();
}

fn a_container_that_exited_leaves_nothing() {
    let mut probe = Probe::new();
    probe.attach(&["/dev/zero"]).ok();
    let name = probe.container.name();
    probe.container.actor.kill_only();
    assert_eq!(grants().len(), 1, "written down until someone looks");
    qm(&["attach", &name, "/dev/full"]).fails(3, &name);
    expect_nothing();
    probe.container.actor.kill();
    qm(&["attach", &name, "/dev/full"]).fails(3, &name);
    qm(&["detach", &name, "/dev/zero"]).fails(3, &name);
    let root = CgroupRoot::find().unwrap();
    assert!(programs(root.as_fd()).iter().all(|(_, name)| !name.starts_with("qmhp")));
}
