//! A process under test: it opens and makes device nodes when told, from the cgroup or the root directory that it was
//! put into. The test program starts itself anew for it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use qm_hotplug::core::device::{Kind, Number};
use qm_hotplug::sys::process::Process;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, makedev, mknodat, open, renameat_with, unlinkat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// First argument of a test program that is to be an actor.
const ARGUMENT: &str = "--actor";
/// Last argument of one that is to have a user namespace.
const MAPPED: &str = "--mapped";

/// What an actor did in the background until it was stopped.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// How often it tried.
    pub tries: u64,
    /// How often each errno came back.
    pub errors: BTreeMap<i32, u64>,
}

impl Tally {
    fn count(&mut self, result: Result<(), Errno>) {
        self.tries += 1;
        if let Err(errno) = result {
            *self.errors.entry(errno.raw_os_error()).or_default() += 1;
        }
    }

    /// Asserts that it tried often and that every try went this way.
    #[track_caller]
    pub fn always(&self, result: Result<(), Errno>) {
        assert!(self.tries > 500, "too few tries to mean anything: {self:?}");
        let expected = result.err().map(|errno| (errno.raw_os_error(), self.tries)).into_iter().collect();
        assert_eq!(self.errors, expected, "of {} tries", self.tries);
    }
}

/// An actor, killed when dropped.
pub struct Actor {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Actor {
    /// Starts one; with a root directory, in a mount namespace of its own that has this root, like a container.
    pub fn start(root: Option<&Path>) -> Actor {
        Actor::start_as(root, None)
    }

    /// Starts one with a root directory in a user namespace, with these lines as its maps of users and of groups.
    pub fn start_mapped(root: &Path, map: &str) -> Actor {
        Actor::start_as(Some(root), Some(map))
    }

