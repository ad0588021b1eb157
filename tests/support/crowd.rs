//! Many cheap containers: each a process in a mount namespace, with a root, a `/dev` and a cgroup of its own, under a
//! filter that refuses every device, and with the state files that crun would leave for it.

#![allow(unsafe_code)]

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, fork, pivot_root};
use qm_hotplug::core::device::Number;
use qm_hotplug::core::filter_program::Insn;
use qm_hotplug::sys::bpf::Program;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::node;
use qm_hotplug::sys::process::Process;

/// Where its cgroups are; a name of its own below the parent that the tests look at.
const CGROUPS: &str = "/sys/fs/cgroup/libpod_parent/qmh-crowd";
/// crun's state directory.
const STATES: &str = "/run/crun";

/// One container of a crowd. Ends when dropped.
pub struct Member {
    /// Its id and name.
    pub name: String,
    /// Process id of its init.
    pub pid: u32,
    state: PathBuf,
}

impl Member {
    /// Starts it: with these annotations and, in its own mount namespace, whatever `prepare` does to its root.
    pub fn start(name: &str, annotations: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> Member {
        let (mut ours, its) = UnixStream::pair().unwrap();
        // SAFETY: the child uses nothing that another thread may have locked but the allocator, which glibc makes usable.
        let pid = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child.as_raw() as u32,
            ForkResult::Child => {
                drop(ours);
                be_a_container(its, prepare);
            }
        };
        drop(its);
        let cgroup = PathBuf::from(CGROUPS).join(name);
        fs::create_dir_all(&cgroup).unwrap();
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
        let member = Member { name: name.to_owned(), pid, state: Path::new(STATES).join(name) };
        let refuse = [Insn::new(0xb7, 0, 0, 0, 0), Insn::new(0x95, 0, 0, 0, 0)];
        let filter = Program::load("runtime", &refuse).unwrap();
        let root = CgroupRoot::find().unwrap();
        filter.attach(root.open(&member.cgroup()).unwrap().as_fd()).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 1, "{name} is ready");
        member.write_state(annotations);
        member
    }

    /// The state as crun leaves it, renamed into place last.
    fn write_state(&self, annotations: &[(&str, &str)]) {
        fs::create_dir_all(&self.state).unwrap();
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        let spec = serde_json::json!({ "annotations": annotations });
        fs::write(self.state.join("config.json"), spec.to_string()).unwrap();
        let start_time = Process::open(self.pid).unwrap().start_time;
        let status = serde_json::json!({
            "pid": self.pid, "process-start-time": start_time, "cgroup-path": self.cgroup(), "bundle": "/none",
        });
        fs::write(self.state.join("status.tmp"), status.to_string()).unwrap();
        fs::rename(self.state.join("status.tmp"), self.state.join("status")).unwrap();
    }

    /// Its cgroup's path below the root.
    pub fn cgroup(&self) -> String {
        format!("{}/{}", CGROUPS.strip_prefix("/sys/fs/cgroup").unwrap(), self.name)
    }

    /// Where the host sees a path of its.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// The device whose node it has at that path.
    pub fn device_at(&self, path: &str) -> Option<Number> {
        node::number_of(&rustix::fs::lstat(self.path(path)).ok()?)
    }

    /// What is in its `/dev`, sorted.
    pub fn nodes(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("/dev")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Kills its init, and nothing else: cgroup and state stay, as for a moment with every runtime.
    pub fn kill(&self) {
        // A child of ours that was not reaped: the number is still its.
        let pid = nix::unistd::Pid::from_raw(self.pid as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(pid, None);
    }

    /// Does something in its mount namespace, in a child of its own.
    pub fn within(&self, work: impl FnOnce() -> nix::Result<()>) {
        let process = Process::open(self.pid).unwrap();
        // SAFETY: as above.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0), "inside {}", self.name);
            }
            ForkResult::Child => {
                let result = setns(process.as_fd(), CloneFlags::CLONE_NEWNS).and_then(|()| work());
                // SAFETY: _exit(2) has no conditions.
                unsafe { libc::_exit(result.map_or_else(|errno| errno as i32, |()| 0)) }
            }
        }
    }

    /// Removes its cgroup, which must be empty.
    pub fn remove_cgroup(&self) {
        let _ = fs::remove_dir(format!("/sys/fs/cgroup{}", self.cgroup()));
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.state);
        self.remove_cgroup();
        // The last one takes the parent along.
        let _ = fs::remove_dir(CGROUPS);
    }
}

/// The child: a root of its own, then nothing until it is killed.
fn be_a_container(mut ready: UnixStream, prepare: impl FnOnce(&Path)) -> ! {
    let set_up = || -> nix::Result<()> {
        let (none, root) = (None::<&str>, Path::new("/mnt"));
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("none"), root, Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=0755"))?;
        ["/mnt/dev", "/mnt/old"].iter().for_each(|path| fs::create_dir(path).expect("a new directory"));
        mount(Some("none"), "/mnt/dev", Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=0755"))?;
        prepare(root);
        pivot_root("/mnt", "/mnt/old")?;
        std::env::set_current_dir("/").expect("the root is there");
        umount2("/old", MntFlags::MNT_DETACH)?;
        Ok(())
    };
    let result = set_up();
    if let Err(errno) = result {
        eprintln!("a container of the crowd: {errno}");
    }
    let _ = ready.write_all(if result.is_ok() { b"r" } else { b"" });
    drop(ready);
    while result.is_ok() {
        nix::unistd::pause();
    }
    // Nothing of the parent's is dropped here.
    // SAFETY: _exit(2) has no conditions.
    unsafe { libc::_exit(1) }
}
