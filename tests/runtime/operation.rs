//! The agent as a service: what systemd is told, the watchdog, reloads, its end in a storm, its log, and what it may do.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use caps::Capability;
use qm_hotplug::sys::caps::NEEDED;

use crate::agent::{TTYS, assert_has_ttys};
use crate::plug::{block, trigger};
use crate::state::entries;
use crate::support::podman::Container;
use crate::support::{Agent, CONFIGURATION, configure, grants, qm, unconfigure, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("operation::systemd_is_told_how_the_agent_is", systemd_is_told_how_the_agent_is),
    ("operation::its_end_in_a_storm_leaves_ledger_and_kernel_alike", its_end_in_a_storm_leaves_ledger_and_kernel_alike),
    ("operation::a_dev_that_its_container_has_locked_is_served", a_dev_that_its_container_has_locked_is_served),
    ("operation::what_a_container_is_called_stays_on_its_line", what_a_container_is_called_stays_on_its_line),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("operation::the_watchdog_watches_the_loop_and_the_thread", the_watchdog_watches_the_loop_and_the_thread),
    ("operation::a_reload_tells_file_line_and_column", a_reload_tells_file_line_and_column),
    ("operation::ten_thousand_failures_are_a_few_lines", ten_thousand_failures_are_a_few_lines),
    ("operation::it_may_do_what_it_needs_and_no_more", it_may_do_what_it_needs_and_no_more),
];

/// A socket in systemd's place.
struct Systemd {
    socket: UnixDatagram,
    path: String,
    _directory: tempfile::TempDir,
}

impl Systemd {
    fn new() -> Systemd {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify").to_str().unwrap().to_owned();
        let socket = UnixDatagram::bind(&path).unwrap();
        Systemd { socket, path, _directory: directory }
    }

    /// Starts the agent as systemd does.
    fn start(&self, watchdog: Duration) -> Agent {
        Agent::start_with(&[("NOTIFY_SOCKET", &self.path), ("WATCHDOG_USEC", &watchdog.as_micros().to_string())])
    }

    /// What is told in that time, or until there is a message with this in it.
    fn told(&self, within: Duration, last: Option<&str>) -> Vec<String> {
        let (until, mut all, mut buffer) = (Instant::now() + within, Vec::new(), [0; 4096]);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.socket.set_read_timeout(Some(left)).unwrap();
            let Ok(length) = self.socket.recv(&mut buffer) else { break };
            all.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
            if last.is_some_and(|last| all.last().unwrap().contains(last)) {
                break;
            }
        }
        all
    }

    /// Waits for a message with this in it and returns it.
    #[track_caller]
    fn tells(&self, what: &str) -> String {
        let told = self.told(Duration::from_secs(15), Some(what));
        let last = told.last().filter(|last| last.contains(what)).cloned();
        last.unwrap_or_else(|| panic!("{what:?} is not among {told:?}"))
    }

    /// How many signs of life there are in that time.
    fn ticks(&self, within: Duration) -> usize {
        self.told(within, None).iter().filter(|told| told.contains("WATCHDOG=1")).count()
    }
}

/// A thread of another process, stopped as a debugger stops it.
struct Stopped(i32);

impl Stopped {
    #[allow(unsafe_code)]
    fn new(thread: i32) -> Stopped {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: these requests take no pointers, and waitpid an integer that outlives it.
        unsafe {
            assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, none, none), 0, "{}", std::io::Error::last_os_error());
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none), 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(thread, &mut status, libc::__WALL), thread);
        }
        Stopped(thread)
    }
}

impl Drop for Stopped {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the request takes no pointers.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}

fn threads(agent: &Agent) -> Vec<(i32, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().flatten();
    let name = |path: std::path::PathBuf| std::fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
    tasks.map(|task| (task.file_name().to_str().unwrap().parse().unwrap(), name(task.path()))).collect()
}

fn the_watchdog_watches_the_loop_and_the_thread() {
    let (systemd, second) = (Systemd::new(), Duration::from_secs(1));
    let agent = systemd.start(second);
    systemd.tells("READY=1");
    assert!(systemd.ticks(3 * second) >= 1, "twice in the time that is allowed");
    let watch = threads(&agent).into_iter().find(|(_, name)| name == "watch").expect("its thread").0;
    for (what, thread) in [("the thread", watch), ("the loop", agent.pid() as i32)] {
        let stopped = Stopped::new(thread);
        // What was on its way.
        systemd.told(second, None);
        assert_eq!(systemd.ticks(2 * second), 0, "{what} is stuck");
        drop(stopped);
        systemd.tells("WATCHDOG=1");
        assert!(systemd.ticks(2 * second) >= 1, "{what} is at work again");
    }
    assert!(agent.log().contains("the thread that hears of events does not answer"), "{}", agent.log());
    agent.stop();
}

