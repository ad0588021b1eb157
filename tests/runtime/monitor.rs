//! `qm-hotplug monitor`: what containers are refused, given and deprived of.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::agent::{TTYS, assert_has_ttys};
use crate::plug::{block, console, numbers, trigger};
use crate::selectors::asks;
use crate::state::{entries, ledger};
use crate::support::podman::Container;
use crate::support::{Agent, BINARY, grants, qm, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("monitor::a_refused_open_is_told_with_its_annotation", a_refused_open_is_told_with_its_annotation),
    ("monitor::who_asks_for_nothing_is_not_told_of", who_asks_for_nothing_is_not_told_of),
    ("monitor::an_agents_end_and_start", an_agents_end_and_start),
    ("monitor::a_filter_that_somebody_took_out_is_heard_again", a_filter_that_somebody_took_out_is_heard_again),
    ("monitor::what_comes_and_goes_is_told", what_comes_and_goes_is_told),
    ("monitor::a_device_that_came_in_anothers_place_is_told", a_device_that_came_in_anothers_place_is_told),
];

pub(crate) const ONCE: &[CaseOnce] = &[("monitor::how_it_ends", how_it_ends)];

const TTY_USB: [&str; 2] = ["--annotation", "org.containers.qm.device.ttyUSB=true"];

/// A monitor that runs. Killed when dropped.
struct Monitor {
    child: Child,
    lines: Receiver<String>,
}

impl Monitor {
    /// Starts it, and waits until it will miss nothing.
    fn start(args: &[&str]) -> Monitor {
        let mut child = Command::new(BINARY)
            .arg("monitor")
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut monitor = Monitor { child, lines };
        if args.contains(&"--json") {
            assert_eq!(monitor.json()["event"], "ready");
        } else {
            let mut said = Vec::new();
            let stderr = monitor.child.stderr.as_mut().unwrap();
            while said.last() != Some(&b'\n') {
                let mut byte = [0];
                stderr.read_exact(&mut byte).unwrap();
                said.extend(byte);
            }
            assert!(said.starts_with(b"waiting for events"), "{}", String::from_utf8_lossy(&said));
        }
        monitor
    }

