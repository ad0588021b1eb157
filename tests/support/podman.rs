//! Real containers: podman with runc or crun on a busybox root file system, in storage of their own.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::{Said, run};

/// The runtimes that every runtime test goes through.
pub const RUNTIMES: [&str; 2] = ["runc", "crun"];

/// A container that is removed when dropped.
pub struct Container {
    pub name: String,
    pub id: String,
}

/// Storage, run directory and root file system for the containers of this test program.
fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = tempfile::Builder::new().prefix("qm-hotplug-podman-").tempdir().unwrap().keep();
        let bin = place.join("rootfs/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox-static is installed");
        for applet in run("/bin/busybox", &["--list"]).ok().lines().filter(|applet| *applet != "busybox") {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        for directory in ["etc", "tmp", "dev", "proc", "sys", "run"] {
            std::fs::create_dir_all(place.join("rootfs").join(directory)).unwrap();
        }
        place
    })
}

/// Removes the storage; call it at the end of the test program.
pub fn clean_up() {
    podman(&["rm", "-a", "-f", "-t", "0"]);
    let _ = std::fs::remove_dir_all(place());
}

/// Runs podman with this program's storage.
pub fn podman(args: &[&str]) -> Said {
    let place = place();
    let mut command = Command::new("podman");
    for (option, directory) in [("--root", "storage"), ("--runroot", "runroot"), ("--tmpdir", "tmp")] {
        command.arg(option).arg(place.join(directory));
    }
    command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
    command.args(args).stdin(Stdio::null());
    // SAFETY: the child only makes one system call before exec.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(pretend_memlock)
    };
    command.output().expect("podman is installed").into()
}

impl Container {
    /// Starts a container that sleeps, with further options for `podman run`.
    pub fn start(runtime: &str, name: &str, options: &[&str]) -> Container {
        Container::start_running(runtime, name, options, &["sleep", "1000"])
    }

    /// Starts a container with a command of its own.
    pub fn start_running(runtime: &str, name: &str, options: &[&str], command: &[&str]) -> Container {
        podman(&["rm", "-f", "-t", "0", "-i", name]);
        let rootfs = place().join("rootfs");
        let mut args = vec!["--runtime", runtime, "run", "-d", "--name", name, "--network", "none"];
        // What runs here without CAP_SYS_RESOURCE.
        args.extend(["--security-opt", "seccomp=unconfined", "--pids-limit=-1", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]);
        args.extend(options);
        // An overlay of the shared directory: containers do not see each other's files.
        let rootfs = format!("{}:O", rootfs.display());
        args.extend(["--rootfs", &rootfs]);
        args.extend(command);
        let id = podman(&args).ok().trim().to_owned();
        Container { name: name.to_owned(), id }
    }

    /// Runs a command inside.
    pub fn exec(&self, command: &[&str]) -> Said {
        podman(&[&["exec", &self.name], command].concat())
    }

    /// Runs a shell line inside.
    pub fn sh(&self, line: &str) -> Said {
        self.exec(&["sh", "-c", line])
    }

    /// Whether a process inside can open the path; `<` for reading, `>` for writing, `<>` for both.
    pub fn opens(&self, how: &str, path: &str) -> bool {
        let said = self.sh(&format!("exec 3{how}{path}"));
        assert!(said.code == 0 || said.stderr.contains("can't open") || said.stderr.contains("can't create"), "{said:?}");
        said.code == 0
    }

    /// Process id of its init on the host.
    pub fn pid(&self) -> u32 {
        podman(&["inspect", "-f", "{{.State.Pid}}", &self.name]).ok().trim().parse().unwrap()
    }

    /// Its cgroup below the cgroup2 root.
    pub fn cgroup(&self) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/cgroup", self.pid())).unwrap();
        text.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        podman(&["rm", "-f", "-t", "0", "-i", &self.name]);
    }
}

/// Lets `setrlimit(RLIMIT_MEMLOCK)` succeed without effect, by a seccomp filter on podman and its children. crun before
/// 1.9 raises that limit before it loads its device filter and gives up where CAP_SYS_RESOURCE is missing, as in many a
/// virtual machine; kernels since 5.11 do not look at the limit.
#[allow(unsafe_code)]
fn pretend_memlock() -> std::io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    // Offsets in struct seccomp_data: nr 0, args[1] 24, args[2] 32.
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(LOAD, 0, 0, 0),
        step(IF_EQUAL, 0, 5, libc::SYS_prlimit64 as u32),
        step(LOAD, 0, 0, 24),
        step(IF_EQUAL, 0, 3, libc::RLIMIT_MEMLOCK),
        step(LOAD, 0, 0, 32),
        step(IF_EQUAL, 1, 0, 0),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its length are those of the array above, which outlives the call.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
