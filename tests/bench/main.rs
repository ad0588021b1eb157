//! The figures: how long each part of the main job takes on this kernel, beside what people do today.
//!
//! `cargo bench` as root prints them. Nothing is asserted: a machine's speed is no fact about the program.

#[path = "../support/mod.rs"]
mod support;

mod figure;
mod filter;
mod probe;

use std::time::{Duration, Instant};

use figure::{Figure, sample};
use support::podman::{self, Container};
use support::{Agent, qm, run};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, pid, cgroup, path] = &arguments[..]
        && role == probe::ROLE
    {
        return probe::child(pid.parse().unwrap(), cgroup, path);
    }
    support::enter();
    Figure::print_header();
    for figure in filter::figures().into_iter().chain(commands()).chain(events()) {
        figure.print();
    }
    podman::clean_up();
    support::assert_nothing_left();
}

/// Whole processes: attach and detach with and without an agent, and the restart that they replace.
fn commands() -> Vec<Figure> {
    let container = Container::start("runc", "qmh-bench", &[]);
    let mut figures = Vec::new();
    let pairs = |rounds: usize| {
        let (mut attach, mut detach) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let start = Instant::now();
            qm(&["attach", "qmh-bench", "/dev/tty9"]).ok();
            attach.push(start.elapsed());
            let start = Instant::now();
            qm(&["detach", "qmh-bench", "/dev/tty9"]).ok();
            detach.push(start.elapsed());
        }
        (attach, detach)
    };
    let (attach, detach) = pairs(50);
    figures.push(Figure::new("attach, whole process, no agent, filter loaded too", attach, "≤ 5 ms"));
    figures.push(Figure::new("detach, whole process, no agent, filter removed too", detach, ""));
    let agent = Agent::start();
    let (attach, detach) = pairs(50);
    figures.push(Figure::new("attach, whole process, through the agent", attach, "≤ 5 ms"));
    figures.push(Figure::new("detach, whole process, through the agent", detach, ""));
    let cat = sample(50, || drop(run("/bin/cat", &["/dev/null"])));
    figures.push(Figure::new("for comparison: /bin/cat, whole process", cat, ""));
    drop(agent);
    support::release();
    let restart = sample(5, || drop(podman::podman(&["restart", "-t", "0", &container.name]).ok()));
    figures.push(Figure::new("for comparison: podman restart, native", restart, ""));
    figures
}

/// Rounds of plug and unplug.
const ROUNDS: usize = 200;

/// Kernel uevents of a real device (the kernel sends them anew when asked through sysfs) until a process inside the
/// container can, or cannot any more, open it.
fn events() -> Vec<Figure> {
    let container = Container::start("runc", "qmh-bench", &["--annotation", "org.containers.qm.device.ttys=true"]);
    let agent = Agent::start();
    let mut probe = probe::Probe::start(container.pid(), &container.cgroup(), "/dev/tty7");
    let (mut up, mut down) = (Vec::new(), Vec::new());
    probe.wait(true);
    for _ in 0..ROUNDS {
        down.push(probe.after(false, || trigger("remove")));
        up.push(probe.after(true, || trigger("add")));
    }
    let own = agent_share(&agent.log());
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("?").trim().to_owned();
    drop(probe);
    drop(agent);
    drop(container);
    support::release();
    println!("agent's resident memory with one container: {rss} (target for 100: ≤ 10 MiB)");
    vec![
        Figure::new("event received → node openable, agent's own share", own, "p50 ≤ 300 µs, p99 ≤ 1 ms"),
        Figure::new("kernel's add → a process inside has opened it", up, ""),
        Figure::new("kernel's remove → a process inside is refused", down, ""),
    ]
}

fn trigger(action: &str) {
    std::fs::write("/sys/class/tty/tty7/uevent", action).unwrap();
}

/// From the agent's log: the time between reading an event and the grant being in force.
fn agent_share(log: &str) -> Vec<Duration> {
    let grants = log.lines().filter(|line| line.contains("granted /dev/tty7"));
    grants
        .filter_map(|line| {
            let (_, rest) = line.rsplit_once("micros")?;
            let digits: String =
                rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
            Some(Duration::from_micros(digits.parse().ok()?))
        })
        .collect()
}
