//! `attach --persist`: what outlives the container's restart, the agent's and the machine's.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::attach::REFUSED;
use crate::plug::{block, console, tap_with};
use crate::state::{entries, entries_of, observe, refused};
use crate::support::podman::{Container, podman};
use crate::support::{Agent, assert_nothing_left, grants, qm, release, wait_for};
use crate::{Case, exact};

pub(crate) const CASES: &[Case] = &[
    ("persist::a_restart_of_the_container_and_of_the_agent", a_restart_of_the_container_and_of_the_agent),
    ("persist::a_restart_of_the_machine", a_restart_of_the_machine),
    ("persist::detach_finds_it_in_force_unplugged_and_stopped", detach_finds_it),
    ("persist::the_wrong_device_never", the_wrong_device_never),
    ("persist::what_cannot_be_kept_is_refused", what_cannot_be_kept_is_refused),
    ("persist::a_file_that_cannot_be_read_stays", a_file_that_cannot_be_read_stays),
    ("persist::what_was_by_hand_is_for_good_from_now_on", what_was_by_hand_is_for_good_from_now_on),
];

const ATTACHED: &str = "/var/lib/qm-hotplug/attached";

fn files() -> Vec<String> {
    let all = fs::read_dir(ATTACHED).into_iter().flatten().flatten();
    all.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

fn notes() -> Vec<(String, Value, Value)> {
    grants().into_iter().map(|it| (it["path"].to_string(), it["persist"].clone(), it["note"].clone())).collect()
}

fn kill(agent: Agent) {
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), Signal::KILL).unwrap();
    agent.stop();
}

fn a_restart_of_the_container_and_of_the_agent(runtime: &str) {
    let device = console(42);
    let agent = Agent::start();
    let (name, namesake) = (format!("qmh-keep-{runtime}"), format!("qmh-keep-{runtime}-2"));
    let c = Container::start(runtime, &name, &[]);
    let other = Container::start(runtime, &namesake, &[]);
    let options = ["--persist", "--access", "r", "--mode", "0604", "--gid", "7"];
    qm(&[&["attach", &c.name, &device.path, "/dev/a/mine"], &options[..]].concat()).ok();
    let is_there = |when: &str| {
        wait_for(when, || c.node("/dev/a/mine").as_deref() == Some("c 7:170 0:7 0604") && grants().len() == 1);
        assert_eq!((c.open("<", "/dev/a/mine"), c.open(">", "/dev/a/mine")), (Ok(()), REFUSED.map_err(Into::into)));
        assert_eq!(notes(), [("\"/dev/a/mine\"".to_owned(), json!(true), json!(null))], "{when}");
        assert_eq!((entries().len(), other.node("/dev/a/mine")), (1, None), "{when}");
    };
    is_there("attached");
    assert_eq!(files(), [format!("{runtime}-0-{name}.json")]);
    podman(&["restart", "-t", "0", &c.name]).ok();
    is_there("the container was restarted");
    device.unplug();
    wait_for("the unplug", || entries().is_empty() && c.look("/dev/a").is_none());
    assert_eq!(notes()[0].2, "not in force: its device is not there, or could not be granted");
    device.again();
    is_there("plugged in again");
    kill(agent);
    let agent = Agent::start();
    is_there("the agent was killed");
    // While nobody looks, the container ends and another one takes its name.
    agent.stop();
    podman(&["rm", "-f", "-t", "0", &c.name]).ok();
    assert_eq!(notes()[0].2, "the container exited");
    let c = Container::start(runtime, &name, &[]);
    let _agent = Agent::start();
    wait_for("the next one of that name", || c.opens("<", "/dev/a/mine"));
    // Not a restart: detached it is gone for good.
    qm(&["detach", &c.name, &device.path]).ok();
    assert!(files().is_empty() && grants().is_empty() && c.look("/dev/a").is_none());
    podman(&["restart", "-t", "0", &c.name]).ok();
    device.unplug();
    device.again();
    assert_eq!((grants().len(), entries_of(&c.cgroup()).len()), (0, 0));
}

/// Nothing of a machine's memory is left: no process, no /run, no program in the kernel.
fn a_restart_of_the_machine(runtime: &str) {
    let device = console(42);
    let c = Container::start(runtime, "qmh-reboot", &[]);
    let said = qm(&["attach", &c.name, &device.path, "/dev/mine", "--persist"]);
    assert!(said.stderr.contains("after a restart it is granted once an agent runs"), "{said:?}");
    said.ok();
    podman(&["stop", "-t", "0", &c.name]).ok();
    release();
    fs::remove_dir_all("/run/qm-hotplug/ledger").unwrap();
    assert_nothing_left();
    device.unplug();
    podman(&["start", &c.name]).ok();
    let agent = Agent::start();
    assert_eq!((c.node("/dev/mine"), entries().len()), (None, 0), "nothing is there yet");
    device.again();
    wait_for("the device", || c.opens("<>", "/dev/mine"));
    agent.stop();
    qm(&["detach", &c.name, "/dev/mine"]).ok();
    assert!(files().is_empty());
    assert_nothing_left();
}