fn systemd_is_told_how_the_agent_is(runtime: &str) {
    let systemd = Systemd::new();
    let agent = systemd.start(Duration::from_secs(3600));
    assert_eq!(systemd.tells("READY=1"), "READY=1\nSTATUS=0 containers, 0 grants, events from kernel\n");
    let c = Container::start(runtime, "qmh-status", &TTYS);
    assert_has_ttys(&c);
    systemd.tells("STATUS=1 containers, 8 grants, events from kernel\n");
    qm(&["list"]).ok();
    qm(&["attach", "qmh-none", "/dev/tty9"]).fails(3, "qmh-none");
    assert_eq!(systemd.told(Duration::from_millis(300), None), [""; 0], "nothing has changed");
    configure("[[policy]]\nallow = 3\n");
    agent.reload();
    assert!(systemd.tells("RELOADING=1").contains("MONOTONIC_USEC="));
    let status =
        format!("STATUS=1 containers, 8 grants, events from kernel; configuration refused: {CONFIGURATION}:2:9: ");
    assert!(systemd.tells("READY=1").contains(&status));
    assert_has_ttys(&c);
    unconfigure();
    agent.reload();
    systemd.tells("RELOADING=1");
    assert_eq!(systemd.tells("READY=1"), "READY=1\nSTATUS=1 containers, 8 grants, events from kernel\n");
    drop(c);
    systemd.tells("STATUS=0 containers, 0 grants, events from kernel\n");
    agent.stop();
    systemd.tells("STOPPING=1");
}

fn a_reload_tells_file_line_and_column() {
    qm(&["reload"]).fails(1, "no agent is running");
    configure("enable = ['uinput']\n");
    let agent = Agent::start();
    let shown = || qm(&["status"]).ok().lines().last().unwrap().to_owned();
    assert_eq!(shown(), "config:     read");
    for (text, problem) in [
        ("enable = ['uinput']\nenable = []\n", "2:1: "),
        ("enable = ['uinput',\n  'tape']\n", "2:3: there is no category 'tape' to enable"),
        ("[[container]]\nmatch = 'x'\ndevices = ['ttyUSB', 'usb=10c4:ea60,serail']\n", "3:37: in "),
        ("# ü\n[[policy]]\nowner = 'root'\n", "3:9: invalid type: string \"root\", expected u32"),
        ("[[policy]]\nallow = ['tty,as=/dev/x']\n", "2:11: in \"tty,as=/dev/x\": "),
    ] {
        configure(text);
        let problem = format!("{CONFIGURATION}:{problem}");
        qm(&["reload"]).fails(1, &format!("the configuration stays as it was: {problem}"));
        assert!(shown().starts_with("config:     ") && shown().contains(&problem), "{}", shown());
        assert!(agent.log().contains(&problem), "{}", agent.log());
    }
    configure("enable = []\n");
    qm(&["reload"]).ok();
    assert_eq!(shown(), "config:     read");
    agent.stop();
    unconfigure();
}

fn its_end_in_a_storm_leaves_ledger_and_kernel_alike(runtime: &str) {
    configure("enable = ['block']\n");
    let annotations = [&TTYS[..], &["--annotation", "org.containers.qm.device.block=true"]].concat();
    let c = Container::start(runtime, "qmh-end", &annotations);
    for round in 0..3 {
        let agent = Agent::start();
        let (is_over, device) = (AtomicBool::new(false), block(50));
        let took = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    (0..8).for_each(|n| trigger("remove", &format!("tty{n}")));
                    (0..8).for_each(|n| trigger("add", &format!("tty{n}")));
                    drop(block(51));
                }
            });
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    for said in [qm(&["attach", &c.name, &device.path, "/dev/x"]), qm(&["detach", &c.name, "/dev/x"])] {
                        assert!(!said.stderr.contains("panicked"), "{said:?}");
                    }
                }
            });
            wait_for("the storm", || agent.log().matches("revoked").count() > 200 * (round + 1));
            let stopped = Instant::now();
            agent.stop();
            let took = stopped.elapsed();
            is_over.store(true, Ordering::Relaxed);
            took
        });
        assert!(took < Duration::from_secs(8), "{took:?}");
        let recorded: BTreeSet<(u64, u64)> = grants()
            .iter()
            .filter(|grant| grant["node"] != "pending")
            .map(|grant| (grant["major"].as_u64().unwrap(), grant["minor"].as_u64().unwrap()))
            .collect();
        let in_force: BTreeSet<(u64, u64)> =
            entries().iter().map(|entry| (entry.number.major.into(), entry.number.minor.into())).collect();
        assert_eq!(recorded, in_force);
        assert_eq!(grants().len(), recorded.len(), "nothing is half done: {:?}", grants());
    }
    let _agent = Agent::start();
    assert_has_ttys(&c);
}