    #[track_caller]
    fn line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(10)).expect("an event")
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }

    /// That nothing is told in a time that is long for the agent.
    #[track_caller]
    fn is_silent(&self) {
        assert_eq!(self.lines.recv_timeout(Duration::from_millis(300)).ok(), None);
    }

    /// Its exit code and the rest of stderr, when it has ended by itself.
    #[track_caller]
    fn ended(mut self) -> (Option<i32>, String) {
        wait_for("the monitor's end", || self.child.try_wait().unwrap().is_some());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the container make a node for a console by itself and try to open it.
#[track_caller]
fn try_tty(c: &Container, how: &str, tty: &str) {
    c.past_the_filter(&format!(
        "test -c /dev/{tty}.byhand || mknod /dev/{tty}.byhand {}",
        numbers(&format!("/dev/{tty}"))
    ))
    .ok();
    assert_eq!(c.open(how, &format!("/dev/{tty}.byhand")), Err("Operation not permitted".into()));
}

fn refused(c: &Container, access: &str) -> Value {
    json!({
        "event": "refused", "container": c.name, "id": c.id, "kind": "char", "major": 4, "minor": 3,
        "device": "/dev/tty3", "access": access, "annotation": "org.containers.qm.device.ttys=true",
    })
}

fn a_refused_open_is_told_with_its_annotation(runtime: &str) {
    let before = Container::start(runtime, "qmh-before", &TTY_USB);
    let agent = Agent::start();
    let bound = [&TTY_USB[..], &["-v", "/dev/tty3:/dev/mine"]].concat();
    let after = Container::start(runtime, "qmh-after", &bound);
    wait_for("it to be watched", || watched() == 2);
    let (all, text) = (Monitor::start(&["--json"]), Monitor::start(&["qmh-before"]));
    for (how, access) in [("<>", "rw"), ("<", "r"), (">", "w")] {
        try_tty(&before, how, "tty3");
        assert_eq!(all.json(), refused(&before, access));
        assert_eq!(
            text.line(),
            format!(
                "container qmh-before was refused c 4:3 /dev/tty3 ({access}); the annotation org.containers.qm.device.ttys=true would allow it"
            )
        );
    }
    assert_eq!(after.open("<>", "/dev/mine"), Err("Operation not permitted".into()));
    assert_eq!(all.json(), refused(&after, "rw"));
    // One that only a selector gives, and one that the host does not have.
    before.past_the_filter("mknod /dev/tty9 c 4 9; mknod /dev/none b 4000 7").ok();
    let selector = "org.containers.qm.hotplug.tty9=subsystem=tty;devname=/dev/tty9";
    for (path, kind, device, annotation, numbers) in [
        ("/dev/tty9", "char", json!("/dev/tty9"), json!(selector), (4, 9)),
        ("/dev/none", "block", Value::Null, Value::Null, (4000, 7)),
    ] {
        assert_eq!(before.open("<", path), Err("Operation not permitted".into()));
        let told = all.json();
        assert_eq!((&told["kind"], &told["device"], &told["annotation"]), (&json!(kind), &device, &annotation));
        assert_eq!((&told["major"], &told["minor"]), (&json!(numbers.0), &json!(numbers.1)));
    }
    assert!(text.line().ends_with(&format!("c 4:9 /dev/tty9 (r); the annotation {selector} would allow it")));
    assert!(text.line().ends_with("b 4000:7 (r)"));
    text.is_silent();
    // In the log a device is told once in ten seconds.
    let log = agent.log();
    let log = log.rsplit("ready:").next().unwrap();
    for name in [&before.name, &after.name] {
        let line = format!("container {name} was refused c 4:3 /dev/tty3 (rw); the annotation ");
        assert_eq!(log.matches(&line).count(), 1, "{log}");
    }
    assert_eq!(log.matches("was refused").count(), 4, "{log}");
}

/// How many cgroups the kernel reports refusals of.
fn watched() -> usize {
    let filter = DeviceFilter::existing(&CgroupRoot::find().unwrap()).unwrap();
    filter.map_or(0, |filter| filter.watched().unwrap().len())
}

fn who_asks_for_nothing_is_not_told_of(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-silent", &[]);
    let asks = Container::start(runtime, "qmh-asks", &TTY_USB);
    wait_for("it to be watched", || watched() == 1);
    let monitor = Monitor::start(&["--json"]);
    try_tty(&c, "<>", "tty3");
    monitor.is_silent();
    try_tty(&asks, "<>", "tty3");
    assert_eq!(monitor.json()["container"], "qmh-asks");
    drop(asks);
    wait_for("its end", || watched() == 0);
}

fn an_agents_end_and_start(runtime: &str) {
    let c = Container::start(runtime, "qmh-restarts", &TTY_USB);
    let agent = Agent::start();
    assert_eq!(watched(), 1, "from its start");
    agent.stop();
    assert_eq!(watched(), 0, "there is nobody to tell");
    try_tty(&c, "<>", "tty3");
    let agent = Agent::start();
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), Signal::KILL).unwrap();
    agent.stop();
    let ends = Container::start(runtime, "qmh-ends", &[]);
    drop(ends);
    assert_eq!(watched(), 1);
    try_tty(&c, "<", "tty3");
    let _agent = Agent::start();
    let monitor = Monitor::start(&["--json"]);
    monitor.is_silent();
    try_tty(&c, "<>", "tty3");
    assert_eq!(monitor.json(), refused(&c, "rw"));
    assert_eq!(watched(), 1);
}

fn a_filter_that_somebody_took_out_is_heard_again(runtime: &str) {
    let c = Container::start(runtime, "qmh-again", &TTY_USB);
    let agent = Agent::start();
    let monitor = Monitor::start(&["--json"]);
    let pid = Pid::from_raw(agent.pid() as i32).unwrap();
    for _ in 0..3 {
        kill_process(pid, Signal::HUP).unwrap();
        wait_for("it to be watched", || watched() == 1);
        qm(&["status"]).ok();
        try_tty(&c, "<>", "tty3");
        assert_eq!(monitor.json(), refused(&c, "rw"));
        DeviceFilter::release(&CgroupRoot::find().unwrap()).unwrap();
        assert_eq!(watched(), 0);
    }
    kill_process(pid, Signal::HUP).unwrap();
    wait_for("it to be watched", || watched() == 1);
}

