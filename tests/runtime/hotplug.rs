//! Plugs and unplugs by this kernel, and what the agent makes of them.

use std::time::{Duration, Instant};

use crate::Case;
use crate::attach::REFUSED;
use crate::plug::{block, one_of_each, trigger};
use crate::state::{entries, entries_of};
use crate::support::podman::Container;
use crate::support::{Agent, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("hotplug::an_unplugged_device_is_taken_back", an_unplugged_device_is_taken_back),
    ("hotplug::a_number_used_again_is_another_device", a_number_used_again_is_another_device),
    ("hotplug::events_of_a_category_reach_who_asked", events_of_a_category_reach_who_asked),
    ("hotplug::an_added_device_replaces_a_stale_node", an_added_device_replaces_a_stale_node),
    ("hotplug::a_storm_ends_in_the_right_state", a_storm_ends_in_the_right_state),
];

const TTYS: [&str; 2] = ["--annotation", "org.containers.qm.device.ttys=true"];

fn an_unplugged_device_is_taken_back(runtime: &str) {
    let agent = Agent::start();
    let c = Container::start(runtime, "qmh-plug", &[]);
    for device in one_of_each(41) {
        c.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
        qm(&["attach", &c.name, &device.path]).ok();
        qm(&["attach", &c.name, &device.path, "/dev/a/b"]).ok();
        assert!(c.opens("<>", &device.path) && c.opens("<>", "/dev/a/b"));
        let at = Instant::now();
        device.unplug();
        wait_for("the rights to go", || entries().is_empty());
        assert!(at.elapsed() < Duration::from_secs(1), "{:?}", at.elapsed());
        wait_for("the ledger to be empty", || grants().is_empty());
        assert_eq!((c.node(&device.path), c.node("/dev/a")), (None, None), "nodes and directories are gone");
        assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into), "{}", device.path);
        c.sh("rm /dev/byhand").ok();
    }
    agent.stop();
}

fn a_number_used_again_is_another_device(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-again", &[]);
    let device = block(42);
    c.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
    qm(&["attach", &c.name, &device.path]).ok();
    device.unplug();
    device.again();
    wait_for("the grant to go", || grants().is_empty());
    assert_eq!(c.node(&device.path), None, "a person attached the first one, not this one");
    assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into));
    qm(&["attach", &c.name, &device.path]).ok();
    assert!(c.opens("<>", &device.path) && c.opens("<>", "/dev/byhand"));
}

fn events_of_a_category_reach_who_asked(runtime: &str) {
    let asks = Container::start(runtime, "qmh-asks", &TTYS);
    let other = Container::start(runtime, "qmh-asks-not", &["--annotation", "org.containers.qm.device.ttyUSB=true"]);
    // So that an unplug can be seen in the rights too.
    for c in [&asks, &other] {
        c.past_the_filter("mknod /dev/byhand c 4 5").ok();
    }
    let _agent = Agent::start();
    assert!(asks.opens("<>", "/dev/tty5"));
    trigger("remove", "tty5");
    wait_for("the node to go", || asks.node("/dev/tty5").is_none());
    wait_for("the right to go", || entries_of(&asks.cgroup()).len() == 7);
    assert_eq!(asks.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into));
    assert!(asks.opens("<>", "/dev/tty4"), "the others stay");
    trigger("add", "tty5");
    wait_for("the node to be back", || asks.node("/dev/tty5").is_some());
    assert!(asks.opens("<>", "/dev/tty5") && asks.opens("<>", "/dev/byhand"));
    // A device of that kind that is in no category.
    trigger("add", "tty9");
    trigger("add", "tty6");
    wait_for("all to be worked through", || grants().len() == 8);
    assert_eq!((asks.node("/dev/tty9"), other.node("/dev/tty5")), (None, None));
    assert_eq!(other.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into));
}

fn an_added_device_replaces_a_stale_node(runtime: &str) {
    let c = Container::start(runtime, "qmh-stale", &TTYS);
    let agent = Agent::start();
    trigger("remove", "tty5");
    wait_for("the node to go", || c.node("/dev/tty5").is_none());
    c.past_the_filter("mknod -m 600 /dev/tty5 c 7 77").ok();
    trigger("add", "tty5");
    wait_for("the right node", || c.node("/dev/tty5").is_some_and(|node| node.starts_with("c 4:5 ")));
    assert!(c.opens("<>", "/dev/tty5"));
    // What is no device node is the container's business, and the agent says so once and lives on.
    trigger("remove", "tty6");
    wait_for("the node to go", || c.node("/dev/tty6").is_none());
    c.sh("echo mine >/dev/tty6").ok();
    trigger("add", "tty6");
    wait_for("a line in the log", || agent.log().contains("/dev/tty6 is already there and is a regular file"));
    assert_eq!(c.sh("cat /dev/tty6").ok(), "mine\n");
    assert_eq!(entries_of(&c.cgroup()).len(), 7);
}

fn a_storm_ends_in_the_right_state(runtime: &str) {
    let c = Container::start(runtime, "qmh-storm", &TTYS);
    let _agent = Agent::start();
    for _ in 0..100 {
        for n in 0..8 {
            trigger("remove", &format!("tty{n}"));
            trigger("add", &format!("tty{n}"));
        }
    }
    for n in 0..4 {
        trigger("remove", &format!("tty{n}"));
    }
    let paths = || grants().iter().map(|grant| grant["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    wait_for("the last events", || paths() == ["/dev/tty4", "/dev/tty5", "/dev/tty6", "/dev/tty7"]);
    assert_eq!(c.sh("cd /dev && ls -d tty[0-9]*").ok(), "tty4\ntty5\ntty6\ntty7\n");
    assert_eq!(entries_of(&c.cgroup()).len(), 4);
}
