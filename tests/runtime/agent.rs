//! The agent and containers that come and go.

use std::time::{Duration, Instant};

use crate::Case;
use crate::attach::REFUSED;
use crate::plug::{block, numbers};
use crate::state::{entries, entries_of, ledger, programs_on, refused};
use crate::support::podman::{Container, podman};
use crate::support::{Agent, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    (
        "agent::containers_before_and_after_it_get_what_they_ask_for",
        containers_before_and_after_it_get_what_they_ask_for,
    ),
    ("agent::only_true_1_and_yes_ask", only_true_1_and_yes_ask),
    ("agent::a_restarted_container_has_it_again", a_restarted_container_has_it_again),
    ("agent::a_container_that_ends_leaves_nothing", a_container_that_ends_leaves_nothing),
    ("agent::what_a_rule_grants_is_not_detached", what_a_rule_grants_is_not_detached),
    ("agent::many_containers_at_once", many_containers_at_once),
];

pub(crate) const TTYS: [&str; 2] = ["--annotation", "org.containers.qm.device.ttys=true"];

/// Waits until the container has all eight nodes of the category, and asserts that they are the host's in every respect.
#[track_caller]
pub(crate) fn assert_has_ttys(c: &Container) {
    let cgroup = c.cgroup();
    let rights = || entries_of(&cgroup).iter().filter(|entry| entry.number.major == 4).count();
    wait_for("the grants", || rights() == 8 && c.node("/dev/tty7").is_some());
    for n in 0..8 {
        let path = format!("/dev/tty{n}");
        let host = crate::support::podman::describe(&std::fs::metadata(&path).unwrap());
        assert_eq!(c.node(&path), Some(host), "{path}");
    }
    assert!(c.opens("<>", "/dev/tty3") && c.opens("<>", "/dev/tty7"));
}

/// Asserts that the container has neither node nor right.
#[track_caller]
pub(crate) fn assert_has_no_ttys(c: &Container) {
    assert_eq!(c.node("/dev/tty3"), None);
    c.past_the_filter(&format!("mknod /dev/byhand {}", numbers("/dev/tty3"))).ok();
    assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into));
    c.sh("rm /dev/byhand").ok();
}

fn containers_before_and_after_it_get_what_they_ask_for(runtime: &str) {
    let before = Container::start(runtime, "qmh-before", &TTYS);
    let without = Container::start(runtime, "qmh-without", &[]);
    assert_has_no_ttys(&before);
    let _agent = Agent::start();
    assert_has_ttys(&before);
    let after = Container::start(runtime, "qmh-after", &TTYS);
    assert_has_ttys(&after);
    let other = Container::start(runtime, "qmh-other", &["--annotation", "org.containers.qm.device.audio=true"]);
    for c in [&without, &other] {
        assert_has_no_ttys(c);
    }
    let all = grants();
    assert_eq!(all.len(), 16);
    assert!(
        all.iter().all(|grant| grant["origin"] == "rule:ttys" && grant["access"] == "rwm" && grant["node"] == "ours"),
        "{all:?}"
    );
    assert_eq!(entries().len(), 16);
    let status: serde_json::Value = serde_json::from_str(&qm(&["status", "--json"]).ok()).unwrap();
    assert_eq!(status["agent"], true);
    assert_eq!((&status["filter"], &status["events"]), (&"override".into(), &"kernel".into()));
    assert_eq!((&status["containers"], &status["grants"], &status["entries"]), (&4.into(), &16.into(), &16.into()));
    // The mark is on those that have something, and on no other.
    assert!(programs_on(&after.cgroup())[0].starts_with("qmhp"), "{:?}", programs_on(&after.cgroup()));
    assert!(!programs_on(&other.cgroup()).iter().any(|name| name.starts_with("qmhp")));
}

fn only_true_1_and_yes_ask(runtime: &str) {
    let agent = Agent::start();
    let annotated = |name, value: &str| {
        Container::start(runtime, name, &["--annotation", &format!("org.containers.qm.device.{value}")])
    };
    let refused =
        [annotated("qmh-false", "ttys=false"), annotated("qmh-case", "ttys=True"), annotated("qmh-tape", "tape=true")];
    let granted = [annotated("qmh-1", "ttys=1"), annotated("qmh-yes", "ttys=yes")];
    for c in &granted {
        assert_has_ttys(c);
    }
    for c in &refused {
        assert_has_no_ttys(c);
    }
    assert!(agent.log().contains("there is no category 'tape'"), "{}", agent.log());
}

