//! More events than anybody has, lost ones, and numbers that change hands: consoles, whose char devices `/dev/vcsN` and
//! `/dev/vcsaN` the kernel really makes and removes. The containers are cheap ones.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use qm_hotplug::core::device::{Kind, Number};
use rustix::process::{Pid, Signal, kill_process};

use crate::CaseOnce;
use crate::plug::{console, trigger};
use crate::state::{entries, entries_of};
use crate::support::crowd::Member;
use crate::support::{Agent, grants, qm, wait_for, wait_within};

pub(crate) const ONCE: &[CaseOnce] = &[
    ("storm::of_ten_thousand_events_none_is_lost", of_ten_thousand_events_none_is_lost),
    ("storm::what_was_lost_is_found_by_looking", what_was_lost_is_found_by_looking),
    ("storm::whoever_sends_without_end_keeps_no_removal_waiting", a_flood_of_messages),
    ("storm::a_number_that_changes_hands_at_once", a_number_that_changes_hands_at_once),
];

const CONSOLES: (&str, &str) = ("org.containers.qm.hotplug.screens", "subsystem=vc,devname=vcs*");
const TTYS: (&str, &str) = ("org.containers.qm.device.ttys", "true");
/// The consoles that are used here.
const NUMBERS: std::ops::Range<u32> = 41..61;

/// What a container should have that asks for consoles: names of the nodes and their numbers, as the host has them.
fn expected() -> BTreeSet<(String, Number)> {
    let of_host = std::fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    of_host.filter(|name| name.starts_with("vcs")).map(|name| (name.clone(), number(&format!("/dev/{name}")))).collect()
}

fn number(path: &str) -> Number {
    qm_hotplug::sys::node::number_of(&rustix::fs::lstat(path).unwrap()).unwrap()
}

fn found(member: &Member) -> BTreeSet<(String, Number)> {
    let device = |name: String| member.device_at(&format!("/dev/{name}")).map(|number| (name, number));
    member.nodes().into_iter().filter_map(device).collect()
}

/// Nodes and rights of the one are the host's consoles, and nothing else.
fn is_exact(member: &Member, expected: &BTreeSet<(String, Number)>) -> bool {
    let rights: BTreeSet<Number> = entries_of(&member.cgroup()).into_iter().map(|entry| entry.number).collect();
    found(member) == *expected && rights == expected.iter().map(|(_, number)| *number).collect()
}

fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn of_ten_thousand_events_none_is_lost() {
    let annotations = |n| match n {
        0..2 => vec![CONSOLES],
        2 => vec![TTYS],
        3..20 => vec![("org.containers.qm.device.audio", "true")],
        _ => vec![],
    };
    let crowd: Vec<Member> =
        (0..50).map(|n| Member::start(&format!("qmh-storm-{n}"), &annotations(n), |_| {})).collect();
    let agent = Agent::start();
    let consoles: Vec<_> = NUMBERS.map(console).collect();
    wait_for("the first ones", || is_exact(&crowd[0], &expected()));
    let before = resident(agent.pid());
    // Each round is two removals and two additions.
    for round in 0..2500 {
        let console = &consoles[round % consoles.len()];
        console.unplug();
        console.again();
    }
    consoles.iter().step_by(2).for_each(|console| console.unplug());
    let left = expected();
    wait_within(Duration::from_secs(90), "the last event", || crowd[..2].iter().all(|member| is_exact(member, &left)));
    assert!(!agent.log().contains("events were lost"), "all of them were read");
    assert_eq!(found(&crowd[2]).len(), 8);
    assert_eq!(grants().len(), 8 + 2 * left.len());
    for member in &crowd[3..] {
        assert_eq!((member.nodes().len(), entries_of(&member.cgroup()).len()), (0, 0));
    }
    let grown = resident(agent.pid()).saturating_sub(before);
    assert!(grown < 32 << 10, "the agent grew by {grown} KiB");
}

