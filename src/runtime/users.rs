//! Containers of ordinary users: `/run/user/UID/crun/ID` and `/run/user/UID/runc/ID`.
//!
//! All below `/run/user/UID` is the user's, who may put there whatever he likes at any moment: links, FIFOs, file systems
//! that never answer, files and directories without end. Nothing of it is followed or waited for, and all is bounded.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::core::container::Container;
use crate::runtime::{conmon, crun, runc};
use crate::sys::ownership;
use crate::sys::process::Process;
use crate::sys::user::Account;

/// Where the runtime directories of users are (pam_systemd(8)).
pub const USERS: &str = "/run/user";
/// The runtimes, as their directories are called there.
pub const RUNTIMES: [&str; 2] = ["crun", "runc"];
/// How many containers of a user are looked at.
pub const MOST: usize = 256;
/// How many bytes of a user's state are read at a time. A container has ten to a hundred KiB.
const BYTES: u64 = 32 << 20;
/// How long one file may be.
const LONGEST: u64 = 1 << 20;

/// What runs for a user.
#[derive(Debug, Default)]
pub struct Listing {
    /// Containers in namespaces of his.
    pub containers: Vec<Container>,
    /// Whether there is more than is looked at.
    pub is_cut: bool,
}

/// The ordinary users who have a runtime directory.
pub fn uids() -> Vec<u32> {
    let entries = std::fs::read_dir(USERS).into_iter().flatten().flatten();
    entries.filter_map(|entry| uid_of(entry.file_name().to_str()?)).collect()
}

/// The user whose runtime directory has that name.
pub fn uid_of(name: &str) -> Option<u32> {
    name.parse().ok().filter(|uid: &u32| *uid != 0 && uid.to_string() == name)
}

/// All running containers of the user. State that cannot be read or believed is passed over with a debug line.
pub fn containers(uid: u32) -> Listing {
    let (mut listing, mut left) = (Listing::default(), BYTES);
    let Ok(Some(home)) = Home::open(uid) else { return listing };
    let account = Account::of(uid);
    // One process is one container, however often it is told of.
    let (mut ids_seen, mut processes) = (0, BTreeSet::new());
    for runtime in RUNTIMES {
        let Ok(Some((directory, ids))) = home.list(runtime) else { continue };
        for id in ids {
            if ids_seen == MOST || left == 0 {
                listing.is_cut = true;
                return listing;
            }
            ids_seen += 1;
            let is_new = |pid| processes.insert(pid);
            match load(&home, directory.as_fd(), &id, &account, &mut left, is_new) {
                Ok(container) => listing.containers.extend(container),
                Err(reason) => tracing::debug!("state in {USERS}/{uid}/{runtime}/{id:?} passed over: {reason}"),
            }
        }
    }
    listing
}

/// A container of his that runs, if its process is new.
fn load(
    home: &Home,
    directory: BorrowedFd<'_>,
    id: &str,
    account: &Account,
    left: &mut u64,
    is_new: impl FnOnce(u32) -> bool,
) -> Result<Option<Container>, String> {
    let failed = |error: io::Error| error.to_string();
    let Some(place) = home.directory(directory, id).map_err(failed)? else { return Ok(None) };
    let mut file = |name: &str| home.read(place.as_fd(), name, left).map_err(|error| format!("{name}: {error}"));
    let container = match file("state.json")? {
        Some(state) => runc::parse(&state)?,
        None => match (file("status")?, file("config.json")?) {
            (Some(status), Some(spec)) => crun::parse(id, &status, &spec)?,
            // It is coming or going.
            _ => return Ok(None),
        },
    };
    let Some(init) = Process::open_same(container.pid, container.start_time) else { return Ok(None) };
    if let Some(reason) = ownership::refusal(&init, home.uid).map_err(failed)? {
        return Err(reason);
    }
    if !is_new(container.pid) {
        return Ok(None);
    }
    // Two directories are two containers, whatever is written in them.
    let name = conmon::name_of(&init, id);
    let container = Container { id: id.to_owned(), name, ..container };
    Ok(container.of_user(home.uid, account.name.as_deref()))
}

/// The runtime directory of a user.
pub struct Home {
    uid: u32,
    fd: OwnedFd,
}

