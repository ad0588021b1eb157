//! The program is killed at every point of what it does, the agent is started anew, and the state is exactly what the
//! rules and the ledger say: as it was before, or as it would be without the kill.
//!
//! Each scenario runs again and again, killed at the first point that it reaches, at the second, and so on, until it
//! comes to its end.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use qm_hotplug::core::filter_program;
use qm_hotplug::failpoint::POINTS;
use qm_hotplug::sys::bpf::{Program, attached};
use qm_hotplug::sys::cgroup::CgroupRoot;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::CaseOnce;
use crate::attach::REFUSED;
use crate::exact::{Exact, STICK, compare, expect};
use crate::plug::{Plugged, console};
use crate::selectors::asks;
use crate::support::podman::Container;
use crate::support::udev::Udevd;
use crate::support::{BINARY, grants, qm, wait_for};

pub(crate) const ONCE: &[CaseOnce] = &[("killed::at_every_point_the_next_one_makes_it_exact", at_every_point)];

/// The points at which something was killed.
static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

pub(crate) type Start = fn(&str, &str, &[&str]) -> Container;

fn at_every_point() {
    // What libudev inside is shown is among what has to be exact.
    let udevd = Udevd::ended();
    for (minor, name) in [(169, "stick"), (170, "mine"), (171, "screen")] {
        udevd.record(&format!("c7:{minor}"), &format!("S:qmh/{name}\nI:1\nE:ID_MODEL={name}\nG:qmh\nV:1\n"));
    }
    grants_by_rule("runc", Container::start);
    grants_without_a_filter_of_the_runtimes("crun");
    revocations_by_rule("crun", Container::start);
    attaching_and_detaching("runc", true, Container::start);
    attaching_and_detaching("crun", false, Container::start);
    withdrawals("runc");
    attaching_for_good("crun", true);
    attaching_for_good("runc", false);
    expect_seen(POINTS);
}

pub(crate) fn expect_seen(points: &[&str]) {
    let seen = SEEN.lock().unwrap();
    let missed: Vec<_> = points.iter().filter(|point| !seen.contains(**point)).collect();
    assert!(missed.is_empty(), "never reached: {missed:?}");
}

/// A program that may be killed at one of its points.
pub(crate) struct Mortal {
    child: Child,
    log: PathBuf,
}

impl Mortal {
    /// Starts one that is killed at that point, counted from 1.
    pub(crate) fn start(at: u32, arguments: &[&str]) -> Mortal {
        let log = std::env::temp_dir().join(format!("qm-hotplug-mortal-{}.log", std::process::id()));
        let child = Command::new(BINARY)
            .args(arguments)
            .env("QM_HOTPLUG_KILL_AT", at.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Mortal { child, log }
    }

    /// Waits until the agent answers, or was killed.
    fn is_up(&mut self) -> bool {
        wait_for("the agent's socket or its end", || {
            self.has_ended() || qm(&["status", "--json"]).stdout.contains("\"agent\":true")
        });
        !self.has_ended()
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end, or until it is `done`, when it is ended. Says whether it was killed at a point.
    fn was_killed(mut self, done: impl Fn() -> bool) -> bool {
        wait_for("its end, or the end of its work", || self.has_ended() || done());
        if !self.has_ended() {
            kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), Signal::KILL).unwrap();
            self.child.wait().unwrap();
        }
        self.noted()
    }

    fn noted(&mut self) -> bool {
        let status = self.child.wait().unwrap();
        let text = fs::read_to_string(&self.log).unwrap();
        fs::remove_file(&self.log).unwrap();
        let point = text.lines().find_map(|line| line.strip_prefix("killed at '")?.strip_suffix('\''));
        if let Some(point) = point {
            assert_eq!(status.signal(), Some(9), "{text}");
            SEEN.lock().unwrap().insert(point.to_owned());
        }
        point.is_some()
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who is killed, and with what.
pub(crate) enum Work<'a> {
    /// An agent, while this is done to it; and how to see that it has done it.
    Agent(&'a dyn Fn(), &'a dyn Fn() -> bool),
    /// A command, with or without an agent.
    Command(&'a [&'a str]),
}

/// Prepares, has somebody killed at work, and checks; for each point. The check hears where it was, and whether it came to
/// the end of its work.
pub(crate) fn each_kill(name: &str, prepare: &dyn Fn(), work: Work<'_>, check: &dyn Fn(&str, bool)) {
    let mut killed = true;
    let mut at = 0;
    while killed {
        at += 1;
        prepare();
        killed = match work {
            Work::Agent(act, done) => {
                let mut agent = Mortal::start(at, &["agent"]);
                if agent.is_up() {
                    act();
                }
                agent.was_killed(done)
            }
            Work::Command(arguments) => {
                let mut command = Mortal::start(at, arguments);
                command.noted()
            }
        };
        check(&format!("{name}, killed at its point {at}"), !killed);
        assert!(at < 200, "{name}: there is an end");
    }
    eprintln!("{name}: killed at {} points", at - 1);
}

