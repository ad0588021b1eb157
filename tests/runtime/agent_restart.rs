//! The agent's own end and start: what is granted stays, what is over goes.

use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use qm_hotplug::core::device::{Access, Kind, Number};
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;
use rustix::process::{Pid, Signal, kill_process};

use crate::Case;
use crate::agent::{TTYS, assert_has_no_ttys, assert_has_ttys};
use crate::attach::REFUSED;
use crate::plug::{block, console};
use crate::state::{State, entries, entries_of, observe};
use crate::support::podman::{Container, podman};
use crate::support::{Agent, assert_nothing_left, grants, qm, run, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("agent_restart::grants_stay_and_are_adopted", grants_stay_and_are_adopted),
    ("agent_restart::what_went_while_it_was_down_is_taken_back", what_went_while_it_was_down_is_taken_back),
    ("agent_restart::what_came_while_it_was_down_is_granted", what_came_while_it_was_down_is_granted),
    ("agent_restart::what_nobody_granted_is_removed_and_told", what_nobody_granted_is_removed_and_told),
    ("agent_restart::release_takes_everything_out", release_takes_everything_out),
];

/// As a crash would.
fn kill(agent: Agent) {
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), Signal::KILL).unwrap();
    wait_for("its end", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid())).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
}

fn grants_stay_and_are_adopted(runtime: &str) {
    let c = Container::start(runtime, "qmh-adopt", &TTYS);
    let other = Container::start(runtime, "qmh-adopt-manual", &[]);
    let (device, tty) = (block(41), console(41));
    // Attached before the agent's first start, and through its socket.
    qm(&["attach", &other.name, &tty.path, "/dev/a/b", "--access", "r"]).ok();
    let agent = Agent::start();
    assert_has_ttys(&c);
    assert!(!qm(&["attach", &other.name, &device.path]).stderr.contains("no agent"));
    let inits = [c.pid(), other.pid()];
    let inode = || c.look("/dev/tty3").unwrap().ino();
    let (before, node): (State, u64) = (observe(&inits), inode());
    let holds = |when: &str| {
        assert_eq!(observe(&inits), before, "{when}");
        assert_eq!(inode(), node, "{when}: the node is not made anew");
        assert!(
            c.opens("<>", "/dev/tty3") && other.opens("<>", &device.path) && other.opens("<", "/dev/a/b"),
            "{when}"
        );
        assert_eq!(grants().len(), 10, "{when}");
    };
    holds("before");
    agent.stop();
    assert_eq!(qm(&["list"]).stderr, "no agent: plugs and unplugs are not followed\n");
    holds("stopped");
    let agent = Agent::start();
    holds("started again");
    kill(agent);
    holds("killed");
    let agent = Agent::start();
    holds("started after it was killed");
    // And it works on: what it adopted it takes back too.
    device.unplug();
    wait_for("the unplug", || grants().len() == 9);
    qm(&["detach", &other.name, &tty.path]).ok();
    drop(agent);
    assert_eq!(entries().len(), 8);
}

fn what_went_while_it_was_down_is_taken_back(runtime: &str) {
    let (gone, replaced, stays) = (block(42), block(43), block(44));
    let c = Container::start(runtime, "qmh-went", &[]);
    let ends = Container::start(runtime, "qmh-ends", &TTYS);
    let agent = Agent::start();
    assert_has_ttys(&ends);
    for device in [&gone, &replaced, &stays] {
        qm(&["attach", &c.name, &device.path]).ok();
        c.past_the_filter(&format!("mknod {}.byhand {}", device.path, device.numbers())).ok();
    }
    kill(agent);
    gone.unplug();
    replaced.unplug();
    replaced.again();
    podman(&["stop", "-t", "0", &ends.name]).ok();
    let agent = Agent::start();
    assert_eq!((grants().len(), entries().len()), (1, 1), "at once: {:?}", grants());
    assert_eq!((c.node(&gone.path), c.node(&replaced.path)), (None, None));
    assert_eq!(c.open("<>", "/dev/loop43.byhand"), REFUSED.map_err(Into::into), "the number is another device's now");
    assert!(c.opens("<>", &stays.path));
    drop(agent);
}

fn what_came_while_it_was_down_is_granted(runtime: &str) {
    let first = Container::start(runtime, "qmh-came-1", &TTYS);
    let agent = Agent::start();
    assert_has_ttys(&first);
    agent.stop();
    let second = Container::start(runtime, "qmh-came-2", &TTYS);
    assert_has_no_ttys(&second);
    podman(&["restart", "-t", "0", &first.name]).ok();
    let started = Instant::now();
    let _agent = Agent::start();
    assert_eq!(
        (entries_of(&first.cgroup()).len(), entries_of(&second.cgroup()).len()),
        (8, 8),
        "{:?}",
        started.elapsed()
    );
    assert_has_ttys(&first);
    assert_has_ttys(&second);
}

fn what_nobody_granted_is_removed_and_told(runtime: &str) {
    let c = Container::start(runtime, "qmh-nobody", &TTYS);
    let agent = Agent::start();
    assert_has_ttys(&c);
    agent.stop();
    // As a process with CAP_BPF could: one entry more, one with more rights, one less; and the mark is away.
    let root = CgroupRoot::find().unwrap();
    let cgroup = root.open(&c.cgroup()).unwrap();
    let tty = |minor| Number { kind: Kind::Char, major: 4, minor };
    let filter = DeviceFilter::existing(&root).unwrap().unwrap();
    let device = block(46);
    filter.set(cgroup.id, Number { kind: Kind::Block, major: 7, minor: 46 }, Access::ALL).unwrap();
    filter.set(cgroup.id, tty(3), Access::READ).unwrap();
    filter.set(cgroup.id, tty(4), Access::NONE).unwrap();
    filter.unmark(&cgroup).unwrap();
    c.past_the_filter(&format!("mknod {} {}", device.path, device.numbers())).ok();
    assert!(c.opens("<", &device.path), "the entry is in force");
    let agent = Agent::start();
    assert_eq!(c.open("<", &device.path), REFUSED.map_err(Into::into));
    assert!(agent.log().contains("b 7:46 that nobody granted"), "{}", agent.log());
    assert_has_ttys(&c);
    assert!(filter.is_marked(&cgroup).unwrap());
    assert!(c.opens("<>", "/dev/tty4"));
}

fn release_takes_everything_out(runtime: &str) {
    let c = Container::start(runtime, "qmh-release", &TTYS);
    let manual = Container::start(runtime, "qmh-release-2", &[]);
    let device = block(45);
    let inits = [c.pid(), manual.pid()];
    let before = observe(&inits);
    let agent = Agent::start();
    assert_has_ttys(&c);
    qm(&["attach", &manual.name, &device.path, "/dev/a/b"]).ok();
    qm(&["agent", "--release"]).fails(5, "an agent is running");
    assert!(c.opens("<>", "/dev/tty3") && manual.opens("<>", "/dev/a/b"), "refused, so nothing has changed");
    agent.stop();
    qm(&["agent", "--release"]).ok();
    assert_eq!(observe(&inits), before);
    assert_has_no_ttys(&c);
    assert_nothing_left();
    assert_eq!(run("ls", &["-A", "/run/qm-hotplug"]).ok().replace("ledger", "").replace("lock", "").trim(), "");
    qm(&["agent", "--release"]).ok();
}
