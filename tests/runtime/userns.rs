//! Containers with a user namespace that root started.

use std::os::unix::fs::MetadataExt;

use serde_json::Value;

use crate::Case;
use crate::exact::{Exact, STICK, compare, expect, mounts};
use crate::plug::{Plugged, block, console};
use crate::selectors::asks;
use crate::state::{entries, ledger};
use crate::support::podman::{Container, MAPPED};
use crate::support::{Agent, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("userns::attached_opened_and_detached", attached_opened_and_detached),
    ("userns::ids_are_those_inside", ids_are_those_inside),
    ("userns::ids_that_podman_has_chosen", ids_that_podman_has_chosen),
    ("userns::plugged_and_unplugged_by_rule", plugged_and_unplugged_by_rule),
    ("userns::an_agent_that_starts_makes_it_exact", an_agent_that_starts_makes_it_exact),
    ("userns::what_was_there_at_the_start_goes_and_comes_back", what_was_there_at_the_start),
    ("userns::what_the_container_does_to_its_node_is_its_own_loss", what_the_container_does_to_its_node),
    ("userns::verify_and_explain_know_its_ids", verify_and_explain_know_its_ids),
    ("userns::attached_again_after_its_page_was_lost", attached_again_after_its_page_was_lost),
];

#[cfg(feature = "fail-points")]
pub(crate) const ONCE: &[crate::CaseOnce] = &[("userns::killed_at_every_point", killed_at_every_point)];

/// Of the host's node, all that could be changed.
fn host(device: &Plugged) -> (u64, u64, u32, u32, u32, u64, i64, i64) {
    let it = std::fs::symlink_metadata(&device.path).unwrap();
    (it.dev(), it.ino(), it.mode(), it.uid(), it.gid(), it.nlink(), it.ctime(), it.ctime_nsec())
}

fn attached_opened_and_detached(runtime: &str) {
    let devices = [block(41).owned_by(0, 20, 0o660), console(41).owned_by(0, 20, 0o660)];
    let c = Container::start_mapped(runtime, "qmh-mapped", &[]);
    qm(&["agent", "--release"]).ok();
    let without = (Exact::of(&[&c]), mounts(&c));
    for with_agent in [false, true] {
        let agent = with_agent.then(Agent::start);
        for device in &devices {
            let before = host(device);
            let numbers = as_described(&device.numbers());
            qm(&["attach", &c.name, &device.path]).ok();
            qm(&["attach", &c.name, &device.path, "/dev/a/b/mine", "--mode", "0600"]).ok();
            qm(&["attach", &c.name, &device.path]).ok();
            assert_eq!(c.node(&device.path).unwrap(), format!("{numbers} 100000:100020 0660"));
            assert_eq!(c.node("/dev/a").unwrap(), format!("d 0:0 {MAPPED}:{MAPPED} 0755"));
            assert!(c.opens("<>", &device.path) && c.opens("<", "/dev/a/b/mine"));
            assert_eq!(c.sh(&format!("stat -c '%u:%g %a' {}", device.path)).ok(), "0:20 660\n");
            assert_eq!(grants().len(), 2);
            assert!(grants().iter().all(|grant| grant["node"] == "ours" && grant["uid"] == 0 && grant["gid"] == 20));
            qm(&["verify", &c.name]).ok();
            assert_eq!(host(device), before, "the host's node is as it was");

            qm(&["detach", &c.name, &device.path]).ok();
            qm(&["detach", &c.name, "/dev/a/b/mine"]).ok();
            assert_eq!((c.node(&device.path), c.node("/dev/a")), (None, None));
            assert_eq!((grants().len(), entries().len(), ledger().len()), (0, 0, 0));
            assert_eq!(host(device), before, "the host's node is as it was");
        }
        drop(agent);
        qm(&["agent", "--release"]).ok();
    }
    assert_eq!(mounts(&c), without.1);
    expect(&[&c], &[&without.0], "all is gone");
}

/// `b 7 41` as `b 7:41`.
fn as_described(numbers: &str) -> String {
    let mut words = numbers.split(' ');
    let (kind, major, minor) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    format!("{kind} {major}:{minor}")
}

