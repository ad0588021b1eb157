//! The hook, called by podman: what is there at start is in the container and opens.

use std::os::unix::fs::MetadataExt;

use qm_hotplug::core::device::{Access, Number};
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;

use crate::Case;
use crate::agent::{assert_has_no_ttys, assert_has_ttys};
use crate::plug::trigger;
use crate::state::{entries, ledger, programs_on};
use crate::support::podman::{Container, describe, place};
use crate::support::{Agent, BINARY, assert_nothing_left, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("precreate::devices_are_there_and_open", devices_are_there_and_open),
    ("precreate::a_container_without_annotations_is_as_ever", a_container_without_annotations_is_as_ever),
    ("precreate::with_the_agent_nothing_is_double", with_the_agent_nothing_is_double),
    ("precreate::an_unplug_takes_the_right_of_the_start_too", an_unplug_takes_the_right_of_the_start_too),
    ("precreate::a_hidden_node_saves_no_right", a_hidden_node_saves_no_right),
    ("precreate::detach_takes_the_right_of_the_start_too", detach_takes_the_right_of_the_start_too),
];

const ASKS: [&str; 2] = ["--annotation", "org.containers.qm.device.ttys=true"];

/// A hooks directory of ours. The hook is called for every container.
pub(crate) fn hooks() -> String {
    let hooks = place().join("hooks");
    let _ = std::fs::remove_dir_all(&hooks);
    std::fs::create_dir_all(&hooks).unwrap();
    let hook = serde_json::json!({
        "version": "1.0.0",
        "hook": { "path": BINARY, "args": ["qm-hotplug", "precreate"] },
        "when": { "always": true },
        "stages": ["precreate"],
    });
    std::fs::write(hooks.join("qm-hotplug.json"), hook.to_string()).unwrap();
    hooks.display().to_string()
}

/// Starts a container with that directory.
pub(crate) fn start(runtime: &str, name: &str, options: &[&str]) -> Container {
    Container::start_under(&["--hooks-dir", &hooks()], runtime, name, options, &["sleep", "1000"])
}

/// Asserts that all eight nodes are there with the host's numbers, owner and mode, and that they open.
fn assert_opens_all(c: &Container) {
    for n in 0..8 {
        let path = format!("/dev/tty{n}");
        assert_eq!(c.node(&path), Some(describe(&std::fs::metadata(&path).unwrap())), "{path}");
    }
    assert_eq!(c.sh("cd /dev && ls -d tty[0-9]*").ok().split_whitespace().count(), 8, "and no tty8");
    assert!(c.opens("<>", "/dev/tty3") && c.opens("<>", "/dev/tty7"));
}

fn devices_are_there_and_open(runtime: &str) {
    let c = start(runtime, "qmh-hook", &ASKS);
    assert_opens_all(&c);
    // By the runtime's own filter: nothing of ours runs.
    assert_nothing_left();
    assert_eq!(grants(), [serde_json::json!(null); 0]);
    c.past_the_filter("mknod /dev/byhand c 4 9").ok();
    assert_eq!(c.open("<>", "/dev/byhand"), crate::attach::REFUSED.map_err(Into::into), "and no device more");
}

fn a_container_without_annotations_is_as_ever(runtime: &str) {
    let (hooked, plain) = (start(runtime, "qmh-hook-plain", &[]), Container::start(runtime, "qmh-no-hook", &[]));
    let nodes = |c: &Container| c.sh("cd /dev && find . -xdev | sort").ok();
    assert_eq!(nodes(&hooked), nodes(&plain));
    assert_eq!(programs_on(&hooked.cgroup()), programs_on(&plain.cgroup()));
    assert_has_no_ttys(&hooked);
    let no = start(runtime, "qmh-hook-no", &["--annotation", "org.containers.qm.device.ttys=false"]);
    assert_has_no_ttys(&no);
}

fn with_the_agent_nothing_is_double(runtime: &str) {
    let agent = Agent::start();
    let c = start(runtime, "qmh-hook-agent", &ASKS);
    wait_for("the agent to have seen it", || grants().len() == 8);
    assert_opens_all(&c);
    let inode = |path: &str| c.look(path).unwrap().ino();
    let before = inode("/dev/tty3");
    assert!(
        grants().iter().all(|grant| grant["node"] == "container's" && grant["origin"] == "start"),
        "{:?}",
        grants()
    );
    let mut paths: Vec<_> = grants().iter().map(|grant| grant["path"].to_string()).collect();
    paths.dedup();
    assert_eq!((paths.len(), entries().len()), (8, 8));
    // One without the hook gets the same from the agent.
    assert_has_ttys(&Container::start(runtime, "qmh-hook-without", &ASKS));
    // A second event about a device that is there changes nothing.
    trigger("add", "tty3");
    wait_for("only its own grants", || grants().len() == 8);
    assert_eq!(inode("/dev/tty3"), before);
    // What the container got at its start is still its own without us.
    agent.stop();
    qm(&["agent", "--release"]).ok();
    assert_opens_all(&c);
}

