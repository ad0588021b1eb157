//! The hook, called by podman: what is there at start is in the container and opens.

use std::os::unix::fs::MetadataExt;

use crate::Case;
use crate::agent::{assert_has_no_ttys, assert_has_ttys};
use crate::plug::trigger;
use crate::state::{entries, programs_on};
use crate::support::podman::{Container, describe, place};
use crate::support::{Agent, BINARY, assert_nothing_left, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("precreate::devices_are_there_and_open", devices_are_there_and_open),
    ("precreate::a_container_without_annotations_is_as_ever", a_container_without_annotations_is_as_ever),
    ("precreate::with_the_agent_nothing_is_double", with_the_agent_nothing_is_double),
];

const ASKS: [&str; 2] = ["--annotation", "org.containers.qm.device.ttys=true"];

/// Starts a container with a hooks directory of ours. The hook is called for every container.
fn start(runtime: &str, name: &str, options: &[&str]) -> Container {
    let hooks = place().join("hooks");
    std::fs::create_dir_all(&hooks).unwrap();
    let hook = serde_json::json!({
        "version": "1.0.0",
        "hook": { "path": BINARY, "args": ["qm-hotplug", "precreate"] },
        "when": { "always": true },
        "stages": ["precreate"],
    });
    std::fs::write(hooks.join("qm-hotplug.json"), hook.to_string()).unwrap();
    Container::start_under(&["--hooks-dir", hooks.to_str().unwrap()], runtime, name, options, &["sleep", "1000"])
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
        grants().iter().all(|grant| grant["node"] == "container's" && grant["origin"] == "rule:ttys"),
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
