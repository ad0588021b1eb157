//! cgroup v2: where its root is mounted, and which cgroup is a container's own.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fstat, fstatfs, open};

use crate::core::filter_program::MAX_LEVELS;
use crate::error::{Error, Result};

/// The root of the cgroup2 hierarchy.
#[derive(Debug)]
pub struct CgroupRoot {
    /// Where it is mounted, `/sys/fs/cgroup` or `/sys/fs/cgroup/unified`.
    pub path: PathBuf,
    fd: OwnedFd,
}

/// One cgroup.
#[derive(Debug)]
pub struct Cgroup {
    /// Below the root, with a leading slash.
    pub path: String,
    /// The 64-bit id that `bpf_get_current_cgroup_id` returns: the inode of its directory (kernfs, 64-bit kernels).
    pub id: u64,
    /// Distance from the root: `/a` has level 1.
    pub level: u32,
    fd: OwnedFd,
}

/// How many cgroups are gone into: a container may make many.
const MOST_CGROUPS: usize = 10_000;

impl CgroupRoot {
    /// Finds the mount of the real root in `/proc/self/mountinfo`. In a container or a cgroup namespace there is none,
    /// and a program attached to what looks like the root would run before the runtimes' programs, not after them.
    pub fn find() -> Result<CgroupRoot> {
        let mounts = fs::read("/proc/self/mountinfo").map_err(Error::host("read /proc/self/mountinfo"))?;
        let mut seen = None;
        // The last mount on a path is the visible one.
        for path in mounts.split(|byte| *byte == b'\n').rev().filter_map(mount_of_cgroup2) {
            let Ok(fd) = open_directory(&path) else { continue };
            let id = fstat(&fd).map_err(Error::host(format!("stat {}", path.display())))?.st_ino;
            // Another file system may be mounted over it, and its root may have the inode 1 too.
            if !is_cgroup2(&fd) {
                continue;
            }
            if id == 1 && !path.join("cgroup.type").exists() {
                return Ok(CgroupRoot { path, fd });
            }
            seen = Some(path);
        }
        Err(Error::Unfit(match seen {
            Some(path) => format!(
                "{} is not the root of the cgroup2 hierarchy but a part of it: run on the host, outside of containers and cgroup namespaces",
                path.display()
            ),
            None => {
                "no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`".into()
            }
        }))
    }

    /// Opens a cgroup by its path below the root.
    pub fn open(&self, path: &str) -> io::Result<Cgroup> {
        let fd = open_directory(&self.path.join(path.trim_start_matches('/')))?;
        let id = fstat(&fd)?.st_ino;
        let level = path.split('/').filter(|part| !part.is_empty()).count() as u32;
        Ok(Cgroup { path: path.to_owned(), id, level, fd })
    }

    /// The cgroup with that path, or one above it, that is frozen or about to be: whoever joins it stands still.
    pub fn frozen(&self, path: &str) -> Option<String> {
        let says = |path: &str, file: &str, line: &str| {
            let text = fs::read_to_string(self.path.join(path.trim_start_matches('/')).join(file));
            text.is_ok_and(|text| text.lines().any(|its| its == line))
        };
        self.up(path).find(|path| says(path, "cgroup.events", "frozen 1") || says(path, "cgroup.freeze", "1"))
    }

    /// The path, and those above it up to but without the root.
    pub fn up(&self, path: &str) -> impl Iterator<Item = String> + use<> {
        let above = |path: &String| path.rfind('/').map(|end| path[..end].to_owned());
        std::iter::successors(Some(path.trim_end_matches('/').to_owned()), above).filter(|path| !path.is_empty())
    }

