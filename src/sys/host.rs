//! What this process and this host must be like for the work to be possible.

use crate::error::{Error, Result};
use crate::sys::caps;

/// Inodes of the initial namespaces (include/linux/proc_ns.h).
const INITIAL: [(&str, u64, &str); 3] = [
    ("user", 0xEFFF_FFFD, "user namespace"),
    ("pid", 0xEFFF_FFFC, "process namespace"),
    ("cgroup", 0xEFFF_FFFB, "cgroup namespace"),
];

/// Facts about the host that decide where nodes may be made.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Device number of the file system that is the host's `/dev`.
    pub dev_fs: u64,
    /// Device number and inode of the host's `/run`.
    pub run: (u64, u64),
    /// Device number and inode of the host's root directory.
    pub root: (u64, u64),
}

impl Host {
    /// Reads them.
    pub fn observe() -> Result<Host> {
        let stat = |path: &str| rustix::fs::stat(path).map_err(Error::host(format!("stat {path}")));
        let (root, run) = (stat("/")?, stat("/run")?);
        Ok(Host { dev_fs: stat("/dev")?.st_dev, run: (run.st_dev, run.st_ino), root: (root.st_dev, root.st_ino) })
    }
}

/// Whether this process is in no user namespace but the first.
pub fn is_initial_user_namespace() -> bool {
    rustix::fs::stat("/proc/self/ns/user").is_ok_and(|stat| stat.st_ino == INITIAL[0].1)
}

/// Checks that this process may do the work at all: root's capabilities, and outside of any container.
pub fn require_fitness() -> Result<()> {
    caps::require()?;
    for (name, initial, what) in INITIAL {
        let path = format!("/proc/self/ns/{name}");
        // A kernel without that kind of namespace has only the initial one.
        if rustix::fs::stat(&path).is_ok_and(|stat| stat.st_ino != initial) {
            return Err(Error::Unfit(format!(
                "this process is in a {what} of its own, as in a container: run on the host itself, outside of containers"
            )));
        }
    }
    Ok(())
}
