//! Containers that end, vanish or change at the worst moment. Cheap ones: what podman's do is in `agent`.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use qm_hotplug::core::device::{Kind, Number};
use qm_hotplug::sys::bpf::Map;
use rustix::process::{Pid, Signal, kill_process};

use crate::CaseOnce;
use crate::plug::trigger;
use crate::state::{entries, entries_of, ledger};
use crate::support::crowd::Member;
use crate::support::{Agent, grants, qm, wait_for};

pub(crate) const ONCE: &[CaseOnce] = &[
    ("containers::they_end_in_the_middle_of_a_grant", they_end_in_the_middle_of_a_grant),
    ("containers::a_process_id_is_used_again", a_process_id_is_used_again),
    ("containers::a_cgroup_is_removed_and_made_anew", a_cgroup_is_removed_and_made_anew),
    ("containers::a_dev_that_is_full_read_only_or_covered", a_dev_that_is_full_read_only_or_covered),
    ("containers::a_hundred_thousand_files_in_dev", a_hundred_thousand_files_in_dev),
    ("containers::what_stands_in_the_place_of_a_node", what_stands_in_the_place_of_a_node),
    ("containers::what_a_container_writes_into_the_map_is_found_out", what_a_container_writes_into_the_map),
];

const TTYS: (&str, &str) = ("org.containers.qm.device.ttys", "true");

fn signal(agent: &Agent, signal: Signal) {
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), signal).unwrap();
}

/// Waits until neither the filter nor the ledger knows anything: within a second of the end, where the machine is not busy.
#[track_caller]
fn is_all_gone(ended: Instant) {
    wait_for("what it had to go", || entries().is_empty() && ledger().is_empty());
    assert!(ended.elapsed() < Duration::from_secs(5), "{:?}", ended.elapsed());
}

/// At a different moment each time: before, while and after the agent makes its eight nodes.
fn they_end_in_the_middle_of_a_grant() {
    let agent = Agent::start();
    let mut with_some = 0;
    for round in 0..60 {
        let member = Member::start(&format!("qmh-brief-{round}"), &[TTYS], |_| {});
        let until = Instant::now() + Duration::from_millis(round);
        while Instant::now() < until {}
        with_some += usize::from(!entries_of(&member.cgroup()).is_empty());
        member.kill();
        let ended = Instant::now();
        // As every runtime does.
        member.remove_cgroup();
        drop(member);
        is_all_gone(ended);
    }
    assert!(with_some > 0, "none had rights when it ended");
    assert!(!agent.log().contains("panicked"));
}

/// The next process with the number of a container's init is another container, or none at all.
fn a_process_id_is_used_again() {
    let agent = Agent::start();
    for round in 0..5 {
        let first = Member::start("qmh-pid-first", &[TTYS], |_| {});
        wait_for("its nodes", || grants().len() == 8);
        signal(&agent, Signal::STOP);
        first.kill();
        std::fs::write("/proc/sys/kernel/ns_last_pid", (first.pid - 1).to_string()).unwrap();
        let second = Member::start("qmh-pid-second", &[], |_| {});
        if second.pid != first.pid {
            // Somebody else was quicker.
            signal(&agent, Signal::CONT);
            assert!(round < 4, "the number could not be had again");
            continue;
        }
        // The first one's state is still there, with the same number.
        trigger("remove", "tty5");
        trigger("add", "tty5");
        signal(&agent, Signal::CONT);
        is_all_gone(Instant::now());
        assert_eq!((second.nodes().len(), entries_of(&second.cgroup()).len()), (0, 0));
        qm(&["attach", "qmh-pid-first", "/dev/tty3"]).fails(3, "qmh-pid-first");
        return;
    }
}

fn a_cgroup_is_removed_and_made_anew() {
    let agent = Agent::start();
    let member = Member::start("qmh-cgroup", &[TTYS], |_| {});
    wait_for("its nodes", || grants().len() == 8);
    signal(&agent, Signal::STOP);
    member.kill();
    member.remove_cgroup();
    let cgroup = format!("/sys/fs/cgroup{}", member.cgroup());
    std::fs::create_dir_all(&cgroup).unwrap();
    trigger("remove", "tty5");
    trigger("add", "tty5");
    signal(&agent, Signal::CONT);
    is_all_gone(Instant::now());
    assert_eq!(entries_of(&member.cgroup()).len(), 0, "the new one has nothing of the old one");
    // While it runs, too: its process is moved away first.
    let member = Member::start("qmh-moved", &[TTYS], |_| {});
    wait_for("its nodes", || grants().len() == 8);
    let other = Member::start("qmh-elsewhere", &[], |_| {});
    std::fs::write(format!("/sys/fs/cgroup{}/cgroup.procs", other.cgroup()), member.pid.to_string()).unwrap();
    member.remove_cgroup();
    trigger("remove", "tty5");
    wait_for("the node to go", || member.device_at("/dev/tty5").is_none());
    trigger("add", "tty5");
    qm(&["attach", &member.name, "/dev/tty9"]).fails(5, "it has no cgroup of its own");
    assert_eq!((member.device_at("/dev/tty5"), member.device_at("/dev/tty9")), (None, None), "no right, no node");
    member.kill();
    is_all_gone(Instant::now());
}