fn ten_thousand_failures_are_a_few_lines() {
    let agent = Agent::start();
    let (c, other) = (Container::start("crun", "qmh-flood", &TTYS), Container::start("runc", "qmh-quiet", &TTYS));
    [&c, &other].into_iter().for_each(assert_has_ttys);
    (0..8).for_each(|n| trigger("remove", &format!("tty{n}")));
    wait_for("all to go", || grants().is_empty());
    c.past_the_filter("mount -o remount,ro /dev").ok();
    let since = agent.log().len();
    for _ in 0..1250 {
        (0..8).for_each(|n| trigger("add", &format!("tty{n}")));
    }
    wait_for("the other one to have all", || entries().len() == 8 && other.node("/dev/tty7").is_some());
    qm(&["list"]).ok();
    agent.stop();
    let log = std::fs::read_to_string(crate::support::agent_log()).unwrap();
    let lines: Vec<&str> = log[since..].lines().filter(|line| line.contains("qmh-flood")).collect();
    let (repeated, first): (Vec<&str>, Vec<&str>) = lines.iter().partition(|line| line.contains("repeated"));
    // Once at the end, and once in each minute that this took.
    assert!(first.len() == 8 && (8..=24).contains(&repeated.len()), "{lines:#?}");
    assert!(first.iter().all(|line| line.contains("mounted read-only")), "{first:#?}");
    let count = |line: &&str| line.split("repeated=").nth(1)?.split_whitespace().next()?.parse::<u32>().ok();
    // Of a device, the last event at hand counts: there are fewer failures than events.
    let failures = repeated.iter().filter_map(count).sum::<u32>();
    assert!((16..10_000).contains(&failures), "{repeated:#?}");
}

fn what_a_container_is_called_stays_on_its_line(runtime: &str) {
    let agent = Agent::start();
    let key = "org.containers.qm.device.\u{1b}[2Jtape\n2026-01-01 ERROR it was me\u{202e}";
    let c = Container::start(runtime, "qmh-line", &["--annotation", &format!("\"{key}=true\"")]);
    wait_for("a word about it", || agent.log().contains("tape"));
    let log = agent.log();
    let line = log.lines().find(|line| line.contains("tape")).unwrap();
    assert!(line.contains("\\u{1b}[2Jtape\\n2026-01-01 ERROR it was me\\u{202e}"), "{line}");
    assert!(line.contains("container=\"qmh-line\"") && line.contains("ignored"), "{line}");
    assert!(!log.contains('\u{1b}') && !log.contains('\u{202e}'), "{log}");
    let shown = qm(&["ps", "--json"]).ok();
    assert!(!shown.contains('\u{1b}') && !shown.contains('\u{202e}'), "{shown}");
    drop(c);
}

/// Its root is in want of no permission, ours of CAP_DAC_OVERRIDE, and of CAP_FOWNER where the directory is sticky.
fn a_dev_that_its_container_has_locked_is_served(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-locked", &TTYS);
    assert_has_ttys(&c);
    c.sh("chown 7:7 /dev && chmod 1555 /dev").ok();
    let device = block(52);
    qm(&["attach", &c.name, &device.path, "/dev/mine", "--uid", "8"]).ok();
    assert!(c.node("/dev/mine").is_some_and(|node| node.starts_with("b 7:52 8:")));
    trigger("remove", "tty3");
    device.unplug();
    wait_for("both to go", || c.node("/dev/mine").is_none() && c.node("/dev/tty3").is_none());
    trigger("add", "tty3");
    wait_for("it to be back", || c.node("/dev/tty3").is_some());
}

fn it_may_do_what_it_needs_and_no_more() {
    let agent = Agent::start();
    let kept = NEEDED.map(|(capability, _)| capability).into_iter().chain([Capability::CAP_NET_ADMIN]);
    let kept = kept.fold(0, |mask, capability| mask | capability.bitmask());
    for (thread, name) in threads(&agent) {
        let status = std::fs::read_to_string(format!("/proc/{}/task/{thread}/status", agent.pid())).unwrap();
        let field = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(field(set), kept, "{set} of {name}");
        }
        assert_eq!((field("CapInh:"), field("CapAmb:"), field("NoNewPrivs:")), (0, 0, 1), "{name}");
    }
    agent.stop();
}