fn withdrawn() -> Vec<Number> {
    let filter = DeviceFilter::existing(&CgroupRoot::find().unwrap()).unwrap();
    filter.map_or_else(Vec::new, |filter| filter.withdrawn().unwrap().into_iter().map(|entry| entry.number).collect())
}

fn refused(c: &Container) -> bool {
    c.open("<>", "/dev/byhand") == crate::attach::REFUSED.map_err(Into::into)
}

/// A container that hides its node from the agent does not keep the right for it.
fn a_hidden_node_saves_no_right(runtime: &str) {
    let c = start(runtime, "qmh-hook-hidden", &ASKS);
    c.past_the_filter("mknod /dev/byhand c 4 5 && rm /dev/tty5 && echo mine >/dev/tty5").ok();
    qm(&["attach", &c.name, "/dev/tty6", "/dev/tty6"]).ok();
    let agent = Agent::start();
    assert!(agent.log().contains("/dev/tty5 is already there and is a regular file"), "{}", agent.log());
    assert!(c.opens("<>", "/dev/byhand"));
    trigger("remove", "tty5");
    wait_for("the right to go", || refused(&c));
    // A person's own grant does not hide the right of the start either.
    c.past_the_filter("rm /dev/byhand && mknod /dev/byhand c 4 6").ok();
    trigger("remove", "tty6");
    wait_for("the right to go", || refused(&c));
    assert_eq!(c.sh("cat /dev/tty5").ok(), "mine\n");
    let status: serde_json::Value = serde_json::from_str(&qm(&["status", "--json"]).ok()).unwrap();
    assert_eq!(status["withdrawn"], 2);
}

/// The runtime's own filter allows the device until the container ends; ours does not while it is unplugged.
fn an_unplug_takes_the_right_of_the_start_too(runtime: &str) {
    let agent = Agent::start();
    let c = start(runtime, "qmh-hook-unplug", &ASKS);
    let other = Container::start(runtime, "qmh-given", &["--device=/dev/tty5"]);
    c.past_the_filter("mknod /dev/byhand c 4 5").ok();
    wait_for("the agent to have seen it", || grants().len() == 8);
    assert!(c.opens("<>", "/dev/byhand"));
    trigger("remove", "tty5");
    wait_for("node and right to go", || c.node("/dev/tty5").is_none() && refused(&c));
    wait_for("the agent to be done", || grants().len() == 7);
    assert!(c.opens("<>", "/dev/tty4") && other.opens("<>", "/dev/tty5"), "other devices and others stay");

    // The agent's end does not open it. What the ledger does not know of is removed by the next agent.
    agent.stop();
    assert!(refused(&c) && withdrawn().len() == 1);
    let root = CgroupRoot::find().unwrap();
    let mut filter = DeviceFilter::existing(&root).unwrap().unwrap();
    filter.withdraw(&root, 7, Number { minor: 77, ..withdrawn()[0] }, Access::ALL).unwrap();
    let agent = Agent::start();
    assert_eq!((withdrawn().len(), grants().len()), (0, 8), "it was plugged in all the time");
    assert!(agent.log().contains("cgroup 7 had 'rwm' on c 4:77 withdrawn"), "{}", agent.log());
    assert!(c.opens("<>", "/dev/tty5"));

    // Plugged in again: granted by the rule, and by the runtime as before.
    trigger("remove", "tty5");
    wait_for("the right to go", || refused(&c));
    trigger("add", "tty5");
    wait_for("the grant", || grants().len() == 8 && c.node("/dev/tty5").is_some());
    assert!(c.opens("<>", "/dev/tty5") && c.opens("<>", "/dev/byhand"));
    wait_for("the withdrawal to go", || withdrawn().is_empty());
    let origins: Vec<_> = grants().iter().map(|grant| grant["origin"].as_str().unwrap().to_owned()).collect();
    assert_eq!(origins.iter().filter(|origin| *origin == "rule:ttys").count(), 1, "{origins:?}");

    // The container's end leaves nothing withdrawn.
    trigger("remove", "tty5");
    wait_for("the right to go", || refused(&c));
    drop(c);
    wait_for("all of it to go", || withdrawn().is_empty() && grants().is_empty() && ledger().is_empty());
    agent.stop();
}

fn detach_takes_the_right_of_the_start_too(runtime: &str) {
    let agent = Agent::start();
    let c = start(runtime, "qmh-hook-detach", &ASKS);
    c.past_the_filter("mknod /dev/byhand c 4 5").ok();
    wait_for("the agent to have seen it", || grants().len() == 8);
    agent.stop();
    qm(&["detach", &c.name, "/dev/tty5"]).ok();
    assert!(c.node("/dev/tty5").is_none() && refused(&c));
    // A person's own grant stands above what is withdrawn, and leaves it as it was.
    qm(&["attach", &c.name, "/dev/tty5"]).ok();
    assert!(c.opens("<>", "/dev/tty5"));
    qm(&["detach", &c.name, "/dev/tty5"]).ok();
    assert!(refused(&c) && withdrawn().len() == 1);
    qm(&["agent", "--release"]).ok();
    assert_nothing_left();
    assert!(!refused(&c), "without us the container has what its runtime gave it");
}