fn detach_finds_it(runtime: &str) {
    let device = console(42);
    for with_agent in [true, false] {
        let agent = with_agent.then(Agent::start);
        let c = Container::start(runtime, "qmh-forget", &[]);
        let attach = || qm(&["attach", &c.name, &device.path, "/dev/mine", "--persist"]).ok();
        for name in ["/dev/mine", &device.path] {
            attach();
            qm(&["detach", &c.name, name]).ok();
            assert!(files().is_empty() && c.node("/dev/mine").is_none(), "{name}");
            attach();
            device.unplug();
            wait_for("the unplug", || !with_agent || entries().is_empty());
            qm(&["detach", &c.name, name]).ok();
            assert!(files().is_empty() && grants().is_empty() && c.node("/dev/mine").is_none(), "{name}, unplugged");
            device.again();
            attach();
            podman(&["stop", "-t", "0", &c.name]).ok();
            qm(&["detach", &c.name, "/dev/none"]).fails(4, "/dev/none");
            assert_eq!(
                qm(&["detach", &c.name, name]).ok(),
                "qmh-forget: /dev/mine is gone; it was not in force: the container does not run\n"
            );
            assert!(files().is_empty() && grants().is_empty(), "{name}, stopped");
            qm(&["detach", &c.name, name]).fails(3, &c.name);
            podman(&["start", &c.name]).ok();
            assert_eq!(c.node("/dev/mine"), None);
        }
        drop(agent);
    }
}

fn the_wrong_device_never(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-wrong", &[]);
    let tap = tap_with("02:00:00:00:00:61");
    qm(&["attach", &c.name, &tap.path, "/dev/by-name", "--persist"]).ok();
    let selector = "subsystem=macvtap,attrs.address=02:00:00:00:00:61";
    qm(&["attach", &c.name, selector, "/dev/by-address", "--persist"]).ok();
    tap.unplug();
    wait_for("the unplug", || entries().is_empty());
    // Another device, whose name may be the same, with another address.
    let other = tap_with("02:00:00:00:00:62");
    qm(&["status"]).ok();
    assert_eq!(c.node("/dev/by-address"), None);
    drop(other);
    // The same address, and another name or the same one.
    let again = tap_with("02:00:00:00:00:61");
    wait_for("the address", || c.opens("<>", "/dev/by-address"));
    assert_eq!(c.node("/dev/by-name").is_some(), again.path == tap.path);
    assert_eq!(notes().len(), 2);
}

fn what_cannot_be_kept_is_refused(runtime: &str) {
    let device = block(42);
    let link = device.link("by-nobody");
    let c = Container::start(runtime, "qmh-cannot", &[]);
    let inits = [c.pid()];
    let with = |container: &str, device: &str| qm(&["attach", container, device, "/dev/mine", "--persist"]);
    refused(&inits, || with(&c.name, &link), 5, "name /dev/loop42 itself");
    let all = qm(&["attach", &c.name, "subsystem=block", "--all", "--persist"]);
    assert_eq!((all.code, all.stderr.contains("cannot be used with")), (2, true), "{all:?}");
    // A grant that fails leaves nothing to come again.
    c.sh("echo mine >/dev/mine").ok();
    refused(&inits, || with(&c.name, &device.path), 5, "is a regular file");
    assert!(files().is_empty());
    drop(c);
    with("qmh-cannot", &device.path).fails(3, "qmh-cannot");
}

fn a_file_that_cannot_be_read_stays(runtime: &str) {
    let device = console(42);
    let c = Container::start(runtime, "qmh-unread", &[]);
    let path = format!("{ATTACHED}/{runtime}-0-qmh-unread.json");
    qm(&["attach", &c.name, &device.path, "--persist"]).ok();
    let good = fs::read_to_string(&path).unwrap();
    let relative = good.replace("\"/dev/vcsa42\"", "\"vcsa42\"");
    let future = good.replace("\"version\": 1", "\"version\": 2");
    for bad in ["", &good[..good.len() / 2], &relative, &future] {
        assert_ne!(bad, good);
        fs::write(&path, bad).unwrap();
        let agent = Agent::start();
        assert!(agent.log().contains(&format!("is passed over: {path}: ")), "{}", agent.log());
        assert_eq!((grants().len(), c.node(&device.path)), (0, None), "not written down, not granted");
        let said = qm(&["attach", &c.name, &device.path, "--persist"]);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.stderr.contains("move it away"), "{said:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), bad, "a person's word is not written over");
        qm(&["attach", &c.name, &device.path]).ok();
        qm(&["detach", &c.name, &device.path]).ok();
    }
    fs::write(&path, &good).unwrap();
    exact::compare();
    assert!(c.opens("<>", &device.path));
}

fn what_was_by_hand_is_for_good_from_now_on(runtime: &str) {
    let device = console(42);
    let c = Container::start(runtime, "qmh-later", &[]);
    let _agent = Agent::start();
    qm(&["attach", &c.name, &device.path]).ok();
    let node = || std::os::unix::fs::MetadataExt::ino(&c.look(&device.path).unwrap());
    let (before, state) = (node(), observe(&[]));
    qm(&["attach", &c.name, &device.path, "--persist"]).ok();
    assert_eq!((node(), notes()[0].1.clone()), (before, json!(true)));
    assert_ne!(observe(&[]), state);
    podman(&["restart", "-t", "0", &c.name]).ok();
    wait_for("it to be there again", || c.opens("<>", &device.path));
}
