//! Questions from inside a container, and programs that are asked alone.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use qm_hotplug::core::device::Access;
use qm_hotplug::core::proof::{Answer, Found};
use qm_hotplug::error::{Error, Result};
use qm_hotplug::sys::bpf::{Program, attached};
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::host::Host;
use qm_hotplug::sys::probe::{Place, Question, ask};
use qm_hotplug::sys::process::User;
use qm_hotplug::sys::scratch::Scratch;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};

use crate::stage::{
    ABSENT, Container, FULL, NULL, TestCgroup, ZERO, allow_all, allow_only, deny_all, make_node, mount_tmpfs,
    refuse_only,
};

pub const TESTS: &[(&str, fn())] = &[
    ("probe::the_filter_answers_and_no_driver_is_asked", the_filter_answers),
    ("probe::the_user_of_init_is_asked_too", the_user_of_init),
    ("probe::what_is_no_node_is_told_and_blocks_nothing", what_is_no_node),
    ("probe::a_mount_without_devices_is_told", a_mount_without_devices),
    ("probe::what_does_not_answer_is_given_up", what_does_not_answer),
    ("probe::a_program_is_asked_alone", a_program_alone),
    ("probe::scratch_cgroups_go_away", scratch_cgroups_go),
];

const RW: Access = Access::READ.union(Access::WRITE);
const EPERM: Option<i32> = Some(1);
const EACCES: Option<i32> = Some(13);
const ENXIO: Option<i32> = Some(6);

fn root_user() -> User {
    User { uid: 0, gid: 0, groups: vec![], capabilities: 0, namespace: None }
}

fn asked(container: &Container, path: &str, access: Access, user: &User, open: bool) -> Result<Answer> {
    let process = container.actor.process();
    let host = Host::observe().unwrap();
    ask(&Question {
        label: "test",
        cgroup: &container.cgroup.open(),
        place: Place::Inside { process: &process, host, path },
        access,
        user: Some(user),
        open: open.then_some(ABSENT),
    })
}

/// A container with nodes, whose cgroup allows what this program does.
fn container(filter: &Program) -> Container {
    let container = Container::prepared(|root| {
        for (name, number) in [("null", NULL), ("zero", ZERO), ("absent", ABSENT)] {
            make_node(&root.join("dev").join(name), number);
        }
    });
    for program in attached(container.cgroup.open().as_fd()).unwrap() {
        container.cgroup.detach(&program);
    }
    container.cgroup.attach(filter);
    container
}

/// A number without a driver tells the two apart: the filter lets it pass, and only open(2) comes to the driver.
fn the_filter_answers() {
    let c = container(&allow_only(ABSENT));
    let user = root_user();
    let absent = asked(&c, "/dev/absent", RW, &user, false).unwrap();
    assert_eq!((absent.filter, absent.user, absent.open), (Some(0), Some(0), None));
    let opened = asked(&c, "/dev/absent", RW, &user, true).unwrap();
    assert_eq!((opened.filter, opened.user, opened.open), (Some(0), Some(0), ENXIO));
    // Open is for the device that was meant.
    let null = asked(&c, "/dev/null", RW, &user, true).unwrap();
    assert_eq!((null.filter, null.user, null.open), (EPERM, EPERM, None));
    c.cgroup.attach(&allow_all());
    assert_eq!(c.cgroup.open().path, c.cgroup.path);
    assert_eq!(CgroupRoot::find().unwrap().processes(&c.cgroup.path).unwrap(), [c.actor.pid()], "nobody stays there");
}

fn the_user_of_init() {
    let c = container(&allow_only(NULL));
    let of = |uid, gid, groups: &[u32], capabilities| User {
        uid,
        gid,
        groups: groups.to_vec(),
        capabilities,
        namespace: None,
    };
    rustix::fs::chmod(c.path("/dev/null"), Mode::from_raw_mode(0o640)).unwrap();
    rustix::fs::chown(c.path("/dev/null"), Some(rustix::fs::Uid::ROOT), Some(rustix::fs::Gid::from_raw(20))).unwrap();
    for (user, access, expected) in [
        (of(0, 0, &[], 0), RW, Some(0)),
        (of(1000, 1000, &[], 0), RW, EACCES),
        (of(1000, 1000, &[], 0), Access::READ, EACCES),
        (of(1000, 20, &[], 0), Access::READ, Some(0)),
        (of(1000, 1000, &[7, 20], 0), Access::READ, Some(0)),
        (of(1000, 1000, &[20], 0), Access::WRITE, EACCES),
        (of(1000, 1000, &[], 1 << 1), RW, Some(0)),
        // The filter speaks after the permission bits.
        (of(1000, 20, &[], 0), RW, EACCES),
    ] {
        let answer = asked(&c, "/dev/null", access, &user, false).unwrap();
        assert_eq!((answer.filter, answer.user, answer.directory), (Some(0), expected, false), "{user:?} {access}");
    }
    rustix::fs::chmod(c.path("/dev"), Mode::from_raw_mode(0o700)).unwrap();
    let answer = asked(&c, "/dev/null", Access::READ, &of(1000, 20, &[], 0), false).unwrap();
    assert_eq!((answer.filter, answer.user, answer.directory), (Some(0), EACCES, true));
    rustix::fs::chmod(c.path("/dev/zero"), Mode::from_raw_mode(0o666)).unwrap();
    rustix::fs::chmod(c.path("/dev"), Mode::from_raw_mode(0o755)).unwrap();
    let answer = asked(&c, "/dev/zero", RW, &of(1000, 20, &[], 0), false).unwrap();
    assert_eq!((answer.filter, answer.user), (EPERM, EPERM));
}