    fn start_as(root: Option<&Path>, map: Option<&str>) -> Actor {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(ARGUMENT).args(root).args(map.map(|_| MAPPED)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut actor = Actor { child, stdin, stdout };
        if let Some(map) = map {
            assert_eq!(actor.ask(&["maps"]), "without maps");
            for file in ["uid_map", "gid_map"] {
                std::fs::write(format!("/proc/{}/{file}", actor.pid()), map).unwrap();
            }
            assert_eq!(actor.ask(&["go on"]), "mapped");
        }
        assert_eq!(actor.ask(&["hello"]), "hello");
        actor
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Itself, as the program under test holds it.
    pub fn process(&self) -> Process {
        Process::open(self.pid()).expect("the actor runs")
    }

    /// Ends it with SIGKILL and reaps it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it and leaves it unreaped.
    pub fn kill_only(&mut self) {
        self.child.kill().unwrap();
        crate::support::wait_for("the actor to be a zombie", || {
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).is_ok_and(|stat| stat.contains(") Z "))
        });
    }

    /// Opens a path (`r`, `w` or `rw`) and closes it again.
    #[track_caller]
    pub fn open(&mut self, how: &str, path: impl AsRef<Path>) -> Result<(), Errno> {
        parse(&self.ask(&["open", how, path.as_ref().to_str().unwrap()]))
    }

    /// Makes a device node and, where that worked, removes it again.
    #[track_caller]
    pub fn mknod(&mut self, number: Number, path: impl AsRef<Path>) -> Result<(), Errno> {
        let (major, minor) = (number.major.to_string(), number.minor.to_string());
        parse(&self.ask(&["mknod", &number.kind.letter().to_string(), &major, &minor, path.as_ref().to_str().unwrap()]))
    }

    /// Remounts a file system, in its own mount namespace.
    #[track_caller]
    pub fn remount(&mut self, path: &str, read_only: bool) {
        assert_eq!(self.ask(&["remount", if read_only { "ro" } else { "rw" }, path]), "0");
    }

    /// Makes a mount read-only, and no other one of its file system.
    #[track_caller]
    pub fn remount_bound(&mut self, path: &str) {
        assert_eq!(self.ask(&["remount", "bound ro", path]), "0");
    }

    /// Does something with files: `file PATH TEXT`, `directory PATH`, `link TARGET PATH`, `remove PATH`.
    #[track_caller]
    pub fn files(&mut self, words: &[&str]) {
        assert_eq!(self.ask(words), "0", "{words:?}");
    }

    /// Mounts `tmpfs`, or binds a path.
    #[track_caller]
    pub fn mount(&mut self, what: &str, path: &str) -> Result<(), Errno> {
        parse(&self.ask(&["mount", what, path]))
    }

    /// Unmounts, also what is in use.
    #[track_caller]
    pub fn unmount(&mut self, path: &str) -> Result<(), Errno> {
        parse(&self.ask(&["umount", path]))
    }

    /// Starts to open a path in a loop.
    pub fn hammer(&mut self, how: &str, path: impl AsRef<Path>) {
        self.begin(&["hammer", how, path.as_ref().to_str().unwrap()]);
    }

    /// Starts to do something in a loop: `hammer HOW PATH`, `swap A B`, `ambush DIRECTORY TARGET`.
    pub fn begin(&mut self, words: &[&str]) {
        assert_eq!(self.ask(words), "started");
    }

    /// Ends what was begun, and says how it went, in the order in which it was begun.
    pub fn stop(&mut self) -> Vec<Tally> {
        serde_json::from_str(&self.ask(&["stop"])).unwrap()
    }

    #[track_caller]
    fn ask(&mut self, words: &[&str]) -> String {
        writeln!(self.stdin, "{}", words.join("\t")).expect("the actor listens");
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the actor ended when asked to {words:?}");
        line.trim_end().to_owned()
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.kill();
    }
}

fn parse(answer: &str) -> Result<(), Errno> {
    match answer.parse().expect("an errno") {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// Becomes an actor and never returns, where the command line says so. Call it first in `main`.
pub fn become_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|first| first != ARGUMENT) {
        return;
    }
    if let Some(root) = arguments.next() {
        match arguments.next() {
            Some(_) => enter_mapped_root(root.as_ref()),
            None => enter_root(root.as_ref()),
        }
    }
    let mut background: Vec<JoinHandle<Tally>> = Vec::new();
    let running = Arc::new(AtomicBool::new(true));
    // The test program's end closes our stdin, so no actor outlives it.
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split('\t').collect();
        let answer = match words[..] {
            ["hello"] => "hello".to_owned(),
            ["open", how, path] => errno(try_open(how, path)),
            ["mknod", kind, major, minor, path] => {
                errno(try_mknod(kind, major.parse().unwrap(), minor.parse().unwrap(), path))
            }
            ["mount", what, path] => errno(nix_errno(mount(
                Some(what).filter(|what| *what != "tmpfs"),
                path,
                Some(what).filter(|what| *what == "tmpfs"),
                if what == "tmpfs" { MsFlags::empty() } else { MsFlags::MS_BIND },
                Some("size=4k,nr_inodes=2").filter(|_| what == "tmpfs"),
            ))),
            ["file", path, text] => io_errno(std::fs::write(path, text)),
            ["directory", path] => io_errno(std::fs::create_dir_all(path)),
            ["link", target, path] => io_errno(symlink(target, path)),
            ["remove", path] => io_errno(std::fs::remove_file(path)),
            ["umount", path] => errno(nix_errno(umount2(path, MntFlags::MNT_DETACH))),
            ["remount", how, path] => {
                let flags = MsFlags::MS_REMOUNT
                    | match how {
                        "ro" => MsFlags::MS_RDONLY,
                        "bound ro" => MsFlags::MS_RDONLY | MsFlags::MS_BIND,
                        _ => MsFlags::empty(),
                    };
                errno(nix_errno(mount(None::<&str>, path, None::<&str>, flags, None::<&str>)))
            }
            ["stop"] => {
                running.store(false, Ordering::Relaxed);
                let tallies: Vec<Tally> = background.drain(..).map(|thread| thread.join().unwrap()).collect();
                running.store(true, Ordering::Relaxed);
                serde_json::to_string(&tallies).unwrap()
            }
            _ => {
                let mut act = in_background(&words);
                let running = running.clone();
                background.push(std::thread::spawn(move || {
                    let mut tally = Tally::default();
                    while running.load(Ordering::Relaxed) {
                        act(&mut tally);
                    }
                    tally
                }));
                "started".to_owned()
            }
        };
        println!("{answer}");
    }
    std::process::exit(0);
}

/// One turn of what is done in a loop.
fn in_background(words: &[&str]) -> Box<dyn FnMut(&mut Tally) + Send> {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    match words[0].as_str() {
        "hammer" => Box::new(move |tally| tally.count(try_open(&words[1], &words[2]))),
        // Two names change places; now sooner, now later, so that every moment is hit.
        "swap" => Box::new(move |tally| {
            tally.count(renameat_with(CWD, &*words[1], CWD, &*words[2], RenameFlags::EXCHANGE));
            let until = Instant::now() + Duration::from_micros(tally.tries * 37 % 251);
            while Instant::now() < until {}
        }),
        // A path is unmounted, again and again, with what lies below.
        "unmount" => Box::new(move |tally| {
            tally.count(nix_errno(umount2(&*words[1], MntFlags::MNT_DETACH)));
        }),
        // A file is replaced by a link to something else as soon as it is there, for a moment.
        "replace" => Box::new(move |tally| {
            if std::fs::symlink_metadata(&words[1]).is_ok_and(|file| file.is_file())
                && std::fs::remove_file(&words[1]).is_ok()
            {
                tally.count(symlink(&words[2], &words[1]).map_err(|_| Errno::EXIST));
                std::thread::sleep(Duration::from_micros(20));
                let _ = std::fs::remove_file(&words[1]);
            }
        }),
        // A node under its temporary name is replaced by a link to something else, and so is whatever stands there.
        "ambush" => Box::new(move |tally| {
            for entry in std::fs::read_dir(&words[1]).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(".qm-hotplug.")
                    && std::fs::remove_file(entry.path()).is_ok()
                {
                    tally.count(symlink(&words[2], entry.path()).map_err(|_| Errno::EXIST));
                }
            }
        }),
        other => panic!("an actor knows no {other}"),
    }
}

