//! A container's own `/etc/group`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};

/// Longer ones are cut.
const LONGEST: u64 = 1 << 20;

/// The directory of our own descriptors, to be opened before a container's mount namespace is joined.
pub fn own_descriptors() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/proc/self/fd", flags, Mode::empty())?)
}

/// Reads it below a container's root directory. Links are followed, as far as they stay below; what is no regular file
/// is not read.
pub fn read(root: BorrowedFd<'_>, descriptors: BorrowedFd<'_>) -> io::Result<String> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // Looked at before it is opened for reading: opening a device may do something.
    let place = openat2(root, "etc/group", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    if FileType::from_raw_mode(fstat(&place)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no regular file"));
    }
    // That very file: another one may have its name by now.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = openat(descriptors, place.as_raw_fd().to_string(), flags, Mode::empty())?;
    let mut text = Vec::new();
    File::from(file).take(LONGEST).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The same below a path on the host.
pub fn read_below(root: &str) -> io::Result<String> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    read(root.as_fd(), own_descriptors()?.as_fd())
}