fn what_is_no_node() {
    let c = container(&allow_all());
    let dev = c.path("/dev");
    mknodat(CWD, dev.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    fs::write(dev.join("file"), "").unwrap();
    std::os::unix::fs::symlink("null", dev.join("link")).unwrap();
    std::os::unix::fs::symlink(format!("/proc/{}/root/dev", std::process::id()), dev.join("out")).unwrap();
    let found = |path: &str| asked(&c, path, RW, &root_user(), true).unwrap();
    let started = Instant::now();
    for (path, expected) in [
        ("/dev/fifo", Found::Other("a FIFO")),
        ("/dev/file", Found::Other("a regular file")),
        ("/dev/link", Found::Other("a symbolic link")),
        ("/dev", Found::Other("a directory")),
        ("/dev/nothing", Found::Missing),
        ("/no/where", Found::Missing),
        ("/../../../no/where", Found::Missing),
    ] {
        assert_eq!(found(path), Answer::none(expected), "{path}");
    }
    for (path, text) in [("/dev/out/null", "symbolic link"), ("/dev/null/x", "not a directory")] {
        assert!(matches!(found(path).found, Found::Blocked(reason) if reason.contains(text)), "{path}");
    }
    // The host's, by climbing: the container's root is the top.
    assert!(matches!(found("/../../dev/null").found, Found::Node(seen) if seen.number == NULL));
    assert!(started.elapsed() < Duration::from_secs(2));
}

fn a_mount_without_devices() {
    let c = container(&allow_all());
    let seen = |c: &Container, path: &str| match asked(c, path, RW, &root_user(), false).unwrap().found {
        Found::Node(seen) => seen.nodev,
        other => panic!("{other:?}"),
    };
    assert!(!seen(&c, "/dev/null"));
    let c = Container::prepared(|root| {
        mount_tmpfs(&root.join("data"), MsFlags::MS_NODEV);
        make_node(&root.join("data/null"), NULL);
    });
    assert!(seen(&c, "/data/null"));
}

fn what_does_not_answer() {
    let fuse = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", std::os::fd::AsRawFd::as_raw_fd(&fuse));
    let c = Container::prepared(|root| {
        let flags = MsFlags::empty();
        mount(Some("mute"), &root.join("dev"), Some("fuse"), flags, Some(options.as_str())).unwrap();
    });
    let started = Instant::now();
    let error = asked(&c, "/dev/null", RW, &root_user(), false).unwrap_err();
    assert!(matches!(error, Error::TimedOut(_)), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(6));
    drop(fuse);

    let c = container(&allow_all());
    fs::write(c.cgroup.directory().join("cgroup.freeze"), "1").unwrap();
    let root = CgroupRoot::find().unwrap();
    assert_eq!(root.frozen(&format!("{}/below", c.cgroup.path)).as_ref(), Some(&c.cgroup.path));
    let error = asked(&c, "/dev/null", RW, &root_user(), false).unwrap_err();
    assert!(matches!(error, Error::TimedOut(_)), "{error:?}");
    assert_eq!(root.processes(&c.cgroup.path).unwrap(), [c.actor.pid()], "the one that stood still is gone");
    fs::write(c.cgroup.directory().join("cgroup.freeze"), "0").unwrap();
    assert_eq!(root.frozen(&c.cgroup.path), None);
}

fn a_program_alone() {
    let root = CgroupRoot::find().unwrap();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let [null, full] = ["/dev/null", "/dev/full"].map(|path| open(path, flags, Mode::empty()).unwrap());
    // A program at the root that refuses says nothing about the others.
    let foreign = refuse_only("guard", FULL);
    foreign.attach(root.as_fd()).unwrap();
    let scratch = Scratch::new(&root).unwrap();
    let table = [
        (&foreign, true, false),
        (&deny_all(), true, true),
        (&allow_all(), false, false),
        (&allow_only(NULL), true, false),
        (&refuse_only("x", NULL), false, true),
    ];
    let answers = table.map(|(program, ..)| {
        (scratch.refuses(program, full.as_fd(), RW).unwrap(), scratch.refuses(program, null.as_fd(), RW).unwrap())
    });
    foreign.detach(root.as_fd()).unwrap();
    assert_eq!(answers, table.map(|(_, of_full, of_null)| (of_full, of_null)));
    let stage = crate::stage::Stage::new();
    let with_maps = attached(root.as_fd()).unwrap().into_iter().next_back().unwrap();
    let error = scratch.refuses(&with_maps, null.as_fd(), RW).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
    drop(stage);
}

fn scratch_cgroups_go() {
    let root = CgroupRoot::find().unwrap();
    let scratches = || root.walk().into_iter().filter(|path| path.starts_with("/qmhp-probe-")).collect::<Vec<_>>();
    assert_eq!(scratches(), [""; 0]);
    // No process can have that number.
    fs::create_dir(root.path.join("qmhp-probe-4194305")).unwrap();
    let scratch = Scratch::new(&root).unwrap();
    assert_eq!(scratches(), [format!("/qmhp-probe-{}", std::process::id())]);
    drop(scratch);
    assert_eq!(scratches(), [""; 0]);
    let _ = TestCgroup::new("unused");
}
