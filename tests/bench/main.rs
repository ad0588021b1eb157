//! The figures: how long each part of the main job takes on this kernel, beside what people do today.
//!
//! `cargo bench --bench figures` as root prints them; `-- filter`, `-- hook`, `-- selectors`, `-- commands`,
//! `-- events`, `-- many` or `-- mirror` prints that part alone.
//! Nothing is asserted: a machine's speed is no fact about the program.

#[path = "../support/mod.rs"]
mod support;

mod figure;
mod filter;
mod hook;
mod many;
mod mirror;
mod probe;
mod selectors;

use std::time::{Duration, Instant};

use figure::{Figure, sample};
use qm_hotplug::core::device::{Access, Kind, Number};
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;
use qm_hotplug::sys::host::Host;
use qm_hotplug::sys::namespace::inside;
use qm_hotplug::sys::process::Process;
use support::podman::{self, Container};
use support::rude::Rude;
use support::{Agent, qm, run};

/// Measures something.
type Part = fn() -> Vec<Figure>;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, pid, cgroup, path] = &arguments[..]
        && role == probe::ROLE
    {
        return probe::child(pid.parse().unwrap(), cgroup, path);
    }
    support::enter();
    Figure::print_header();
    let parts: [(&str, Part); 7] = [
        ("filter", filter::figures),
        ("hook", hook::figures),
        ("selectors", selectors::figures),
        ("commands", commands),
        ("events", events),
        ("many", many::figures),
        ("mirror", mirror::figures),
    ];
    let named = |name: &str| arguments.iter().any(|argument| argument == name);
    let is_all = !parts.iter().any(|(name, _)| named(name));
    for (_, figures) in parts.iter().filter(|(name, _)| is_all || named(name)) {
        figures().iter().for_each(Figure::print);
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

/// Between a plug and an unplug.
const PAUSE: Duration = Duration::from_millis(5);
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
        // What follows a removal, those inside being told of it, is over when a person plugs in again.
        std::thread::sleep(PAUSE);
        up.push(probe.after(true, || trigger("add")));
        std::thread::sleep(PAUSE);
    }
    let own = micros(&agent.log(), "granted /dev/tty7");
    let rude = Rude::start(65_533, "/run/qm-hotplug/io.qmhotplug".as_ref());
    let mut beside = Vec::new();
    for _ in 0..ROUNDS {
        probe.after(false, || trigger("remove"));
        std::thread::sleep(PAUSE);
        beside.push(probe.after(true, || trigger("add")));
    }
    drop(rude);
    let floor = floor(&container);
    let rss = resident(agent.pid());
    drop(probe);
    drop(agent);
    drop(container);
    support::release();
    println!("agent's resident memory with one container: {rss} (target for 100: ≤ 10 MiB)");
    vec![
        Figure::new("event received → node openable, agent's own share", own, "p50 ≤ 300 µs, p99 ≤ 1 ms"),
        Figure::new("for comparison: nothing but setns, mknod, map insert", floor, ""),
        Figure::new("kernel's add → a process inside has opened it", up, ""),
        Figure::new("the same beside 211 callers without manners", beside, ""),
        Figure::new("kernel's remove → a process inside is refused", down, ""),
    ]
}

/// What a grant costs at least: join the mount namespace, make a node, insert into the map; nothing checked or recorded.
fn floor(container: &Container) -> Vec<Duration> {
    let process = Process::open(container.pid()).unwrap();
    let host = Host::observe().unwrap();
    let filter = DeviceFilter::existing(&CgroupRoot::find().unwrap()).unwrap().expect("the agent has loaded it");
    let number = Number { kind: Kind::Char, major: 4, minor: 63 };
    sample(ROUNDS, || {
        filter.set(7, number, Access::ALL).unwrap();
        inside("bench", &process, host, move |_| {
            let device = rustix::fs::makedev(number.major, number.minor);
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            let node =
                rustix::fs::mknodat(rustix::fs::CWD, "/dev/floor", rustix::fs::FileType::CharacterDevice, mode, device);
            node.and_then(|()| rustix::fs::unlink("/dev/floor")).unwrap();
        })
        .unwrap();
        filter.set(7, number, Access::NONE).unwrap();
    })
}

fn trigger(action: &str) {
    std::fs::write("/sys/class/tty/tty7/uevent", action).unwrap();
}

/// A process's resident memory, and what of it is its own: the rest are pages of files, programs and libraries first of all.
fn resident(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim().to_owned();
    format!("{}, {} of it its own", field("VmRSS:"), field("RssAnon:"))
}

/// From the agent's log: the times between reading an event and the change being in force.
fn micros(log: &str, what: &str) -> Vec<Duration> {
    let changes = log.lines().filter(|line| line.contains(what));
    changes
        .filter_map(|line| {
            let (_, rest) = line.rsplit_once("micros")?;
            let digits: String =
                rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
            Some(Duration::from_micros(digits.parse().ok()?))
        })
        .collect()
}