fn a_restarted_container_has_it_again(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-restart", &TTYS);
    let device = block(41);
    assert_has_ttys(&c);
    qm(&["attach", &c.name, &device.path]).ok();
    let first = (c.pid(), entries()[0].cgroup);
    podman(&["restart", "-t", "0", &c.name]).ok();
    assert_ne!(c.pid(), first.0);
    assert_has_ttys(&c);
    wait_for("what the first run had to go", || entries().len() == 8 && grants().len() == 8);
    assert!(entries().iter().all(|entry| entry.cgroup != first.1));
    assert_eq!(c.node(&device.path), None, "what a person attached was for the first run");
}

fn a_container_that_ends_leaves_nothing(runtime: &str) {
    let _agent = Agent::start();
    let stays = Container::start(runtime, "qmh-stays", &TTYS);
    assert_has_ttys(&stays);
    let device = block(42);
    // By itself, killed, stopped by podman, removed by podman.
    type End<'a> = &'a dyn Fn(&Container);
    let ends: [(&str, End<'_>); 4] = [
        ("exits", &|c| drop(c.exec(&["kill", "1"]))),
        ("killed", &|c| drop(crate::support::run("kill", &["-KILL", &c.pid().to_string()]))),
        ("stopped", &|c| drop(podman(&["stop", "-t", "0", &c.name]))),
        ("removed", &|c| drop(podman(&["rm", "-f", "-t", "0", &c.name]))),
    ];
    for (name, end) in ends {
        let trapped = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"];
        let c = Container::start_running(runtime, &format!("qmh-{name}"), &TTYS, &trapped);
        assert_has_ttys(&c);
        qm(&["attach", &c.name, &device.path, "/dev/mine"]).ok();
        let pid = c.pid();
        assert_eq!((entries().len(), ledger().len()), (17, 2));
        end(&c);
        wait_for("its end", || !std::path::Path::new(&format!("/proc/{pid}/root/dev")).exists());
        let ended = Instant::now();
        wait_for("its entries to go", || entries().len() == 8 && ledger().len() == 1);
        assert!(ended.elapsed() < Duration::from_secs(1), "{name}: {:?}", ended.elapsed());
        qm(&["attach", &c.name, &device.path]).fails(3, &c.name);
    }
    assert_has_ttys(&stays);
}

fn what_a_rule_grants_is_not_detached(runtime: &str) {
    let agent = Agent::start();
    let c = Container::start(runtime, "qmh-rule", &TTYS);
    assert_has_ttys(&c);
    let line = refused(&[c.pid()], || qm(&["detach", &c.name, "/dev/tty3"]), 5, "/dev/tty3");
    assert!(line.contains("'qmh-rule'") && line.contains("ttys"), "{line}");
    // Under another path a person may attach and detach it; the rule's right stays.
    qm(&["attach", &c.name, "/dev/tty3", "/dev/mine"]).ok();
    qm(&["detach", &c.name, "/dev/mine"]).ok();
    assert!(c.opens("<>", "/dev/tty3"));
    // Without an agent nobody would bring it back.
    agent.stop();
    qm(&["detach", &c.name, "/dev/tty3"]).ok();
    assert_has_no_ttys(&c);
}

fn many_containers_at_once(runtime: &str) {
    let _agent = Agent::start();
    let names: Vec<String> = (0..6).map(|n| format!("qmh-many-{n}")).collect();
    let all: Vec<Container> = std::thread::scope(|scope| {
        let starts: Vec<_> =
            names.iter().map(|name| scope.spawn(move || Container::start(runtime, name, &TTYS))).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    for c in &all {
        assert_has_ttys(c);
    }
    podman(&["rm", "-a", "-f", "-t", "0"]).ok();
    wait_for("all to be forgotten", || entries().is_empty() && grants().is_empty());
}
