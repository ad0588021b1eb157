//! What the tiers that need root share: a mount namespace of their own, real podman containers, and the binary.
#![allow(dead_code)]

pub mod crowd;
pub mod podman;
pub mod rude;
pub mod udev;
pub mod user;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FlockOperation, flock};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_qm-hotplug");

/// Moves this process into a mount namespace of its own: cgroup2 on /sys/fs/cgroup also where the host is hybrid, an
/// empty /run/qm-hotplug, /var/lib/qm-hotplug and /var/log, and an /etc of its own without configuration of ours. Call it first in `main`,
/// while there is one thread.
///
/// The device filter is one for the whole kernel, so only one such test program runs at a time.
pub fn enter() {
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "this tier needs root: it makes cgroups, namespaces, device nodes and BPF programs; run it with sudo"
        );
        std::process::exit(1);
    }
    let lock =
        File::create("/run/lock/qm-hotplug-tests").or_else(|_| File::create("/tmp/qm-hotplug-tests.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    std::mem::forget(lock);
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let unified = rustix::fs::statfs("/sys/fs/cgroup").is_ok_and(|fs| fs.f_type as u64 == 0x6367_7270);
    if !unified {
        mount(Some("none"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none).unwrap();
    }
    fresh_run_directory();
    std::fs::create_dir_all("/var/lib/qm-hotplug").unwrap();
    mount(Some("none"), "/var/lib/qm-hotplug", Some("tmpfs"), MsFlags::empty(), Some("mode=0700")).unwrap();
    // The hook's log is the host's too.
    mount(Some("none"), "/var/log", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    // What is written to /etc goes to a tmpfs, which stays when its mount goes.
    mount(Some("none"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    ["/mnt/upper", "/mnt/work"].iter().for_each(|directory| std::fs::create_dir(directory).unwrap());
    let layers = Some("lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work");
    mount(Some("none"), "/etc", Some("overlay"), MsFlags::empty(), layers).unwrap();
    umount2("/mnt", MntFlags::MNT_DETACH).unwrap();
    unconfigure();
}

/// The file that [`configure`] writes.
pub const CONFIGURATION: &str = "/etc/qm-hotplug/config.d/50-test.toml";

/// Writes the host's only file of configuration, in this mount namespace.
pub fn configure(text: &str) {
    std::fs::create_dir_all(Path::new(CONFIGURATION).parent().unwrap()).unwrap();
    std::fs::write(CONFIGURATION, text).unwrap();
}

/// Has these ordinary users' containers looked for.
pub fn serve_users(uids: &[u32]) {
    let path = Path::new(CONFIGURATION).with_file_name("40-users.toml");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, format!("users = {uids:?}\n")).unwrap();
}

/// Removes all configuration.
pub fn unconfigure() {
    let _ = std::fs::remove_dir_all("/etc/qm-hotplug");
}

/// An empty /run/qm-hotplug, on a tmpfs as on a real host.
pub fn fresh_run_directory() {
    std::fs::create_dir_all("/run/qm-hotplug").unwrap();
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("none"), "/run/qm-hotplug", Some("tmpfs"), flags, Some("mode=0700")).unwrap();
}

/// What a finished command said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// Asserts success and returns stdout.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// Asserts this exit code, one line on stderr that holds `text`, and returns the line.
    #[track_caller]
    pub fn fails(self, code: i32, text: &str) -> String {
        assert_eq!(self.code, code, "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "one line: {self:?}");
        assert!(self.stderr.contains(text), "{text:?} in {self:?}");
        self.stderr
    }
}

/// Runs the binary under test.
pub fn qm(args: &[&str]) -> Said {
    Command::new(BINARY).args(args).stdin(Stdio::null()).output().unwrap().into()
}

/// Runs a program.
pub fn run(program: &str, args: &[&str]) -> Said {
    Command::new(program).args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{program}: {e}")).into()
}

/// `list --json`, parsed.
pub fn grants() -> Vec<serde_json::Value> {
    serde_json::from_str(&qm(&["list", "--json"]).ok()).unwrap()
}

/// How long [`wait_for`] waits.
const PATIENCE: Duration = Duration::from_secs(15);

/// Waits until something holds; panics with `what` when it does not in time.
#[track_caller]
pub fn wait_for(what: &str, test: impl FnMut() -> bool) {
    wait_within(PATIENCE, what, test);
}

/// The same with a time of its own.
#[track_caller]
pub fn wait_within(patience: Duration, what: &str, mut test: impl FnMut() -> bool) {
    let until = Instant::now() + patience;
    while !test() {
        assert!(Instant::now() < until, "timed out waiting for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where agents of this test program log.
pub fn agent_log() -> PathBuf {
    std::env::temp_dir().join(format!("qm-hotplug-agent-{}.log", std::process::id()))
}

/// A running agent. Ends with SIGTERM when dropped.
pub struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    /// Starts it and waits until its socket answers.
    pub fn start() -> Agent {
        Agent::start_as(PATIENCE, &[])
    }

    /// The same, where there is much to do first.
    pub fn start_within(patience: Duration) -> Agent {
        Agent::start_as(patience, &[])
    }

    /// The same with more in its environment.
    pub fn start_with(environment: &[(&str, &str)]) -> Agent {
        Agent::start_as(PATIENCE, environment)
    }

    fn start_as(patience: Duration, environment: &[(&str, &str)]) -> Agent {
        let log = agent_log();
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        let mut child = Command::new(BINARY)
            .arg("agent")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        wait_within(patience, "the agent's socket", || {
            assert!(child.try_wait().unwrap().is_none(), "the agent ended: {}", read(&log));
            qm(&["status", "--json"]).stdout.contains("\"agent\":true")
        });
        Agent { child, log }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it read its configuration again.
    pub fn reload(&self) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    }

    /// All that agents of this test program have logged.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Ends it and waits.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        if self.child.try_wait().unwrap().is_none() {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            self.child.wait().unwrap();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
    }
}

fn read(path: &Path) -> String {
    let mut text = String::new();
    File::open(path).and_then(|mut file| file.read_to_string(&mut text)).map_or(String::new(), |_| text)
}

/// Asserts that the kernel holds nothing of ours: no program at the root or on any cgroup.
#[track_caller]
pub fn assert_nothing_left() {
    use qm_hotplug::sys::{bpf, cgroup::CgroupRoot};
    use std::os::fd::AsFd;
    let root = CgroupRoot::find().unwrap();
    let names = |fd: std::os::fd::BorrowedFd<'_>| -> Vec<String> {
        bpf::attached(fd)
            .unwrap()
            .iter()
            .map(|p| p.info().unwrap().name)
            .filter(|name| name.starts_with("qmhp") || name.starts_with("qmhc"))
            .collect()
    };
    assert_eq!(names(root.as_fd()), [""; 0], "programs at the root");
    for path in root.walk() {
        if let Ok(cgroup) = root.open(&path) {
            assert_eq!(names(cgroup.as_fd()), [""; 0], "programs on {path}");
        }
    }
}

/// Takes everything of ours out, for tests that must not depend on the ones before.
pub fn release() {
    qm(&["agent", "--release"]).ok();
}
