//! Containers that nothing can be given to: one line, and nothing has changed.

use std::time::Duration;

use crate::agent::TTYS;
use crate::plug::block;
use crate::state::{entries, ledger, refused};
use crate::support::podman::{Container, podman};
use crate::support::{Agent, grants, qm, run, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("refused_containers::stopped_exited_and_removed", stopped_exited_and_removed),
    ("refused_containers::one_that_exits_in_the_middle", one_that_exits_in_the_middle),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("refused_containers::without_a_cgroup_of_its_own::crun", without_a_cgroup_of_its_own),
    ("refused_containers::in_a_user_namespace_that_another_user_made", in_a_user_namespace_that_another_user_made),
];

fn stopped_exited_and_removed(runtime: &str) {
    let device = block(41);
    let with_and_without_agent = |name: &str| {
        refused(&[], || qm(&["attach", name, &device.path]), 3, name);
        let agent = Agent::start();
        refused(&[], || qm(&["attach", name, &device.path]), 3, name);
        agent.stop();
        qm(&["agent", "--release"]).ok();
    };
    let stopped = Container::start(runtime, "qmh-stopped", &[]);
    let pid = format!("pid:{}", stopped.pid());
    podman(&["stop", "-t", "0", &stopped.name]).ok();
    with_and_without_agent(&stopped.name);
    refused(&[], || qm(&["attach", &stopped.id, &device.path]), 3, &stopped.id);
    refused(&[], || qm(&["attach", &pid, &device.path]), 3, &pid);

    let exited = Container::start_running(runtime, "qmh-exited", &[], &["true"]);
    podman(&["wait", &exited.name]).ok();
    with_and_without_agent(&exited.name);

    // What it was given goes with the next change, and `list` tells the truth until then.
    let c = Container::start(runtime, "qmh-given", &[]);
    let other = Container::start(runtime, "qmh-given-2", &[]);
    qm(&["attach", &c.name, &device.path]).ok();
    podman(&["kill", &c.name]).ok();
    wait_for("its end", || grants()[0]["note"] == "the container exited");
    qm(&["attach", &other.name, &device.path]).ok();
    assert_eq!((grants().len(), entries().len(), ledger().len()), (1, 1, 1));

    let removed = Container::start(runtime, "qmh-removed", &[]);
    podman(&["rm", "-f", "-t", "0", &removed.name]).ok();
    refused(&[], || qm(&["attach", &removed.name, &device.path]), 3, &removed.name);
}

/// Whoever makes a user namespace is root in it: what he calls a container is his own word.
fn in_a_user_namespace_that_another_user_made() {
    let device = block(42);
    let command = "setpriv --reuid 1000 --regid 1000 --clear-groups unshare -Urm --propagation private sleep 1000";
    let mut words = command.split(' ');
    let mut child = std::process::Command::new(words.next().unwrap()).args(words).spawn().unwrap();
    let name = format!("pid:{}", child.id());
    let is_ready = || std::fs::read_to_string(format!("/proc/{}/comm", child.id())).is_ok_and(|name| name == "sleep\n");
    wait_for("the namespace", is_ready);
    let refused = std::panic::catch_unwind(|| {
        refused(&[], || qm(&["attach", &name, &device.path]), 5, "user 1000 made its user namespace");
    });
    child.kill().unwrap();
    child.wait().unwrap();
    refused.unwrap();
}

fn without_a_cgroup_of_its_own() {
    // podman does not start such containers with runc.
    let device = block(43);
    let plain = Container::start("crun", "qmh-plain", &[]);
    let c = Container::start("crun", "qmh-nocgroup", &[&["--cgroups=disabled"][..], &TTYS].concat());
    let inits = [c.pid(), plain.pid()];
    let no_cgroup = || {
        for name in [c.name.clone(), format!("pid:{}", c.pid())] {
            let line = refused(&inits, || qm(&["attach", &name, &device.path]), 5, "no cgroup of its own");
            assert!(line.contains("'qmh-nocgroup'") && line.contains("--cgroups=disabled"), "{line}");
        }
    };
    no_cgroup();
    qm(&["attach", &plain.name, &device.path]).ok();
    no_cgroup();
    let agent = Agent::start();
    no_cgroup();
    assert!(agent.log().contains("no cgroup of its own"), "its annotation asks in vain");
    assert_eq!(c.node("/dev/tty3"), None);
    drop(agent);
}

fn one_that_exits_in_the_middle(runtime: &str) {
    let device = block(44);
    let stays = Container::start(runtime, "qmh-stays", &[]);
    qm(&["attach", &stays.name, &device.path]).ok();
    let attach_while_it_ends = |delay: u64| {
        let c = Container::start(runtime, "qmh-ends", &[]);
        let pid = c.pid().to_string();
        let said = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(delay));
                run("kill", &["-KILL", &pid]).ok();
            });
            qm(&["attach", &c.name, &device.path, "/dev/a/b/x"])
        });
        match said.code {
            0 => {}
            _ => drop(said.fails(3, "qmh-ends")),
        }
        wait_for("its end", || !std::path::Path::new(&format!("/proc/{pid}/root/dev")).exists());
    };
    for delay in [0, 2, 4, 6, 8, 11, 14, 20] {
        attach_while_it_ends(delay);
        // The next change takes along what it may have left.
        qm(&["attach", &stays.name, &device.path]).ok();
        assert_eq!((grants().len(), entries().len(), ledger().len()), (1, 1, 1), "{delay} ms");
    }
    let _agent = Agent::start();
    for delay in [0, 2, 4, 6, 8, 11, 14, 20] {
        attach_while_it_ends(delay);
        wait_for("what it had to go", || (grants().len(), entries().len(), ledger().len()) == (1, 1, 1));
    }
    assert!(stays.opens("<>", &device.path));
}
