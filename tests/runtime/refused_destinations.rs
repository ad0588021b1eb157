//! Destinations where no node may be made: one line, exit code 2 or 5, and nothing has changed inside.

use crate::Case;
use crate::attach::REFUSED;
use crate::plug::block;
use crate::refusals::both_ways;
use crate::state::refused;
use crate::support::podman::Container;
use crate::support::{Agent, grants, qm, release, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("refused_destinations::paths_that_mean_something_else", paths_that_mean_something_else),
    ("refused_destinations::what_is_there_already", what_is_there_already),
    ("refused_destinations::file_systems_without_devices", file_systems_without_devices),
    ("refused_destinations::a_read_only_container", a_read_only_container),
    ("refused_destinations::a_dev_that_is_a_link_a_fifo_or_a_file", a_dev_that_is_a_link_a_fifo_or_a_file),
    ("refused_destinations::a_dev_bound_from_elsewhere_inside", a_dev_bound_from_elsewhere_inside),
    ("refused_destinations::a_node_that_cannot_be_removed_is_of_no_use", a_node_that_cannot_be_removed_is_of_no_use),
];

fn paths_that_mean_something_else(runtime: &str) {
    both_ways(runtime, "qmh-paths", &[], |c, inits, device| {
        let long = format!("/dev/{}", "x/".repeat(2100));
        for (path, why) in [
            ("dev/x", "relative"),
            ("x", "relative"),
            ("", "relative"),
            ("/", "directory"),
            ("/dev/", "directory"),
            ("/dev/../etc/x", "'..'"),
            ("/dev/./x", "'.'"),
            ("/dev/x/..", "'..'"),
            ("/proc/x", "/proc"),
            ("//proc//self/x", "/proc"),
            ("/sys/x", "/sys"),
            (&long, ""),
        ] {
            let line = refused(inits, || qm(&["attach", &c.name, device, path]), 2, &format!("'{path}'"));
            assert!(line.contains(why), "{line}");
        }
    });
}

fn what_is_there_already(runtime: &str) {
    both_ways(runtime, "qmh-there-already", &[], |c, inits, device| {
        let prepare = "cd /dev; test -e file || { echo mine >file; mkfifo fifo; mkdir -p full/of; ln -s /etc link; ln -s file node; }";
        c.sh(prepare).ok();
        for (path, why) in [
            ("/dev/file", "a regular file"),
            ("/dev/fifo", "a FIFO"),
            ("/dev/full/of", "a directory"),
            ("/dev/node", "a symbolic link"),
            ("/dev/stdin", "a symbolic link"),
            ("/dev/link/x", "a symbolic link"),
            ("/dev/link/a/b/x", "a symbolic link"),
            ("/dev/file/x", "not a directory"),
            ("/dev/null/x", "not a directory"),
            ("/dev/null", "another device"),
            ("/dev/tty", "another device"),
        ] {
            let line = refused(inits, || qm(&["attach", &c.name, device, path]), 5, &c.name);
            assert!(line.contains(why) && line.contains(path.rsplit_once('/').unwrap().0), "{line}");
        }
        assert_eq!(c.sh("cat /dev/file; echo x >/dev/null").ok(), "mine\n");
    });
}

fn file_systems_without_devices(runtime: &str) {
    both_ways(runtime, "qmh-nodev", &["--tmpfs", "/mnt:rw,nodev"], |c, inits, device| {
        for (path, why) in [
            ("/dev/pts/x", "file system of the kernel's"),
            ("/dev/shm/x", "nodev"),
            ("/dev/shm/a/b/x", "nodev"),
            ("/dev/mqueue/x", "nodev"),
            ("/mnt/x", "nodev"),
        ] {
            let line = refused(inits, || qm(&["attach", &c.name, device, path]), 5, &c.name);
            assert!(
                line.contains(why) && line.contains(path.rsplit_once('/').unwrap().0.split("/a").next().unwrap()),
                "{line}"
            );
        }
    });
}

fn a_read_only_container(runtime: &str) {
    both_ways(runtime, "qmh-readonly", &["--read-only"], |c, inits, device| {
        for path in ["/x", "/new/x", "/etc/x"] {
            refused(inits, || qm(&["attach", &c.name, device, path]), 5, "read-only");
        }
        // Its /dev is a writable tmpfs all the same: there it works.
        qm(&["attach", &c.name, device, "/dev/a/x"]).ok();
        assert!(c.opens("<>", "/dev/a/x"));
        qm(&["detach", &c.name, "/dev/a/x"]).ok();
        assert_eq!(c.node("/dev/a"), None);
    });
    release();
    let c = Container::start(runtime, "qmh-readonly-2", &["--read-only"]);
    c.past_the_filter("mount -o remount,ro /dev").ok();
    let device = block(41);
    for path in ["/dev/x", "/dev/a/x"] {
        refused(&[c.pid()], || qm(&["attach", &c.name, &device.path, path]), 5, "/dev is mounted read-only");
    }
}

