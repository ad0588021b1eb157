//! A process in the container's cgroup and mount namespace that tells when a device can be opened and when not.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use qm_hotplug::sys::process::Process;

/// The hidden first argument of the child.
pub const ROLE: &str = "probe-child";

/// The running probe.
pub struct Probe {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Probe {
    pub fn start(pid: u32, cgroup: &str, path: &str) -> Probe {
        let me = std::env::current_exe().unwrap();
        let mut child =
            Command::new(me).args([ROLE, &pid.to_string(), cgroup, path]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Probe { child, lines }
    }

    /// Waits until the probe says that the device opens, or does not.
    pub fn wait(&mut self, opens: bool) {
        let mut line = String::new();
        while line.trim() != opens.to_string() {
            line.clear();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the probe ended");
        }
    }

    /// How long after `event` the probe saw the change.
    pub fn after(&mut self, opens: bool, event: impl FnOnce()) -> Duration {
        let start = Instant::now();
        event();
        self.wait(opens);
        start.elapsed()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child: goes inside and tries without end.
pub fn child(pid: u32, cgroup: &str, path: &str) {
    std::fs::write(format!("/sys/fs/cgroup{cgroup}/cgroup.procs"), "0").unwrap();
    let process = Process::open(pid).unwrap();
    // This process has one thread and nothing else to do, so it may go inside itself.
    setns(&process, CloneFlags::CLONE_NEWNS).unwrap();
    let mut last = None;
    loop {
        let opens = File::open(path).is_ok();
        if last != Some(opens) {
            let line = format!("{opens}\n");
            if std::io::stdout().write_all(line.as_bytes()).and_then(|()| std::io::stdout().flush()).is_err() {
                return;
            }
            last = Some(opens);
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}
