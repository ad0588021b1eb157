//! Ordinary users with rootless podman. They are in this program's own /etc and /run/user, and gone with it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Once;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::podman::{MODEST, describe, place};
use super::{Said, run, wait_for};

/// A user; all that runs as this user ends when dropped.
pub struct User {
    pub name: String,
    pub uid: u32,
}

/// A container of a user's, removed when dropped.
pub struct Rootless<'a> {
    user: &'a User,
    pub runtime: String,
    /// As the agent calls it: `USER@NAME`.
    pub name: String,
    /// As podman calls it.
    pub own_name: String,
    pub id: String,
    pub pid: u32,
}

/// How many ids a user has for containers.
const SUBORDINATE: u32 = 65_536;

impl User {
    /// Makes a user without any group of others, with a runtime directory as systemd makes it.
    pub fn make(name: &str, uid: u32) -> User {
        static USERS: Once = Once::new();
        USERS.call_once(|| tmpfs("/run/user", "mode=0755"));
        let user = User { name: name.to_owned(), uid };
        let home = user.home();
        run("useradd", &["--no-create-home", "--home-dir", home.to_str().unwrap(), "--uid", &uid.to_string(), name])
            .ok();
        for file in ["/etc/subuid", "/etc/subgid"] {
            let others = fs::read_to_string(file).unwrap_or_default();
            let others: Vec<&str> = others.lines().filter(|line| !line.starts_with(&format!("{name}:"))).collect();
            fs::write(file, format!("{}\n{name}:{}:{SUBORDINATE}\n", others.join("\n"), user.first_id())).unwrap();
        }
        let rootfs = home.join("rootfs");
        fs::create_dir_all(&home).unwrap();
        let from = place().join("rootfs");
        run("cp", &["-a", from.to_str().unwrap(), rootfs.to_str().unwrap()]).ok();
        run("chown", &["-R", &format!("{uid}:{uid}"), home.to_str().unwrap()]).ok();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        fs::create_dir(user.runtime_directory()).unwrap();
        tmpfs(&user.runtime_directory(), &format!("mode=0700,uid={uid},gid={uid},size=64m"));
        user
    }

    /// The first of the ids that containers map to 1 and so on.
    pub fn first_id(&self) -> u32 {
        self.uid * SUBORDINATE % 2_000_000_000
    }

    fn home(&self) -> PathBuf {
        place().join(&self.name)
    }

    /// `/run/user/UID`.
    pub fn runtime_directory(&self) -> String {
        format!("/run/user/{}", self.uid)
    }

    /// Makes the user a member of a group.
    pub fn join(&self, group: &str) {
        run("usermod", &["--append", "--groups", group, &self.name]).ok();
    }

    /// A command as this user.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("runuser");
        command.args(["-u", &self.name, "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
        command.arg(format!("HOME={}", self.home().display()));
        command.arg(format!("XDG_RUNTIME_DIR={}", self.runtime_directory()));
        command.arg(program).args(args).current_dir("/").stdin(Stdio::null());
        command
    }

    /// Runs a shell line as this user.
    pub fn sh(&self, line: &str) -> Said {
        self.command("sh", &["-c", line]).output().unwrap().into()
    }

    fn podman(&self, args: &[&str]) -> Said {
        let options =
            ["--log-level=error", "--cgroup-manager=cgroupfs", "--events-backend=file", "--storage-driver=vfs"];
        self.command("podman", &[&options[..], args].concat()).output().unwrap().into()
    }

    /// Starts a container that sleeps.
    pub fn start(&self, runtime: &str, name: &str, options: &[&str]) -> Rootless<'_> {
        let rootfs = self.home().join("rootfs");
        let run = ["--runtime", runtime, "run", "-d", "--name", name, "--network", "none"];
        let root = ["--rootfs", rootfs.to_str().unwrap(), "sleep", "1000"];
        let said = self.podman(&[&run, &MODEST[..], options, &root].concat());
        assert_eq!(said.code, 0, "{said:?}");
        let id = said.stdout.trim().to_owned();
        let pid = self.podman(&["inspect", "-f", "{{.State.Pid}}", name]).ok().trim().parse().unwrap();
        let (runtime, own_name) = (runtime.to_owned(), name.to_owned());
        Rootless { user: self, runtime, name: format!("{}@{name}", self.name), own_name, id, pid }
    }

    /// Processes of this user, and of the ids of his containers.
    fn processes(&self) -> Vec<i32> {
        let is_his = |uid: u32| uid == self.uid || (self.first_id()..self.first_id() + SUBORDINATE).contains(&uid);
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let his = entries.filter(|entry| entry.metadata().is_ok_and(|found| is_his(found.uid())));
        his.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }
}

fn tmpfs(path: &str, options: &str) {
    fs::create_dir_all(path).unwrap();
    mount(Some("none"), path, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options)).unwrap();
}

impl Drop for User {
    fn drop(&mut self) {
        wait_for("the user's processes to end", || {
            let all = self.processes();
            for pid in &all {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
            }
            all.is_empty()
        });
        let _ = umount2(&*self.runtime_directory(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(self.runtime_directory());
        let _ = fs::remove_dir_all(self.home());
        run("userdel", &[&self.name]);
    }
}

impl Rootless<'_> {
    /// Its id as the agent calls it.
    pub fn full_id(&self) -> String {
        format!("{}@{}", self.user.uid, self.id)
    }

    /// Runs a shell line inside.
    pub fn sh(&self, line: &str) -> Said {
        let pid = self.pid.to_string();
        // As podman exec does, but for the engine: into all its namespaces, as its root.
        run("nsenter", &["-t", &pid, "-U", "-m", "-p", "-S", "0", "-G", "0", "--", "/bin/busybox", "sh", "-c", line])
    }

    /// Whether a process inside can open the device node for reading and writing.
    pub fn opens(&self, path: &str) -> bool {
        self.sh(&format!("test -c {path} && exec 3<>{path}")).code == 0
    }

    /// Kind letter with numbers, owner and mode of what lies at a path inside.
    pub fn node(&self, path: &str) -> Option<String> {
        fs::symlink_metadata(format!("/proc/{}/root{path}", self.pid)).ok().map(|found| describe(&found))
    }
}

impl Drop for Rootless<'_> {
    fn drop(&mut self) {
        self.user.podman(&["rm", "-f", "-t", "0", "-i", &self.own_name]);
    }
}

/// Gives a file to a user, as a step of a test's own.
pub fn give(path: &str, uid: u32) {
    chown(path, Some(uid), Some(uid)).unwrap();
}
