//! The files of nodes that lie in containers with a user namespace. A container can bind its node elsewhere and then unmount
//! or cover it, or keep it in a mount namespace that nobody finds any more. By the file that is held here, where no container
//! comes to, it is made useless all the same.
//!
//! ```text
//! /run/qm-hotplug/nodes/PID.START/%2Fdev%2FttyUSB0    of the container whose init that is; where the node lies in it
//! ```

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid, chmod, chownat, lstat};
use rustix::io::Errno;

use crate::core::device::Number;
use crate::core::page::escaped;
use crate::failpoint::reached;
use crate::sys::label;
use crate::sys::mount;
use crate::sys::node::{make_at, number_of};

const DIRECTORY: &str = "/run/qm-hotplug/nodes";

/// NAME_MAX (linux/limits.h).
const LONGEST: usize = 255;

/// The files for one run of a container, which its init tells from others.
#[derive(Debug, Clone)]
pub struct Held {
    directory: PathBuf,
}

impl Held {
    /// By the process id of its init, and when that started.
    pub fn of(pid: u32, start_time: u64) -> Held {
        Held { directory: Path::new(DIRECTORY).join(format!("{pid}.{start_time}")) }
    }

    /// The file of the node at that path inside.
    pub fn file(&self, path: &str) -> PathBuf {
        self.directory.join(escaped(path))
    }

    /// Whether there can be a file for that path.
    pub(super) fn can_hold(path: &str) -> bool {
        escaped(path).len() <= LONGEST
    }

    /// Makes the file, in the place of one that is left, and returns a mount of it that is nowhere yet. The calling thread
    /// must be on the host: before Linux 6.15 open_tree(2) clones only what is mounted in the caller's namespace. Where
    /// SELinux is on, it is given the `label`.
    pub(super) fn make(
        &self,
        path: &str,
        number: Number,
        owner: (u32, u32),
        mode: u32,
        label: Option<&str>,
    ) -> io::Result<OwnedFd> {
        let file = self.file(path);
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        end(&file)?;
        make_at(CWD, &file, number, 0)?;
        reached("node: its file is made");
        if let Some(label) = label.filter(|_| label::is_on()) {
            label::set_at(&file, label)?;
        }
        // Not by mknod(2): it minds the umask. The owner last: only he may do the others.
        chmod(&file, Mode::from_raw_mode(mode))?;
        chownat(CWD, &file, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)), AtFlags::SYMLINK_NOFOLLOW)?;
        // /run is mounted nodev.
        let set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
        mount::clone(&file, set, libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_RDONLY)
    }

    /// Device and inode of the file of a node, if there is one.
    pub(super) fn id(&self, path: &str) -> Option<(u64, u64)> {
        lstat(self.file(path)).ok().map(|stat| (stat.st_dev, stat.st_ino))
    }

    /// Makes the node of this device useless, wherever it is mounted, and forgets it. Says whether there was one.
    pub fn end(&self, path: &str, number: Number) -> io::Result<bool> {
        let file = self.file(path);
        match lstat(&file) {
            Ok(stat) if number_of(&stat) == Some(number) => end(&file)?,
            // There is none where it has not come so far, or where the container has no user namespace.
            Ok(_) | Err(Errno::NOENT | Errno::NAMETOOLONG) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        leave_nothing(&self.directory);
        Ok(true)
    }
}

/// The device that all files are on.
pub(super) fn device() -> Option<u64> {
    // The directory itself goes with the last file.
    fs::metadata(Path::new(DIRECTORY).parent()?).ok().map(|found| found.dev())
}

/// Does the same with all files that are not to be kept.
pub fn sweep(is_kept: impl Fn(&Path) -> bool) -> io::Result<()> {
    let mut result = Ok(());
    for directory in listed(Path::new(DIRECTORY)) {
        let others = listed(&directory).into_iter().filter(|file| !is_kept(file));
        result = others.map(|file| end(&file)).fold(result, io::Result::and);
        leave_nothing(&directory);
    }
    result
}

fn listed(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Where it is mounted, it opens for nobody any more.
fn end(file: &Path) -> io::Result<()> {
    // The owner first: until it is the host's root, that of the container could give the mode back.
    match chownat(CWD, file, Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        result => result?,
    }
    chmod(file, Mode::empty())?;
    reached("node: made useless");
    fs::remove_file(file)?;
    reached("node: its file is removed");
    Ok(())
}

/// Only what is empty goes.
fn leave_nothing(directory: &Path) {
    if fs::remove_dir(directory).is_ok() {
        let _ = fs::remove_dir(DIRECTORY);
    }
}