fn ids_are_those_inside(runtime: &str) {
    let device = block(42).owned_by(70_000, 80_000, 0o640);
    let c = Container::start_mapped(runtime, "qmh-mapped-ids", &[]);
    for (options, expected) in [
        (&["--uid", "12", "--gid", "34"][..], "100012:100034"),
        (&["--uid", "65535"], "165535:100000"),
        // What has no number inside goes to the container's root.
        (&[], "100000:100000"),
        (&["--uid", "65536", "--gid", "4294967294"], "100000:100000"),
        (&["--uid", "0", "--gid", "100020"], "100000:100000"),
    ] {
        qm(&[&["attach", &c.name, &device.path], options].concat()).ok();
        assert_eq!(c.node(&device.path).unwrap(), format!("b 7:42 {expected} 0640"), "{options:?}");
        assert_eq!(device.describe(), "b 7:42 70000:80000 0640");
        qm(&["detach", &c.name, &device.path]).ok();
    }
}

/// With `--userns=auto` it takes the next ones that it has.
fn ids_that_podman_has_chosen(runtime: &str) {
    let device = block(46).owned_by(0, 20, 0o660);
    // In this test program's own /etc.
    for file in ["/etc/subuid", "/etc/subgid"] {
        let before = std::fs::read_to_string(file).unwrap_or_default();
        if !before.contains("containers:") {
            std::fs::write(file, before + "containers:300000:100000\n").unwrap();
        }
    }
    Container::make_image("qmh-auto-image");
    let root = ["qmh-auto-image"];
    let c = Container::try_start(&[], runtime, "qmh-auto", &["--userns=auto"], &root, &["sleep", "1000"]);
    std::os::unix::fs::chown("/dev/null", Some(0), Some(0)).unwrap();
    let c = c.unwrap_or_else(|said| panic!("{said:?}"));
    qm(&["attach", &c.name, &device.path]).ok();
    assert_eq!(c.sh(&format!("stat -c '%u:%g %a' {}", device.path)).ok(), "0:20 660\n");
    assert!(c.look(&device.path).unwrap().uid() >= 300_000 && c.opens("<>", &device.path));
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.node(&device.path), None);
}

/// All that is there where the stick is plugged in.
fn has_stick(c: &Container) -> bool {
    c.opens("<>", "/dev/a/b/stick") && c.opens("<>", "/dev/c/link")
}

fn plugged_and_unplugged_by_rule(runtime: &str) {
    let device = console(41).owned_by(0, 5, 0o620);
    let c = Container::start_mapped(runtime, "qmh-mapped-rule", &[&asks("x", STICK)]);
    let plain = Container::start(runtime, "qmh-plain-rule", &[&asks("x", STICK)]);
    let _agent = Agent::start();
    for _ in 0..5 {
        wait_for("the stick in both", || grants().len() == 4);
        assert!(has_stick(&c) && has_stick(&plain));
        let node = c.node("/dev/a/b/stick").unwrap();
        assert!(node.starts_with("c 7:169 100000:100005 ") || node.starts_with("c 7:169 100000:"), "{node}");
        assert_eq!(c.node("/dev/c").unwrap(), "d 0:0 100000:100000 0755");
        assert_eq!((c.look("/dev/c/link").unwrap().uid(), c.look("/dev/c/link").unwrap().gid()), (MAPPED, MAPPED));
        device.unplug();
        wait_for("it to go from both", || grants().is_empty() && entries().is_empty());
        assert_eq!((c.node("/dev/a"), c.node("/dev/c"), plain.node("/dev/a")), (None, None, None));
        device.again();
    }
}