/// The grants; none known where the agent dies meanwhile.
fn told() -> Option<Vec<Value>> {
    let said = qm(&["list", "--json"]);
    (said.code == 0).then(|| serde_json::from_str(&said.stdout).unwrap())
}

fn has_stick() -> bool {
    let Some(all) = told() else { return false };
    all.len() == 2 && all.iter().all(|grant| grant["node"] == "ours")
}

/// A container that asks, and one that does not.
struct Two {
    device: Plugged,
    asks: Container,
    other: Container,
}

impl Two {
    fn start(runtime: &str, name: &str, start: Start) -> Two {
        let asking = start(runtime, name, &[&asks("x", STICK)]);
        Two { device: console(41), asks: asking, other: start(runtime, &format!("{name}-2"), &[]) }
    }

    fn all(&self) -> [&Container; 2] {
        [&self.asks, &self.other]
    }

    fn look(&self) -> Exact {
        Exact::of(&self.all())
    }

    /// With the device gone, and with it there.
    fn both(&self) -> (Exact, Exact) {
        self.device.unplug();
        compare();
        let without = self.look();
        self.device.again();
        compare();
        assert!(has_stick(), "{:?}", grants());
        (without, self.look())
    }

    /// After a kill: the device is there or was unplugged meanwhile, and the next agent makes it exact.
    fn check(&self, (without, with): &(Exact, Exact), is_there: bool, whence: &str) {
        if is_there {
            self.device.again()
        } else {
            self.device.unplug()
        }
        compare();
        expect(&self.all(), &[if is_there { with } else { without }], whence);
    }
}

pub(crate) fn grants_by_rule(runtime: &str, start: Start) {
    let two = Two::start(runtime, "qmh-kill-grant", start);
    // A second filter beside the runtime's, as systemd's.
    let program = Program::load("sd_devices", &filter_program::allow()).unwrap();
    program.attach(CgroupRoot::find().unwrap().open(&two.asks.cgroup()).unwrap().as_fd()).unwrap();
    let both = two.both();
    let gone = || {
        two.device.unplug();
        compare();
    };
    // Plugged while it runs, and found there by one that starts.
    for is_there in [true, false] {
        let check = |whence: &str, _: bool| two.check(&both, is_there, whence);
        let plug = || two.device.again();
        let name = format!("a plug, then {}", if is_there { "there" } else { "gone" });
        each_kill(&name, &gone, Work::Agent(&plug, &has_stick), &check);
        let gone_and_there = || {
            gone();
            two.device.again();
        };
        each_kill(&format!("a start, {name}"), &gone_and_there, Work::Agent(&|| {}, &has_stick), &check);
    }
    // In a user namespace nobody makes nodes.
    let is_made = two.asks.past_the_filter("mknod /dev/byhand c 1 11").code == 0;
    assert!(!is_made || two.asks.open("<", "/dev/byhand") == REFUSED.map_err(Into::into), "the filter is in force");
}

fn grants_without_a_filter_of_the_runtimes(runtime: &str) {
    let two = Two::start(runtime, "qmh-kill-bare", Container::start);
    let cgroup = CgroupRoot::find().unwrap().open(&two.asks.cgroup()).unwrap();
    attached(cgroup.as_fd()).unwrap().iter().for_each(|program| program.detach(cgroup.as_fd()).unwrap());
    let both = two.both();
    let gone = || {
        two.device.unplug();
        compare();
    };
    let plug = || two.device.again();
    let check = |whence: &str, _: bool| two.check(&both, true, whence);
    each_kill("a plug without a filter", &gone, Work::Agent(&plug, &has_stick), &check);
}

pub(crate) fn revocations_by_rule(runtime: &str, start: Start) {
    let two = Two::start(runtime, "qmh-kill-revoke", start);
    let both = two.both();
    let there = || {
        two.device.again();
        compare();
    };
    for is_there in [true, false] {
        let check = |whence: &str, _: bool| two.check(&both, is_there, whence);
        let name = format!("an unplug, then {}", if is_there { "there" } else { "gone" });
        let unplug = || two.device.unplug();
        each_kill(&name, &there, Work::Agent(&unplug, &|| told().is_some_and(|all| all.is_empty())), &check);
    }
}

