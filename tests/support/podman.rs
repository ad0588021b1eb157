//! Real containers: podman with runc or crun on a busybox root file system, in storage of their own.

use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::{Said, run};

/// The runtimes that every runtime test goes through.
pub const RUNTIMES: [&str; 2] = ["runc", "crun"];

/// What runs here without CAP_SYS_RESOURCE.
const MODEST: [&str; 7] = [
    "--security-opt",
    "seccomp=unconfined",
    "--pids-limit=-1",
    "--ulimit",
    "nofile=1024:1024",
    "--ulimit",
    "nproc=1024:1024",
];

/// How the names of our places begin.
const PREFIX: &str = "qm-hotplug-podman-";

/// A container that is removed when dropped.
pub struct Container {
    pub runtime: String,
    pub name: String,
    pub id: String,
}

/// Storage, run directory and root file system for the containers of this test program.
pub fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap().keep();
        // Root of a user namespace is a stranger here and must still reach the root file system.
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).unwrap();
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

/// Removes all containers of this program.
pub fn remove_all() {
    podman(&["rm", "-a", "-f", "-t", "0"]);
}

/// Removes the storage; call it at the end of the test program.
pub fn clean_up() {
    remove_all();
    let _ = std::fs::remove_dir_all(place());
}

/// Removes what earlier programs left that were killed. Only for those who hold the lock of [`super::enter`].
pub fn remove_leftovers() {
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            podman_at(&entry.path(), &["rm", "-a", "-f", "-t", "0"]);
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Runs podman with this program's storage.
pub fn podman(args: &[&str]) -> Said {
    podman_at(place(), args)
}

fn podman_at(place: &Path, args: &[&str]) -> Said {
    let mut command = Command::new("podman");
    for (option, directory) in [("--root", "storage"), ("--runroot", "runroot"), ("--tmpdir", "tmp")] {
        command.arg(option).arg(place.join(directory));
    }
    command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
    say(command.args(args))
}

/// Runs a runtime itself (`runc`, `crun`) on its default state directory, as podman does.
pub fn runtime(name: &str, args: &[&str]) -> Said {
    say(Command::new(name).args(args))
}

fn say(command: &mut Command) -> Said {
    command.stdin(Stdio::null());
    // SAFETY: the child only makes one system call before exec.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(pretend_memlock)
    };
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}")).into()
}

impl Container {
    /// Starts a container that sleeps, with further options for `podman run`.
    pub fn start(runtime: &str, name: &str, options: &[&str]) -> Container {
        Container::start_running(runtime, name, options, &["sleep", "1000"])
    }

    /// Starts a container with a command of its own.
    pub fn start_running(runtime: &str, name: &str, options: &[&str], command: &[&str]) -> Container {
        Container::start_under(&[], runtime, name, options, command)
    }

    /// Starts a container with options for podman itself, those that come before `run`.
    pub fn start_under(global: &[&str], runtime: &str, name: &str, options: &[&str], command: &[&str]) -> Container {
        // An overlay of the shared directory: containers do not see each other's files.
        let rootfs = format!("{}:O", place().join("rootfs").display());
        Container::try_start(global, runtime, name, options, &["--rootfs", &rootfs], command)
            .unwrap_or_else(|said| panic!("{said:?}"))
    }

    /// Starts a container from `root`, an image or `--rootfs` with a directory. The error is what podman said.
    pub fn try_start(
        global: &[&str],
        runtime: &str,
        name: &str,
        options: &[&str],
        root: &[&str],
        command: &[&str],
    ) -> Result<Container, Said> {
        let run = ["--runtime", runtime, "run", "-d", "--name", name];
        let network: &[&str] = if options.contains(&"--network") { &[] } else { &["--network", "none"] };
        let said = podman(&[global, &run, network, &MODEST, options, root, command].concat());
        let container = |id: &str| Container { runtime: runtime.to_owned(), name: name.to_owned(), id: id.to_owned() };
        if said.code == 0 { Ok(container(said.stdout.trim())) } else { Err(said) }
    }

    /// Makes an image of the root file system.
    pub fn make_image(name: &str) {
        let archive = place().join("rootfs.tar");
        run("tar", &["-C", place().join("rootfs").to_str().unwrap(), "-cf", archive.to_str().unwrap(), "."]).ok();
        podman(&["import", "-q", archive.to_str().unwrap(), name]).ok();
    }