fn an_agent_that_starts_makes_it_exact(runtime: &str) {
    let (device, by_hand) = (console(41), console(42));
    let c = Container::start_mapped(runtime, "qmh-mapped-start", &[&asks("x", STICK)]);
    compare();
    let full = Exact::of(&[&c]);
    let inode = || (c.look("/dev/a/b/stick").unwrap().dev(), c.look("/dev/a/b/stick").unwrap().ino());
    let before = inode();
    compare();
    expect(&[&c], &[&full], "nothing has changed");
    assert_eq!(inode(), before, "the node is not made anew");
    // Without a ledger it is known again, and what a person had attached goes.
    qm(&["attach", &c.name, &by_hand.path, "/dev/x/mine", "--uid", "7"]).ok();
    for page in ledger().keys() {
        std::fs::write(page, "no page").unwrap();
    }
    compare();
    for file in std::fs::read_dir("/run/qm-hotplug/ledger").unwrap().flatten() {
        if file.path().extension().is_some_and(|extension| extension == "bad") {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    assert_eq!(c.node("/dev/x/mine"), None);
    // The directory may have been the container's own: without a record it stays, unless it is empty and in /dev.
    expect(&[&c], &[&full], "the same without its page");
    assert_eq!(inode(), before, "the node is known again");
    device.unplug();
    compare();
    assert_eq!((c.node("/dev/a"), c.node("/dev/c"), grants().len()), (None, None, 0));
}

/// The runtime binds the host's node, whose owner is a stranger inside; what only its owner may open comes from the agent.
fn what_was_there_at_the_start(runtime: &str) {
    let (open, shut) = (console(43).owned_by(0, 0, 0o666), console(44).owned_by(0, 20, 0o660));
    let asked = [
        asks("open", "devname=/dev/vcsa43"),
        asks("shut", "devname=/dev/vcsa44"),
        asks("as", "devname=/dev/vcsa43;as=/dev/x/y"),
    ];
    let asked = asked.each_ref().map(String::as_str);
    let hooks = crate::precreate::hooks();
    let before = [host(&open), host(&shut)];
    let c = Container::start_mapped_under(&["--hooks-dir", &hooks], runtime, "qmh-mapped-hook", &asked);
    let nodes = || [&*open.path, &shut.path, "/dev/x/y"].map(|path| c.node(path));
    // crun makes a node of its own on a file system of the host's, as we do.
    let at_start = if runtime == "runc" { open.describe() } else { "c 7:171 100000:100000 0644".into() };
    assert_eq!(nodes(), [Some(at_start.clone()), None, None]);
    assert!(c.opens("<>", &open.path));
    let _agent = Agent::start();
    wait_for("the grants", || grants().len() == 3);
    let ours = |number: u32, gid: u32, mode: &str| Some(format!("c 7:{number} 100000:{gid} {mode}"));
    assert_eq!(nodes(), [Some(at_start), ours(172, 100_020, "0660"), ours(171, 100_000, "0666")]);
    assert!(c.opens("<>", &shut.path) && c.opens("<>", "/dev/x/y"));
    assert_eq!([host(&open), host(&shut)], before, "the host's nodes are as they were");
    open.unplug();
    wait_for("it to go", || grants().len() == 1);
    assert_eq!(nodes(), [None, ours(172, 100_020, "0660"), None]);
    // It comes back as one of ours.
    open.again();
    wait_for("it to be back", || grants().len() == 3);
    assert!(c.node(&open.path).unwrap().starts_with("c 7:171 100000:"), "{:?}", nodes());
    assert!(c.opens("<", &open.path) && c.opens("<", "/dev/x/y"));
}

fn what_the_container_does_to_its_node(runtime: &str) {
    let device = block(44);
    let c = Container::start_mapped(runtime, "qmh-mapped-own", &["--cap-add=all"]);
    let before = host(&device);
    let without = (Exact::of(&[&c]), mounts(&c).len());
    let _agent = Agent::start();
    // A copy elsewhere opens for nobody any more, even past the filter.
    qm(&["attach", &c.name, &device.path]).ok();
    c.sh(&format!("touch /tmp/copy && mount --bind {} /tmp/copy", device.path)).ok();
    assert!(c.opens("<", "/tmp/copy"));
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.node(&device.path), None);
    assert_eq!(c.open("<", "/tmp/copy"), Err("Permission denied".into()), "root of the container is a stranger to it");
    assert_eq!(c.node("/tmp/copy").unwrap(), "b 7:44 0:0 0000");
    let pid = c.pid().to_string();
    let past = crate::support::run(
        "nsenter",
        &["-t", &pid, "-m", "-U", "-S", "0", "-G", "0", "--", "/bin/sh", "-c", ": </tmp/copy"],
    );
    assert!(past.code != 0 && past.stderr.contains("ermission denied"), "{past:?}");
    c.sh("umount /tmp/copy && rm /tmp/copy").ok();
    // Nor where the node itself is not to be found.
    qm(&["attach", &c.name, &device.path]).ok();
    c.sh(&format!("touch /tmp/copy && mount --bind {0} /tmp/copy && umount {0}", device.path)).ok();
    assert!(c.opens("<", "/tmp/copy"));
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.open("<", "/tmp/copy"), Err("Permission denied".into()));
    assert_eq!(c.node("/tmp/copy").unwrap(), "b 7:44 0:0 0000");
    c.sh("umount /tmp/copy && rm /tmp/copy").ok();
    // Unmounted, made read-only, bound over, replaced.
    let node = &device.path;
    for line in [
        format!("umount {node}"),
        format!("umount {node} && rm {node}"),
        format!("umount {node} && rm {node} && mkdir {node} && touch {node}/x"),
        format!("umount {node} && echo precious >{node}"),
        format!("mount -o remount,ro,bind {node}"),
        format!("mount --bind /dev/null {node}"),
        format!("mount --bind /bin/busybox {node}"),
        format!(
            "mount -t tmpfs none /dev/over && mkdir /dev/over/x || mkdir /dev/over && mount --bind {node} /dev/over"
        ),
    ] {
        qm(&["attach", &c.name, node]).ok();
        assert!(c.opens("<", node), "{line}");
        c.sh(&line);
        qm(&["detach", &c.name, node]).ok();
        assert_eq!(c.open("<", "/dev/null"), Ok(()), "{line}");
        assert_eq!((grants().len(), entries().len()), (0, 0), "{line}");
        assert_eq!(host(&device), before, "{line}");
        c.sh(&format!("umount {node}; umount {node}; rm -rf {node} /dev/over")).ok();
        qm(&["attach", &c.name, node]).ok();
        qm(&["detach", &c.name, node]).ok();
    }
    assert_eq!(mounts(&c).len(), without.1, "{:?}", mounts(&c));
    drop(_agent);
    qm(&["agent", "--release"]).ok();
    expect(&[&c], &[&without.0], "as before");
}

