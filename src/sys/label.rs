//! Labels of SELinux: what a container may read has the label of its files.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, XattrFlags, fgetxattr, fsetxattr, lsetxattr, openat};

const ATTRIBUTE: &str = "security.selinux";

/// Whether SELinux is on: its file system is mounted then.
pub fn is_on() -> bool {
    rustix::fs::stat("/sys/fs/selinux/enforce").is_ok()
}

/// The label of a directory.
pub fn of(directory: impl AsFd) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(directory, ".", flags, Mode::empty())?;
    let mut label = vec![0; 4096];
    let length = fgetxattr(directory, ATTRIBUTE, &mut label)?;
    label.truncate(length);
    String::from_utf8(label).map(|label| label.trim_end_matches('\0').to_owned()).map_err(io::Error::other)
}

/// Gives a file or a directory that label.
pub fn set(file: &OwnedFd, label: &str) -> io::Result<()> {
    Ok(fsetxattr(file, ATTRIBUTE, format!("{label}\0").as_bytes(), XattrFlags::empty())?)
}

/// Gives that label to what is at a path, which may be a device node: to open one would be to use the device.
pub fn set_at(path: &Path, label: &str) -> io::Result<()> {
    Ok(lsetxattr(path, ATTRIBUTE, format!("{label}\0").as_bytes(), XattrFlags::empty())?)
}
