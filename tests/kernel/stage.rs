//! What tests are played on: cgroups with device programs of their own, a file system for nodes, and containers made of
//! both. All of it is taken away when dropped, also while a failed test unwinds.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use qm_hotplug::core::device::{Kind, Number};
use qm_hotplug::core::filter_program::{self, Insn};
use qm_hotplug::core::ledger::Node;
use qm_hotplug::error::Result;
use qm_hotplug::sys::bpf::{Program, attached};
use qm_hotplug::sys::cgroup::{Cgroup, CgroupRoot};
use qm_hotplug::sys::device_filter::DeviceFilter;
use qm_hotplug::sys::host::Host;
use qm_hotplug::sys::namespace::inside;
use qm_hotplug::sys::node::{self, Made, NodeError};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::actor::Actor;

pub const fn char_device(major: u32, minor: u32) -> Number {
    Number { kind: Kind::Char, major, minor }
}

pub const fn block_device(major: u32, minor: u32) -> Number {
    Number { kind: Kind::Block, major, minor }
}

/// `/dev/null`, `/dev/zero`, `/dev/full`: to open them has no effect.
pub const NULL: Number = char_device(1, 3);
pub const ZERO: Number = char_device(1, 5);
pub const FULL: Number = char_device(1, 7);
/// No driver can have this major: who passes the filter gets ENXIO.
pub const ABSENT: Number = char_device(4000, 77);

/// The filter of a host.
pub struct Stage {
    pub root: CgroupRoot,
    pub filter: DeviceFilter,
    pub nodes: Nodes,
}

impl Stage {
    pub fn new() -> Stage {
        let root = CgroupRoot::find().unwrap();
        let filter = DeviceFilter::open(&root).unwrap();
        Stage { root, filter, nodes: Nodes::new() }
    }

    /// A cgroup that denies every device, with the grant's mark, and an actor in it.
    pub fn denied(&self, name: &str) -> (TestCgroup, Actor) {
        let cgroup = TestCgroup::new(name);
        cgroup.attach(&deny_all());
        self.filter.mark(&cgroup.open()).unwrap();
        let actor = cgroup.actor();
        (cgroup, actor)
    }
}

/// A cgroup of a test's own.
pub struct TestCgroup {
    /// Below the root.
    pub path: String,
    directory: PathBuf,
}

impl TestCgroup {
    /// One right below the root.
    pub fn new(name: &str) -> TestCgroup {
        TestCgroup::make(format!("/qm-hotplug-test-{}-{name}", std::process::id()))
    }

    pub fn child(&self, name: &str) -> TestCgroup {
        TestCgroup::make(format!("{}/{name}", self.path))
    }

    fn make(path: String) -> TestCgroup {
        let directory = CgroupRoot::find().unwrap().path.join(path.trim_start_matches('/'));
        fs::create_dir(&directory).unwrap();
        TestCgroup { path, directory }
    }

    pub fn open(&self) -> Cgroup {
        CgroupRoot::find().unwrap().open(&self.path).unwrap()
    }

    pub fn directory(&self) -> PathBuf {
        self.directory.clone()
    }

    pub fn id(&self) -> u64 {
        self.open().id
    }