    /// Process ids in this very cgroup.
    pub fn processes(&self, path: &str) -> io::Result<Vec<u32>> {
        let list = fs::read_to_string(self.path.join(path.trim_start_matches('/')).join("cgroup.procs"))?;
        Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Process ids in this cgroup and in those below it.
    pub fn processes_below(&self, path: &str) -> Vec<u32> {
        let below = self.walk_from(path);
        below.iter().flat_map(|path| self.processes(path).unwrap_or_default()).collect()
    }

    /// All cgroups below the root, with their paths; those that vanish meanwhile are left out.
    pub fn walk(&self) -> Vec<String> {
        self.walk_from("").split_off(1)
    }

    /// The cgroup itself, then those below it, the outer ones first.
    fn walk_from(&self, path: &str) -> Vec<String> {
        let mut paths = vec![path.to_owned()];
        let mut at = 0;
        while at < paths.len() && at < MOST_CGROUPS {
            let directory = self.path.join(paths[at].trim_start_matches('/'));
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir())
                    && let Ok(name) = entry.file_name().into_string()
                {
                    paths.push(format!("{}/{name}", paths[at]));
                }
            }
            at += 1;
        }
        paths
    }
}

impl AsFd for CgroupRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Cgroup {
    /// Whether the device filter can reach it.
    pub fn is_too_deep(&self) -> bool {
        self.level >= MAX_LEVELS
    }
}

/// The mount point in a line of `/proc/self/mountinfo` (proc(5)), of a cgroup2 file system. Anybody who may mount can have
/// lines of any bytes there.
fn mount_of_cgroup2(line: &[u8]) -> Option<PathBuf> {
    let has_type = |window: &[u8]| window == b" - cgroup2 ";
    line.windows(11).any(has_type).then_some(())?;
    let escaped = line.split(|byte| *byte == b' ').nth(4)?;
    // Spaces and the like are written as a backslash and three octal digits.
    let mut parts = escaped.split(|byte| *byte == b'\\');
    let mut path = parts.next()?.to_vec();
    for part in parts {
        let digits = std::str::from_utf8(part.get(..3)?).ok()?;
        path.push(u8::from_str_radix(digits, 8).ok()?);
        path.extend(&part[3..]);
    }
    Some(PathBuf::from(OsString::from_vec(path)))
}

fn is_cgroup2(fd: &OwnedFd) -> bool {
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    fstatfs(fd).is_ok_and(|stat| stat.f_type as u64 == CGROUP2_SUPER_MAGIC)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The container's own cgroup: of the cgroups that its init is in, the deepest that the runtime's state names. Init
/// itself may sit deeper (systemd inside moves to `init.scope`), and the state's path may have a mount point before it.
/// Without a state the process's own cgroup is taken. `None` where only the root is left.
pub fn own_path(init: &str, state: Option<&str>) -> Option<String> {
    let is_named = |path: &str| state.is_none_or(|state| state.trim_end_matches('/').ends_with(path));
    let mut path = init.trim_end_matches('/');
    while !path.is_empty() {
        if is_named(path) {
            return Some(path.to_owned());
        }
        path = &path[..path.rfind('/')?];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_cgroup2_among_any_others() {
        let of = |line: &[u8]| mount_of_cgroup2(line);
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(of(b"30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"), at("/sys/fs/cgroup"));
        assert_eq!(of(b"31 23 0:26 /a /my\\040own\\134x rw - cgroup2 none rw"), at("/my own\\x"));
        assert_eq!(of(b"32 23 0:27 / /x/\xff rw - tmpfs none rw"), None);
        assert_eq!(of(b"33 23 0:27 / /a\\9 rw - cgroup2 none rw"), None);
        assert_eq!(of(b"34 - cgroup2 "), None);
        assert_eq!(of(b""), None);
    }

    #[test]
    fn the_deepest_cgroup_that_the_state_names() {
        let own = |init: &str, state: &str| own_path(init, Some(state));
        assert_eq!(own("/m.slice/a.scope", "/sys/fs/cgroup/m.slice/a.scope").as_deref(), Some("/m.slice/a.scope"));
        assert_eq!(
            own("/m.slice/a.scope/container", "/m.slice/a.scope/container").as_deref(),
            Some("/m.slice/a.scope/container")
        );
        assert_eq!(own("/m.slice/a.scope/init.scope", "/m.slice/a.scope").as_deref(), Some("/m.slice/a.scope"));
        assert_eq!(own("/", "/m.slice/a.scope"), None);
        assert_eq!(own("/user.slice/x", "/m.slice/a.scope"), None);
        assert_eq!(own("/a/b", ""), None);
        assert_eq!(own_path("/a/b/", None).as_deref(), Some("/a/b"));
        assert_eq!(own_path("/", None), None);
    }
}