fn a_dev_that_is_full_read_only_or_covered() {
    let agent = Agent::start();
    let dev_with = |root: &Path, flags, options: &str| remount(&root.join("dev"), flags, options).unwrap();
    let full = Member::start("qmh-full", &[TTYS], |root| dev_with(root, MsFlags::empty(), "nr_inodes=3"));
    let fixed = Member::start("qmh-fixed", &[TTYS], |root| dev_with(root, MsFlags::MS_RDONLY, ""));
    let fine = Member::start("qmh-fine", &[TTYS], |_| {});
    wait_for("its nodes", || grants().iter().filter(|grant| grant["container"] == "qmh-fine").count() == 8);
    wait_for("both reasons", || {
        agent.log().contains("No space left on device") && agent.log().contains("/dev is mounted read-only")
    });
    // Where a node could not be made there is no right either.
    assert_eq!(full.nodes().len(), entries_of(&full.cgroup()).len());
    assert!(full.nodes().len() < 3);
    assert_eq!((fixed.nodes().len(), entries_of(&fixed.cgroup()).len()), (0, 0));
    // Covered after the grant: the right goes all the same, and the node where it can be seen.
    fine.within(|| mount(Some("none"), "/dev", Some("tmpfs"), MsFlags::empty(), None::<&str>));
    trigger("remove", "tty5");
    wait_for("the right to go", || entries_of(&fine.cgroup()).len() == 7);
    trigger("add", "tty5");
    wait_for("a node in the new /dev", || fine.nodes() == ["tty5"]);
    fine.within(|| nix::mount::umount("/dev"));
    assert!(fine.device_at("/dev/tty3").is_some());
    // With room again, the next event is enough.
    full.within(|| remount("/dev".as_ref(), MsFlags::empty(), "nr_inodes=100"));
    trigger("add", "tty5");
    wait_for("its node", || full.device_at("/dev/tty5").is_some());
}

fn a_hundred_thousand_files_in_dev() {
    let many = Member::start("qmh-many", &[TTYS], |root| {
        remount(&root.join("dev"), MsFlags::empty(), "size=200m,nr_inodes=200000").unwrap();
        for n in 0..100_000 {
            std::fs::File::create(root.join(format!("dev/file{n}"))).unwrap();
        }
    });
    let _agent = Agent::start();
    wait_for("its nodes", || grants().len() == 8);
    for (action, is_there) in [("remove", false), ("add", true)] {
        let at = Instant::now();
        trigger(action, "tty5");
        wait_for(action, || many.device_at("/dev/tty5").is_some() == is_there);
        assert!(at.elapsed() < Duration::from_secs(5), "{action}: {:?}", at.elapsed());
    }
    assert_eq!(many.nodes().len(), 100_008);
}

fn remount(path: &Path, flags: MsFlags, options: &str) -> nix::Result<()> {
    mount(Some("none"), path, Some("tmpfs"), MsFlags::MS_REMOUNT | flags, Some(options))
}

/// A FIFO without a writer would block who opens it, a socket cannot be opened at all.
fn what_stands_in_the_place_of_a_node() {
    let agent = Agent::start();
    let member = Member::start("qmh-instead", &[TTYS], |root| {
        let at = |n: u32| root.join(format!("dev/tty{n}"));
        nix::unistd::mkfifo(&at(1), nix::sys::stat::Mode::S_IRWXU).unwrap();
        drop(std::os::unix::net::UnixListener::bind(at(2)).unwrap());
        std::fs::create_dir(at(3)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", at(4)).unwrap();
    });
    wait_for("the other four", || entries_of(&member.cgroup()).len() == 4);
    for (n, what) in [(1, "a FIFO"), (2, "a socket"), (3, "a directory"), (4, "a symbolic link")] {
        let said = format!("/dev/tty{n} is already there and is {what}");
        wait_for(&said, || agent.log().contains(&said));
    }
    wait_for("their nodes", || [0, 5, 6, 7].iter().all(|n| member.device_at(&format!("/dev/tty{n}")).is_some()));
    assert_eq!(std::fs::read_link(member.path("/dev/tty4")).unwrap(), Path::new("/etc/passwd"));
}

/// A container with all capabilities can write into any map of the kernel's. Between two signs of life it is found out.
fn what_a_container_writes_into_the_map() {
    let agent = Agent::start_with(&[("WATCHDOG_USEC", "1000000")]);
    let member = Member::start("qmh-mighty", &[TTYS], |_| {});
    wait_for("its nodes", || grants().len() == 8);
    let before = entries();
    let (cgroup, memory) = (before[0].cgroup, Number { kind: Kind::Char, major: 1, minor: 1 });
    member.within(|| {
        let grants = (1..).filter_map(|id| Map::by_id(id).ok()).find(|(_, name)| name.starts_with("qmhp_grants"));
        let kind = memory.kind.bpf_code();
        let numbers = [kind, memory.major, memory.minor, 0].map(u32::to_ne_bytes).concat();
        let key = [&cgroup.to_ne_bytes()[..], &numbers].concat();
        let (map, _) = grants.expect("there is one");
        map.insert(&key, &7u32.to_ne_bytes()).map_err(|_| nix::errno::Errno::EPERM)
    });
    wait_for("a line in the log", || agent.log().contains("had access rwm to c 1:1 that nobody granted"));
    wait_for("its end", || entries() == before);
}