fn io_errno(result: std::io::Result<()>) -> String {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0).to_string()
}

fn nix_errno(result: nix::Result<()>) -> Result<(), Errno> {
    result.map_err(|errno| Errno::from_raw_os_error(errno as i32))
}

fn errno(result: Result<(), Errno>) -> String {
    result.err().map_or(0, Errno::raw_os_error).to_string()
}

fn try_open(how: &str, path: &str) -> Result<(), Errno> {
    let access = match how {
        "r" => OFlags::RDONLY,
        "w" => OFlags::WRONLY,
        _ => OFlags::RDWR,
    };
    open(path, access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).map(drop)
}

fn try_mknod(kind: &str, major: u32, minor: u32, path: &str) -> Result<(), Errno> {
    let kind = if kind.starts_with(Kind::Block.letter()) { FileType::BlockDevice } else { FileType::CharacterDevice };
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), makedev(major, minor))?;
    unlinkat(CWD, path, AtFlags::empty())
}

/// In a user namespace, with a `/dev` of its own on a file system of its own.
fn enter_mapped_root(root: &Path) {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).unwrap();
    for answer in ["without maps", "mapped"] {
        std::io::stdin().read_line(&mut String::new()).unwrap();
        println!("{answer}");
    }
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).unwrap();
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).unwrap();
    // What was mounted before is locked in a new user namespace (mount_namespaces(7)): its root is a copy.
    mount(Some(root), root, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>).unwrap();
    enter_root(root);
    mount(Some("none"), "/dev", Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).unwrap();
}

fn enter_root(root: &Path) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    std::env::set_current_dir(root).unwrap();
    // Both on one directory: the old root then lies over the new one until it is taken away (pivot_root(2)).
    rustix::process::pivot_root(".", ".").unwrap();
    umount2(".", MntFlags::MNT_DETACH).unwrap();
    std::env::set_current_dir("/").unwrap();
}