impl Home {
    /// `None` where there is none, or one that is not the user's own: it may be about to be mounted.
    pub fn open(uid: u32) -> io::Result<Option<Home>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let users = rustix::fs::open(USERS, flags, Mode::empty())?;
        let Some(fd) = open(users.as_fd(), &uid.to_string(), flags, ResolveFlags::empty())? else { return Ok(None) };
        // He may mount over it what is his own (fusermount3(1)): nothing is asked of that, not even who owns it.
        if !answers(users.as_fd(), fd.as_fd())? {
            return Err(io::Error::other(format!("{USERS}/{uid} is no tmpfs")));
        }
        Ok((fstat(&fd)?.st_uid == uid).then_some(Home { uid, fd }))
    }

    /// Opens the directory of a runtime, `None` where there is none of his.
    pub fn runtime(&self, name: &str) -> io::Result<Option<OwnedFd>> {
        self.directory(self.fd.as_fd(), name)
    }

    /// The directory of a runtime, and the first names in it that can be a container's.
    pub fn list(&self, runtime: &str) -> io::Result<Option<(OwnedFd, Vec<String>)>> {
        let Some(directory) = self.runtime(runtime)? else { return Ok(None) };
        let mut names = Vec::new();
        // As many again may be what is no container's.
        for entry in Dir::read_from(&directory)?.take(2 * MOST) {
            let entry = entry?;
            if let Ok(name) = entry.file_name().to_str()
                && !name.starts_with('.')
            {
                names.push(name.to_owned());
            }
        }
        names.truncate(MOST + 1);
        Ok(Some((directory, names)))
    }

    /// Opens a directory of his in another one of his.
    pub fn directory(&self, parent: BorrowedFd<'_>, name: &str) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(parent, name, flags, ResolveFlags::NO_XDEV)?;
        match directory.as_ref().map(fstat).transpose()? {
            Some(stat) if stat.st_uid != self.uid => Err(io::Error::other("it is not the user's")),
            _ => Ok(directory),
        }
    }

    /// Reads a regular file of his, `None` where there is none. As much is taken from what may be read yet.
    fn read(&self, directory: BorrowedFd<'_>, name: &str, left: &mut u64) -> io::Result<Option<String>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let Some(fd) = open(directory, name, flags, ResolveFlags::NO_XDEV)? else { return Ok(None) };
        let stat = fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_uid != self.uid {
            return Err(io::Error::other("it is no regular file of the user's"));
        }
        let longest = LONGEST.min(*left);
        let mut text = String::new();
        let length = File::from(fd).take(longest + 1).read_to_string(&mut text);
        *left -= (text.len() as u64).min(*left);
        if length? as u64 > longest {
            return Err(io::Error::other("it is too long"));
        }
        Ok(Some(text))
    }
}

impl AsFd for Home {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens one name in a directory, no link. `None` where there is nothing.
fn open(parent: BorrowedFd<'_>, name: &str, flags: OFlags, more: ResolveFlags) -> io::Result<Option<OwnedFd>> {
    if name.is_empty() || name.contains('/') || name == ".." {
        return Err(Errno::INVAL.into());
    }
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | more;
    match openat2(parent, name, flags, Mode::empty(), how) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a directory lies where the one above it does, or on a tmpfs: the kernel alone answers for it then.
fn answers(above: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mount = mount_of(fd)?;
    if mount == mount_of(above)? {
        return Ok(true);
    }
    let table = std::fs::read("/proc/self/mountinfo")?;
    let is_tmpfs = |line: &[u8]| {
        let is_it = line.split(|byte| *byte == b' ').next() == Some(mount.as_bytes());
        is_it && line.windows(9).any(|window| window == b" - tmpfs ")
    };
    Ok(table.split(|byte| *byte == b'\n').any(is_tmpfs))
}

/// `mnt_id` of proc_pid_fdinfo(5).
fn mount_of(fd: BorrowedFd<'_>) -> io::Result<String> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let mount = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    mount.map(|mount| mount.trim().to_owned()).ok_or_else(|| io::Error::other("no mnt_id in fdinfo"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_runtime_directories() {
        assert_eq!(uid_of("1000"), Some(1000));
        for name in ["0", "01000", "+1000", "-1", "4294967296", "root", "", "1000@x"] {
            assert_eq!(uid_of(name), None, "{name}");
        }
    }
}