fn a_dev_that_is_a_link_a_fifo_or_a_file(runtime: &str) {
    for (place, why) in [
        ("ln -s /etc /dev", "is or contains a symbolic link"),
        ("ln -s ../../../../../../etc /dev", "is or contains a symbolic link"),
        ("ln -s /proc/1/root/dev /dev", "is or contains a symbolic link"),
        ("ln -s / /dev", "is or contains a symbolic link"),
        ("mkfifo /dev", "is not a directory"),
        ("echo mine >/dev", "is not a directory"),
    ] {
        let device = block(42);
        let c = Container::start(runtime, "qmh-hostile", &[]);
        c.past_the_filter("umount -l /dev && rmdir /dev").ok();
        c.past_the_filter(place).ok();
        let host = |top: &str| std::fs::read_dir(top).unwrap().count();
        let before = (host("/etc"), host("/dev"));
        for destination in [&device.path[..], "/dev/x", "/dev/a/b/x"] {
            let line = refused(&[c.pid()], || qm(&["attach", &c.name, &device.path, destination]), 5, why);
            assert!(line.contains("'qmh-hostile': /dev"), "{line}");
        }
        assert_eq!((host("/etc"), host("/dev")), before, "{place}");
        assert_eq!(grants(), [serde_json::json!(null); 0]);
    }
}

fn a_dev_bound_from_elsewhere_inside(runtime: &str) {
    // A correct result inside the container, and no effect outside of it.
    let device = block(43);
    let c = Container::start(runtime, "qmh-bound", &[]);
    c.past_the_filter(
        "mkdir -p /run/own && mount -t tmpfs none /run/own && umount -l /dev && mount --bind /run/own /dev",
    )
    .ok();
    let host = std::fs::read_dir("/dev").unwrap().count();
    qm(&["attach", &c.name, &device.path, "/dev/x"]).ok();
    assert_eq!((c.node("/dev/x"), c.node("/run/own/x")), (Some(device.describe()), Some(device.describe())));
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!((c.node("/dev/x"), std::fs::read_dir("/dev").unwrap().count()), (None, host));
    // Swapped after the node was made: what is at the path now is not ours and stays, the right goes.
    qm(&["attach", &c.name, &device.path, "/dev/x"]).ok();
    c.past_the_filter("umount -l /dev && rmdir /dev && ln -s /etc /dev && echo mine >/etc/x").ok();
    qm(&["detach", &c.name, "/dev/x"]).ok();
    assert_eq!(crate::state::entries(), [], "the right is gone all the same");
    assert_eq!(c.past_the_filter("cat /etc/x").ok(), "mine\n");
}

fn a_node_that_cannot_be_removed_is_of_no_use(runtime: &str) {
    // A container with CAP_SYS_ADMIN can hold on to a node; the right goes all the same, and is not given back.
    let (device, other) = (block(44), block(45));
    let c = Container::start(runtime, "qmh-holds", &[]);
    let holds = || {
        assert_eq!(crate::state::entries(), []);
        assert_eq!(c.open("<", "/dev/x"), REFUSED.map_err(Into::into));
    };
    qm(&["attach", &c.name, &device.path, "/dev/x"]).ok();
    c.past_the_filter("mount -o remount,ro /dev").ok();
    let line = qm(&["detach", &c.name, "/dev/x"]).fails(1, "/dev/x");
    assert!(line.contains("qmh-holds"), "{line}");
    holds();
    assert!(grants()[0]["note"].as_str().unwrap().starts_with("left over: "), "{:?}", grants());
    // The agent does not give it back either, and tries again until it can.
    let agent = Agent::start();
    holds();
    c.past_the_filter("mount -o remount,rw /dev").ok();
    qm(&["detach", &c.name, "/dev/x"]).ok();
    assert_eq!((c.node("/dev/x"), grants()), (None, vec![]));
    // The same when a device is unplugged.
    qm(&["attach", &c.name, &other.path, "/dev/x"]).ok();
    c.past_the_filter("mount -o remount,ro /dev").ok();
    other.unplug();
    wait_for("the right to go", || crate::state::entries().is_empty());
    other.again();
    holds();
    c.past_the_filter("mount -o remount,rw /dev").ok();
    agent.stop();
}