    /// Runs a command inside.
    pub fn exec(&self, command: &[&str]) -> Said {
        podman(&[&["exec", &self.name], command].concat())
    }

    /// Runs a shell line inside.
    pub fn sh(&self, line: &str) -> Said {
        self.exec(&["sh", "-c", line])
    }

    /// Has a process inside open a device node; `<` for reading, `>` for writing, `<>` for both. The error is the
    /// shell's, such as `Operation not permitted`, or `no device node`.
    pub fn open(&self, how: &str, path: &str) -> Result<(), String> {
        let said = self.sh(&format!("test -c {path} || test -b {path} || exit 9; exec 3{how}{path}"));
        match said.code {
            0 => Ok(()),
            9 => Err("no device node".into()),
            _ => {
                assert!(said.stderr.contains("can't open") || said.stderr.contains("can't create"), "{said:?}");
                let message = said.stderr.lines().find(|line| line.contains("can't ")).unwrap_or_default();
                Err(message.rsplit(": ").next().unwrap_or_default().to_owned())
            }
        }
    }

    /// Whether a process inside can open the device node.
    pub fn opens(&self, how: &str, path: &str) -> bool {
        self.open(how, path).is_ok()
    }

    /// Runs a shell line in the container's namespaces but in the host's cgroup: past the device filter.
    pub fn past_the_filter(&self, line: &str) -> Said {
        let pid = self.pid().to_string();
        run("nsenter", &["-t", &pid, "-m", "-p", "--", "/bin/busybox", "sh", "-c", line])
    }

    /// What lies at a path inside, links not followed.
    pub fn look(&self, path: &str) -> Option<Metadata> {
        std::fs::symlink_metadata(format!("/proc/{}/root{path}", self.pid())).ok()
    }

    /// Kind letter with numbers, owner and mode of what lies at a path inside: `c 4:3 0:0 0600`.
    pub fn node(&self, path: &str) -> Option<String> {
        self.look(path).map(|found| describe(&found))
    }

    /// Process id of its init on the host; 0 where it does not run.
    pub fn pid(&self) -> u32 {
        // The runtime's state says it too, and is read in no time.
        let (file, field) = if self.runtime == "crun" { ("status", "pid") } else { ("state.json", "init_process_pid") };
        let state = std::fs::read(format!("/run/{}/{}/{file}", self.runtime, self.id)).unwrap_or_default();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap_or_default();
        if let Some(pid) = state[field].as_u64() {
            return pid as u32;
        }
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

/// Kind letter with numbers, owner and mode: `c 4:3 0:0 0600`.
pub fn describe(found: &Metadata) -> String {
    let kind = match found.mode() & 0o170_000 {
        0o020_000 => 'c',
        0o060_000 => 'b',
        0o100_000 => '-',
        0o040_000 => 'd',
        _ => '?',
    };
    let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    format!("{kind} {major}:{minor} {}:{} {:04o}", found.uid(), found.gid(), found.mode() & 0o7777)
}

/// A container that runc or crun runs by itself, removed when dropped. For what podman cannot make on storage like ours.
pub struct Bare {
    runtime: String,
    pub id: String,
}

impl Bare {
    /// Starts one that sleeps in a user namespace.
    pub fn start_in_user_namespace(runtime: &str, id: &str) -> Bare {
        let bundle = place().join(id);
        let _ = std::fs::remove_dir_all(&bundle);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::set_permissions(&bundle, std::fs::Permissions::from_mode(0o755)).unwrap();
        let bundle = bundle.to_str().unwrap();
        let config = format!("{bundle}/config.json");
        let said: Said = Command::new(runtime).arg("spec").current_dir(bundle).output().unwrap().into();
        said.ok();
        let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = serde_json::json!(["sleep", "1000"]);
        spec["process"].as_object_mut().unwrap().remove("rlimits");
        spec["root"] = serde_json::json!({ "path": place().join("rootfs"), "readonly": true });
        let map = serde_json::json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({ "type": "user" }));
        std::fs::write(&config, spec.to_string()).unwrap();
        let mut command = Command::new(runtime);
        command.args(["run", "--detach", "--bundle", bundle, id]);
        // A detached container keeps its standard streams: they must not be ours to wait for.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: the child only makes one system call before exec.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(pretend_memlock)
        };
        let bare = Bare { runtime: runtime.to_owned(), id: id.to_owned() };
        assert!(command.status().unwrap().success(), "{command:?}");
        bare
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = Command::new(&self.runtime).args(["delete", "--force", &self.id]).output();
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