/// What a person was not told of as done is not there afterwards, whoever comes next.
pub(crate) fn attaching_and_detaching(runtime: &str, with_agent: bool, start: Start) {
    let device = console(42);
    let c = start(runtime, "qmh-kill-attach", &[]);
    let attach = ["attach", &c.name, &device.path, "/dev/a/b/mine", "--access", "r"];
    let detach = ["detach", &c.name, &device.path];
    // It changes nothing, but it is the next command.
    let next_command = || qm(&["detach", &c.name, "/dev/none"]).fails(4, "/dev/none");
    next_command();
    let without = Exact::of(&[&c]);
    let with = {
        qm(&attach).ok();
        Exact::of(&[&c])
    };
    for (arguments, before, after) in [(&attach[..], &without, &with), (&detach[..], &with, &without)] {
        let prepare = || {
            let is_there = !grants().is_empty();
            if arguments[0] == "attach" && is_there {
                qm(&detach).ok();
            } else if arguments[0] == "detach" && !is_there {
                qm(&attach).ok();
            }
            expect(&[&c], &[before], "prepared");
        };
        for by_agent in [true, false] {
            let check = |whence: &str, is_done: bool| {
                if by_agent {
                    compare();
                }
                next_command();
                let expected = if is_done { vec![after] } else { vec![before, after] };
                expect(&[&c], &expected, whence);
            };
            let (how, next) = (["alone", "by the agent"], ["a command", "an agent"]);
            let (how, next) = (how[usize::from(with_agent)], next[usize::from(by_agent)]);
            let name = format!("{} {how}, then {next}", arguments[0]);
            let through_agent = || drop(qm(arguments));
            let work = match with_agent {
                true => Work::Agent(&through_agent, &|| true),
                false => Work::Command(arguments),
            };
            each_kill(&name, &prepare, work, &check);
        }
    }
}

fn withdrawals(runtime: &str) {
    let device = console(43);
    let asked = asks("x", "devname=/dev/vcsa43;as=/dev/screen");
    let c = crate::precreate::start(runtime, "qmh-kill-start", &[&asked]);
    let states = [false, true].map(|is_there| {
        if is_there {
            device.again()
        } else {
            device.unplug()
        }
        compare();
        Exact::of(&[&c])
    });
    let is_withdrawn = |state: &Exact| state.0.iter().any(|line| line.starts_with("withdrawn: "));
    assert!(is_withdrawn(&states[0]) && !is_withdrawn(&states[1]));
    let there = || {
        device.again();
        compare();
    };
    let gone = || {
        device.unplug();
        compare();
    };
    let check = |is_there: bool| {
        let (states, c) = (&states, &c);
        move |whence: &str, _: bool| {
            compare();
            expect(&[c], &[&states[usize::from(is_there)]], whence);
        }
    };
    let unplug = || device.unplug();
    each_kill(
        "a withdrawal",
        &there,
        Work::Agent(&unplug, &|| told().is_some_and(|all| all.is_empty())),
        &check(false),
    );
    let plug = || device.again();
    each_kill(
        "a right restored",
        &gone,
        Work::Agent(&plug, &|| told().is_some_and(|all| !all.is_empty())),
        &check(true),
    );
}

/// What is written down is granted, and what is struck is not.
fn attaching_for_good(runtime: &str, with_agent: bool) {
    let device = console(44);
    let c = Container::start(runtime, "qmh-kill-persist", &[]);
    let attach = ["attach", &c.name, &device.path, "/dev/a/mine", "--persist"];
    let detach = ["detach", &c.name, "/dev/a/mine"];
    // Once before, since the directory stays.
    qm(&attach).ok();
    qm(&detach).ok();
    compare();
    let without = Exact::of(&[&c]);
    qm(&attach).ok();
    compare();
    let with = Exact::of(&[&c]);
    for (arguments, before, after) in [(&attach[..], &without, &with), (&detach[..], &with, &without)] {
        let prepare = || {
            let is_there = !grants().is_empty();
            if is_there != std::ptr::eq(before, &with) {
                qm(if is_there { &detach[..] } else { &attach }).ok();
            }
            compare();
            expect(&[&c], &[before], "prepared");
        };
        let check = |whence: &str, is_done: bool| {
            compare();
            let expected = if is_done { vec![after] } else { vec![before, after] };
            expect(&[&c], &expected, whence);
        };
        let through_agent = || drop(qm(arguments));
        let work = match with_agent {
            true => Work::Agent(&through_agent, &|| true),
            false => Work::Command(arguments),
        };
        let how = if with_agent { "by the agent" } else { "alone" };
        each_kill(&format!("{} for good {how}", arguments[0]), &prepare, work, &check);
    }
}