    pub fn put(&self, pid: u32) {
        fs::write(self.directory.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// A new actor in it.
    pub fn actor(&self) -> Actor {
        let actor = Actor::start(None);
        self.put(actor.pid());
        actor
    }

    pub fn attach(&self, program: &Program) {
        program.attach(self.open().as_fd()).unwrap();
    }

    pub fn detach(&self, program: &Program) {
        program.detach(self.open().as_fd()).unwrap();
    }

    /// Ids and names of its device programs, in the order in which they run.
    pub fn programs(&self) -> Vec<(u32, String)> {
        programs(self.open().as_fd())
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let until = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.directory).is_err_and(|error| error.kind() != io::ErrorKind::NotFound) {
            if Instant::now() > until {
                eprintln!("cgroup {} cannot be removed", self.path);
                return;
            }
            let _ = fs::write(self.directory.join("cgroup.kill"), "1");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Cgroups one below the other. They go from the deepest up.
pub struct Chain(pub Vec<TestCgroup>);

impl Drop for Chain {
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
    }
}

/// Ids and names of the device programs attached to a cgroup.
pub fn programs(cgroup: BorrowedFd<'_>) -> Vec<(u32, String)> {
    let programs = attached(cgroup).unwrap();
    programs.iter().map(|program| program.info().unwrap()).map(|info| (info.id, info.name)).collect()
}

/// A program as a runtime attaches it, that refuses everything.
pub fn deny_all() -> Program {
    Program::load("runtime", &constant(0)).unwrap()
}

/// A program that allows everything.
pub fn allow_all() -> Program {
    Program::load("runtime", &filter_program::allow()).unwrap()
}

/// A program that allows this device alone.
pub fn allow_only(number: Number) -> Program {
    Program::load("runtime", &verdict(number, 1, 0)).unwrap()
}

/// A program that refuses this device alone.
pub fn refuse_only(name: &str, number: Number) -> Program {
    Program::load(name, &verdict(number, 0, 1)).unwrap()
}

const fn load_u32(dst: u8, off: i16) -> Insn {
    Insn::new(0x61, dst, 1, off, 0)
}

const fn set(dst: u8, imm: i32) -> Insn {
    Insn::new(0xb7, dst, 0, 0, imm)
}

/// A 32-bit jump if not equal.
const fn unless(dst: u8, imm: i32, off: i16) -> Insn {
    Insn::new(0x56, dst, 0, off, imm)
}

const EXIT: Insn = Insn::new(0x95, 0, 0, 0, 0);

fn constant(verdict: i32) -> Vec<Insn> {
    vec![set(0, verdict), EXIT]
}

/// `struct bpf_cgroup_dev_ctx`: access and kind at 0, major at 4, minor at 8.
fn verdict(number: Number, of_it: i32, of_others: i32) -> Vec<Insn> {
    let and_kind = Insn::new(0x54, 2, 0, 0, 0xffff);
    vec![
        set(0, of_others),
        load_u32(2, 0),
        and_kind,
        unless(2, number.kind.bpf_code() as i32, 5),
        load_u32(2, 4),
        unless(2, number.major as i32, 3),
        load_u32(2, 8),
        unless(2, number.minor as i32, 1),
        set(0, of_it),
        EXIT,
    ]
}

/// A file system on which device nodes can be opened, at a directory of its own.
pub struct Nodes {
    place: tempfile::TempDir,
}

impl Nodes {
    pub fn new() -> Nodes {
        let place = tempfile::Builder::new().prefix("qm-hotplug-kernel-").tempdir().unwrap();
        mount_tmpfs(place.path(), MsFlags::empty());
        Nodes { place }
    }

    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// A node for this device.
    pub fn node(&self, number: Number) -> PathBuf {
        let path = self.path().join(format!("{}{}-{}", number.kind.letter(), number.major, number.minor));
        if !path.exists() {
            make_node(&path, number);
        }
        path
    }

    /// A name that is free.
    pub fn free(&self) -> PathBuf {
        self.path().join("free")
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // What was mounted below it goes along.
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

pub fn make_node(path: &Path, number: Number) {
    let kind = if number.kind == Kind::Block { FileType::BlockDevice } else { FileType::CharacterDevice };
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), makedev(number.major, number.minor)).unwrap();
}

pub fn mount_tmpfs(at: &Path, flags: MsFlags) {
    fs::create_dir_all(at).unwrap();
    mount(Some("none"), at, Some("tmpfs"), flags, Some("mode=0755")).unwrap();
}

pub fn bind(from: &str, to: &Path) {
    fs::create_dir_all(to).unwrap();
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

/// What stands for a container: an actor in a cgroup that denies every device, in a mount namespace with a root and a
/// `/dev` of its own.
pub struct Container {
    pub actor: Actor,
    pub cgroup: TestCgroup,
    root: Nodes,
}

impl Container {
    pub fn new() -> Container {
        Container::prepared(|_| {})
    }

    /// With more in its root directory than an empty `/dev` on a tmpfs.
    pub fn prepared(prepare: impl FnOnce(&Path)) -> Container {
        let root = Nodes::new();
        mount_tmpfs(&root.path().join("dev"), MsFlags::empty());
        prepare(root.path());
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let cgroup = TestCgroup::new(&format!("container{}", COUNTER.fetch_add(1, Ordering::Relaxed)));
        cgroup.attach(&deny_all());
        let actor = Actor::start(Some(root.path()));
        cgroup.put(actor.pid());
        Container { actor, cgroup, root }
    }

    /// Where the host sees a path of the container.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    /// How the command line names it.
    pub fn name(&self) -> String {
        format!("pid:{}", self.actor.pid())
    }

    /// [`node::make`] inside.
    pub fn make(&self, number: Number, wanted: &Node, replace: bool) -> Result<Made, NodeError> {
        let host = Host::observe().unwrap();
        let wanted = wanted.clone();
        inside("test", &self.actor.process(), host, move |inside| node::make(inside, number, &wanted, replace)).unwrap()
    }

    /// [`node::remove`] inside.
    pub fn remove(&self, number: Number, path: &str, directories: &[String]) -> Result<bool, NodeError> {
        let host = Host::observe().unwrap();
        let (path, directories) = (path.to_owned(), directories.to_vec());
        inside("test", &self.actor.process(), host, move |inside| {
            node::remove(inside, number, &Node::at(&path), &directories)
        })
        .unwrap()
    }

    /// The device whose node is at that path.
    pub fn number_at(&self, path: &str) -> Option<Number> {
        node::number_of(&rustix::fs::lstat(self.path(path)).ok()?)
    }

    /// Everything in its root directory, to compare before and after.
    pub fn snapshot(&self) -> Vec<String> {
        snapshot(self.root.path())
    }
}

/// A wish for a node, owned by root with mode 0660.
pub fn wish(path: &str) -> Node {
    Node { mode: 0o660, ..Node::at(path) }
}

/// One line a file: path, inode, mode, owner, device, change time, and where a link leads. Directories have no times, so
/// that what comes and goes again leaves the same picture. Other file systems of the kernel are not gone into.
pub fn snapshot(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut lines = Vec::new();
    let mut entries: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let Ok(stat) = fs::symlink_metadata(&path) else { continue };
        let changed = if stat.is_dir() { 0 } else { stat.ctime_nsec() };
        let target = fs::read_link(&path).unwrap_or_default();
        let (ino, mode, uid, gid, rdev) = (stat.ino(), stat.mode(), stat.uid(), stat.gid(), stat.rdev());
        lines.push(format!("{} {ino} {mode:o} {uid}:{gid} {rdev:x} {changed} {}", path.display(), target.display()));
        let is_kernels = rustix::fs::statfs(&path).is_ok_and(|fs| fs.f_type as u64 == 0x9fa0);
        if stat.is_dir() && !is_kernels {
            lines.extend(snapshot(&path));
        }
    }
    lines
}