fn what_comes_and_goes_is_told(runtime: &str) {
    let device = block(41);
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-changes", &TTYS);
    assert_has_ttys(&c);
    let (all, other) = (Monitor::start(&["--json"]), Monitor::start(&["podman:qmh-changes"]));
    let told = |event: &str, device: &str, path: &str, origin: &str| {
        let mut told = all.json();
        assert!(told["micros"].as_u64().is_some_and(|micros| micros > 0), "{told}");
        told["micros"].take();
        assert_eq!(
            told,
            json!({
                "event": event, "container": c.name, "id": c.id, "device": device, "path": path, "origin": origin,
                "micros": null,
            })
        );
    };
    let plug = |event: &str| {
        let mut told = all.json();
        assert!(told["micros"].take().as_u64().is_some_and(|micros| micros > 0), "{told}");
        assert_eq!(
            told,
            json!({
                "event": event, "device": "/dev/tty7", "kind": "char", "major": 4, "minor": 7,
                "containers": ["qmh-changes"], "micros": null,
            })
        );
    };
    trigger("remove", "tty7");
    plug("unplugged");
    told("revoked", "/dev/tty7", "/dev/tty7", "rule:ttys");
    trigger("add", "tty7");
    plug("plugged");
    told("granted", "/dev/tty7", "/dev/tty7", "rule:ttys");
    // It is there already.
    trigger("change", "tty7");
    // Nobody asks for these, and who looks at one container does not hear of them.
    let nobodys = |event: &str| {
        let node = |_| {
            let told = all.json();
            assert_eq!((&told["event"], &told["containers"]), (&json!(event), &json!([])), "{told}");
            told["device"].as_str().unwrap().to_owned()
        };
        let told: BTreeSet<String> = (0..3).map(node).collect();
        assert_eq!(told, ["/dev/vcs41", "/dev/vcsa41", "/dev/vcsu41"].map(str::to_owned).into());
    };
    let console = console(41);
    nobodys("plugged");
    console.unplug();
    nobodys("unplugged");
    qm(&["attach", &c.name, &device.path, "/dev/mine"]).ok();
    told("granted", &device.path, "/dev/mine", "manual");
    qm(&["attach", &c.name, &device.path, "/dev/mine"]).ok();
    qm(&["detach", &c.name, "/dev/mine"]).ok();
    told("revoked", &device.path, "/dev/mine", "manual");
    all.is_silent();
    assert!(other.line().starts_with("/dev/tty7 (c 4:7) was unplugged, from qmh-changes ("));
    assert!(other.line().starts_with("container qmh-changes was deprived of /dev/tty7 (rule:ttys, "));
    assert!(other.line().starts_with("/dev/tty7 (c 4:7) was plugged in, for qmh-changes ("));
    assert!(other.line().starts_with("container qmh-changes was granted /dev/tty7 (rule:ttys, "));
    assert!(other.line().starts_with("container qmh-changes was granted /dev/loop41 at /dev/mine (manual, "));
    assert!(other.line().starts_with("container qmh-changes was deprived of /dev/loop41 at /dev/mine (manual, "));
    drop(c);
    for _ in 0..8 {
        assert_eq!(all.json()["event"], "revoked");
    }
    wait_for("its entries to go", || entries().is_empty() && ledger().is_empty());
}

/// The agent hears of the last event alone.
fn a_device_that_came_in_anothers_place_is_told(runtime: &str) {
    let agent = Agent::start();
    let _c = Container::start(runtime, "qmh-replugged", &[&asks("x", "devname=/dev/vcsa41")]);
    let console = console(41);
    // By the loop, so that it has been told.
    wait_for("the first", || grants().len() == 1);
    let monitor = Monitor::start(&["--json", "qmh-replugged"]);
    let pid = Pid::from_raw(agent.pid() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    console.unplug();
    console.again();
    kill_process(pid, Signal::CONT).unwrap();
    let told: Vec<Value> = (0..4).map(|_| monitor.json()).collect();
    let events: Vec<&str> = told.iter().map(|its| its["event"].as_str().unwrap()).collect();
    // It may have heard of the removal by itself.
    let orders = [["unplugged", "plugged", "revoked", "granted"], ["unplugged", "revoked", "plugged", "granted"]];
    assert!(orders.iter().any(|order| events == order), "{events:?}");
    assert!(told.iter().all(|its| its["device"] == "/dev/vcsa41"), "{told:?}");
    let plugs = || told.iter().filter(|its| its["event"].as_str().unwrap().ends_with("plugged"));
    assert!(plugs().all(|its| its["containers"] == json!(["qmh-replugged"])), "{told:?}");
}

fn how_it_ends() {
    qm(&["monitor"]).fails(1, "no agent is running: start it with `systemctl start qm-hotplug`");
    let agent = Agent::start();
    qm(&["monitor", "qmh-none"]).fails(3, "qmh-none");
    qm(&["monitor", ""]).fails(2, "");
    // A reader that goes, with and without an event to write.
    let mut idle = Monitor::start(&[]);
    idle.child.stdout.take();
    let reads = Monitor::start(&["--json"]);
    let head = Command::new("sh")
        .args(["-c", "\"$0\" monitor --json | head -n 1", BINARY])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&head.stdout), "{\"event\":\"ready\",\"container\":null,\"id\":null}\n");
    assert_eq!(String::from_utf8_lossy(&head.stderr), "");
    agent.stop();
    assert_eq!(reads.ended(), (Some(0), "the agent ended, so there are no more events\n".to_owned()));
}