fn what_was_lost_is_found_by_looking() {
    let asks = Member::start("qmh-lost", &[CONSOLES, TTYS], |_| {});
    let agent = Agent::start();
    let (goes, comes) = (console(41), console(42));
    comes.unplug();
    wait_for("the first one", || asks.device_at("/dev/vcsa41").is_some() && asks.device_at("/dev/vcsa42").is_none());
    let pid = Pid::from_raw(agent.pid() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    goes.unplug();
    comes.again();
    // More than any buffer holds; the kernel drops the newest.
    for _ in 0..300_000 {
        trigger("change", "tty9");
    }
    trigger("remove", "tty5");
    kill_process(pid, Signal::CONT).unwrap();
    wait_within(Duration::from_secs(60), "a line in the log", || agent.log().contains("events were lost"));
    wait_for("the right state", || asks.device_at("/dev/vcsa41").is_none() && asks.device_at("/dev/vcsa42").is_some());
    // The device of the last event is still there: a removal that nobody heard of took nothing away.
    assert!(asks.device_at("/dev/tty5").is_some());
    // Until what was lost is worked through, it may come back.
    wait_for("the next event", || {
        trigger("remove", "tty5");
        std::thread::sleep(Duration::from_millis(50));
        asks.device_at("/dev/tty5").is_none()
    });
}

/// As root of a container on the host's network could.
fn a_flood_of_messages() {
    let asks = Member::start("qmh-flooded", &[TTYS], |_| {});
    let _agent = Agent::start();
    wait_for("its nodes", || grants().len() == 8);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flood = || {
            let pairs = b"ACTION=add\0DEVPATH=/devices/virtual/mem/null\0";
            let header = [40, 40, pairs.len() as u32, 0, 0, 0, 0].map(u32::to_ne_bytes).concat();
            let message = [&b"libudev\0\xfe\xed\xca\xfe"[..], &header, pairs].concat();
            let flags = rustix::net::SocketFlags::CLOEXEC;
            let (family, kind) = (rustix::net::AddressFamily::NETLINK, rustix::net::SocketType::RAW);
            let protocol = Some(rustix::net::netlink::KOBJECT_UEVENT);
            let socket = rustix::net::socket_with(family, kind, flags, protocol).unwrap();
            let group = rustix::net::netlink::SocketAddrNetlink::new(0, 2);
            while !is_over.load(Ordering::Relaxed) {
                let _ = rustix::net::sendto(&socket, &message, rustix::net::SendFlags::empty(), &group);
            }
        };
        scope.spawn(flood);
        std::thread::sleep(Duration::from_millis(500));
        trigger("remove", "tty5");
        let at = std::time::Instant::now();
        while asks.device_at("/dev/tty5").is_some() && at.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(asks.device_at("/dev/tty5"), None, "it went while there was no end of messages");
}

/// The first one's grant is for a device that is gone; who asks for whatever is there has the next one.
fn a_number_that_changes_hands_at_once() {
    let first = Member::start("qmh-first", &[], |_| {});
    let second = Member::start("qmh-second", &[CONSOLES], |_| {});
    let agent = Agent::start();
    let device = console(43);
    for round in 0..100 {
        qm(&["attach", &first.name, &device.path]).ok();
        let its = Number { kind: Kind::Char, ..number(&device.path) };
        assert!(entries_of(&first.cgroup()).iter().any(|entry| entry.number == its), "round {round}");
        device.unplug();
        device.again();
        wait_for("the first one's right to go", || entries_of(&first.cgroup()).is_empty());
        wait_for("the first one's node to go", || first.device_at(&device.path).is_none());
        wait_for("the second one's right", || entries_of(&second.cgroup()).iter().any(|entry| entry.number == its));
    }
    assert!(grants().iter().all(|grant| grant["container"] == "qmh-second"), "{:?}", grants());
    wait_for("all to be settled", || is_exact(&second, &expected()));
    drop(agent);
    assert!(entries().iter().all(|entry| entry.cgroup != 0));
}