fn verify_and_explain_know_its_ids(runtime: &str) {
    let device = block(45).owned_by(0, 6, 0o660);
    let c = Container::start_mapped(runtime, "qmh-mapped-proof", &["--user", "12:34", "--group-add", "6"]);
    let accessible = |arguments: &[&str]| -> Value {
        let said: Value = serde_json::from_str(&qm(&[arguments, &["--json"]].concat()).stdout).unwrap();
        match said.as_array() {
            Some(all) => all[0]["accessible"].clone(),
            None => said["accessible"].clone(),
        }
    };
    for (options, expected) in
        [(&[][..], true), (&["--gid", "7"], false), (&["--uid", "12"], true), (&["--mode", "0600"], false)]
    {
        qm(&[&["attach", &c.name, &device.path], options].concat()).ok();
        assert_eq!(c.opens("<>", &device.path), expected, "{options:?}");
        if options == ["--gid", "7"] {
            let said = qm(&["verify", &c.name, &device.path]).fails(5, "uid 12 of its init may not");
            assert!(said.contains("the node is 0660 0:7"), "{said}");
        }
        assert_eq!(accessible(&["verify", &c.name, &device.path]), expected, "{options:?}");
        assert_eq!(accessible(&["explain", &c.name, &device.path]), expected, "{options:?}");
        qm(&["detach", &c.name, &device.path]).ok();
    }
}

#[cfg(feature = "fail-points")]
fn killed_at_every_point() {
    use crate::killed::{attaching_and_detaching, expect_seen, grants_by_rule, revocations_by_rule};

    grants_by_rule("crun", Container::start_mapped);
    revocations_by_rule("runc", Container::start_mapped);
    attaching_and_detaching("crun", true, Container::start_mapped);
    attaching_and_detaching("runc", false, Container::start_mapped);
    expect_seen(qm_hotplug::failpoint::MAPPED_POINTS);
}

/// Without an agent, which would take it back first.
fn attached_again_after_its_page_was_lost(runtime: &str) {
    let device = console(41);
    let c = Container::start_mapped(runtime, "qmh-mapped-lost", &[]);
    qm(&["attach", &c.name, &device.path]).ok();
    ledger().keys().for_each(|page| std::fs::write(page, "no page").unwrap());
    qm(&["attach", &c.name, &device.path]).ok();
    assert!(c.opens("<>", &device.path));
    assert_eq!(grants()[0]["node"], "ours");
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.node(&device.path), None);
    for file in std::fs::read_dir("/run/qm-hotplug/ledger").unwrap().flatten() {
        std::fs::remove_file(file.path()).unwrap();
    }
}
