//! A cgroup made for a moment, in which a single device program of others is asked for its verdict.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::core::device::Access;
use crate::core::filter_program::{KEPT_APART, keep_apart};
use crate::error::{Error, Result};
use crate::sys::bpf::Program;
use crate::sys::cgroup::{Cgroup, CgroupRoot};
use crate::sys::probe::{Place, Question, ask};

/// What precedes the process id in a scratch cgroup's name.
const PREFIX: &str = "qmhp-probe-";

/// There is one at a time in a process: it is named by the process's id.
static ONE: Mutex<()> = Mutex::new(());

/// A cgroup right below the root, removed when dropped.
pub struct Scratch<'a> {
    root: &'a CgroupRoot,
    cgroup: Cgroup,
    keep_apart: Program,
    _one: MutexGuard<'static, ()>,
}

impl<'a> Scratch<'a> {
    /// Makes it. What a killed process left is removed.
    pub fn new(root: &'a CgroupRoot) -> Result<Scratch<'a>> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        remove_stale(root);
        let path = format!("/{PREFIX}{}", std::process::id());
        let failed = || Error::host::<io::Error>(format!("make the cgroup {path} to ask programs alone"));
        let keep_apart = Program::load("qmhp_apart", &keep_apart()).map_err(failed())?;
        match std::fs::create_dir(directory(root, &path)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed()(error)),
            _ => {}
        }
        match root.open(&path) {
            Ok(cgroup) => Ok(Scratch { root, cgroup, keep_apart, _one: one }),
            Err(error) => {
                let _ = std::fs::remove_dir(directory(root, &path));
                Err(failed()(error))
            }
        }
    }

    /// Whether this program alone refuses that access to the node's device: the kernel runs a copy of it on a process of
    /// ours. What programs at the root say as well does not count. One with maps has no copy (`Unsupported`), and one
    /// that looks at the cgroup of who asks sees this one.
    pub fn refuses(&self, program: &Program, node: BorrowedFd<'_>, access: Access) -> io::Result<bool> {
        let copy = Program::load_bytes("qmhp_copy", &program.instructions()?)?;
        copy.attach(self.cgroup.as_fd())?;
        let answer = self.keep_apart.attach(self.cgroup.as_fd()).and_then(|()| {
            let question = Question {
                label: &self.cgroup.path,
                cgroup: &self.cgroup,
                place: Place::Node(node),
                access,
                user: None,
                open: None,
            };
            let answer = ask(&question).map_err(|error| io::Error::other(error.chain()));
            self.keep_apart.detach(self.cgroup.as_fd()).and(answer)
        });
        copy.detach(self.cgroup.as_fd())?;
        Ok(answer?.filter == Some(KEPT_APART))
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let path = directory(self.root, &self.cgroup.path);
        // A child that has just ended may still be counted.
        for _ in 0..100 {
            match std::fs::remove_dir(&path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => return,
            }
        }
        tracing::warn!("the cgroup {} stays: it is busy", path.display());
    }
}

fn directory(root: &CgroupRoot, path: &str) -> std::path::PathBuf {
    root.path.join(path.trim_start_matches('/'))
}

fn remove_stale(root: &CgroupRoot) {
    for entry in std::fs::read_dir(&root.path).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}
