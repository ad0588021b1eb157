//! A process that stays the same one: pid, start time and pidfd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::core::device::{Kind, Number};
use crate::sys::user_namespace::UserNamespace;

/// A process, held by a pidfd, so that its number cannot come to mean another one unnoticed.
#[derive(Debug, Clone)]
pub struct Process {
    /// In the host's process namespace.
    pub pid: u32,
    /// Clock ticks after boot, field 22 of proc_pid_stat(5).
    pub start_time: u64,
    /// The parent's pid when this was opened.
    pub parent: u32,
    fd: Arc<OwnedFd>,
}

/// Who a process is when it opens a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its file system uid, in the host's numbers.
    pub uid: u32,
    /// Its file system gid.
    pub gid: u32,
    /// Its other groups.
    pub groups: Vec<u32>,
    /// Which of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are in effect, as a bit set: they pass over permission bits.
    pub capabilities: u64,
    /// Where it has a user namespace of its own: these capabilities are over files alone whose owner it knows.
    pub namespace: Option<UserNamespace>,
}

impl Process {
    /// Opens the process with this number. `None` if there is none, or if it has ended and was not reaped yet.
    pub fn open(pid: u32) -> Option<Process> {
        let fd = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        let stat = procfs::process::Process::new(pid as i32).and_then(|process| process.stat()).ok()?;
        let process = Process { pid, start_time: stat.starttime, parent: stat.ppid as u32, fd: Arc::new(fd) };
        (!process.has_exited() && !matches!(stat.state, 'Z' | 'X')).then_some(process)
    }

    /// Opens it if it is still the one that started at `start_time`.
    pub fn open_same(pid: u32, start_time: u64) -> Option<Process> {
        Process::open(pid).filter(|process| process.start_time == start_time)
    }

    /// Whether it has ended.
    pub fn has_exited(&self) -> bool {
        has_exited(self.fd.as_fd())
    }

    /// Who it is when it opens a file.
    pub fn user(&self) -> procfs::ProcResult<User> {
        let namespace = UserNamespace::of(self.pid)?;
        /// CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (linux/capability.h).
        const OVER_PERMISSIONS: u64 = 1 << 1 | 1 << 2;
        let status = procfs::process::Process::new(self.pid as i32)?.status()?;
        let groups = status.groups.into_iter().collect();
        Ok(User {
            uid: status.fuid,
            gid: status.fgid,
            groups,
            capabilities: status.capeff & OVER_PERMISSIONS,
            namespace,
        })
    }

    /// What a security module calls it: an SELinux context, an AppArmor profile. `None` without such a module.
    pub fn security_label(&self) -> Option<String> {
        let text = std::fs::read_to_string(format!("/proc/{}/attr/current", self.pid)).ok()?;
        let label = text.trim_matches(['\0', '\n', ' ']);
        (!label.is_empty()).then(|| label.to_owned())
    }

    /// Path below the cgroup2 root, and below the root of the cgroup v1 `devices` hierarchy where there is one.
    pub fn cgroups(&self) -> procfs::ProcResult<(String, Option<String>)> {
        let all = procfs::process::Process::new(self.pid as i32)?.cgroups()?;
        let of =
            |test: &dyn Fn(&procfs::ProcessCGroup) -> bool| all.0.iter().find(|c| test(c)).map(|c| c.pathname.clone());
        let unified = of(&|c| c.hierarchy == 0).unwrap_or_else(|| "/".into());
        Ok((unified, of(&|c| c.controllers.iter().any(|name| name == "devices"))))
    }

    /// What tells its mount namespace from others: device and inode of `/proc/PID/ns/mnt`.
    pub fn mount_namespace(&self) -> std::io::Result<(u64, u64)> {
        mount_namespace(&self.pid.to_string())
    }

    /// Whether it runs in the mount namespace of this process or of process 1, that is: not in a container.
    pub fn shares_host_mounts(&self) -> std::io::Result<bool> {
        if self.pid == 1 {
            return Ok(true);
        }
        let its = self.mount_namespace()?;
        // Process 1 may be out of our sight (a hardened host); our own namespace is always readable.
        Ok(["self", "1"].into_iter().filter_map(|pid| mount_namespace(pid).ok()).any(|ours| ours == its))
    }

    /// Whether its root directory is ours.
    pub fn has_hosts_root(&self) -> std::io::Result<bool> {
        // Without synchronisation: the file system may be of the container's making.
        let root = |path: &str| {
            let stat = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS)?;
            Ok::<_, rustix::io::Errno>((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
        };
        Ok(root(&format!("/proc/{}/root", self.pid))? == root("/")?)
    }

    /// Whether it runs the same program file as the process with that number, as it does between fork(2) and execve(2).
    pub fn runs_the_program_of(&self, pid: u32) -> bool {
        // Without synchronisation: the file may be in a file system of the container's making.
        let program = |pid: u32| {
            let path = format!("/proc/{pid}/exe");
            let stat = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS).ok()?;
            Some((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
        };
        program(self.pid).is_some_and(|its| program(pid) == Some(its))
    }

    /// The name of its program file.
    pub fn program(&self) -> Option<String> {
        let path = std::fs::read_link(format!("/proc/{}/exe", self.pid)).ok()?;
        Some(path.file_name()?.to_str()?.to_owned())
    }

    /// The user whom it belongs to.
    pub fn owner(&self) -> std::io::Result<u32> {
        Ok(rustix::fs::stat(format!("/proc/{}", self.pid))?.st_uid)
    }

    /// Whether it has a user namespace other than ours.
    pub fn has_own_user_namespace(&self) -> std::io::Result<bool> {
        let of = |pid: &str| rustix::fs::stat(format!("/proc/{pid}/ns/user")).map(|s| s.st_ino);
        Ok(of(&self.pid.to_string())? != of("self")?)
    }
}

/// The user who we are outside of our user namespace (user_namespaces(7)); the hook of a rootless engine is in one.
pub fn outer_user() -> u32 {
    let own = rustix::process::geteuid().as_raw();
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let outer = map.lines().find_map(|line| {
        let mut fields = line.split_whitespace().map(|field| field.parse::<u32>().unwrap_or(0));
        let (inside, outside, count) = (fields.next()?, fields.next()?, fields.next()?);
        (own >= inside && own - inside < count).then(|| outside.saturating_add(own - inside))
    });
    outer.unwrap_or(own)
}

/// Root's processes of that name, those of containers left out. The kernel keeps 15 bytes of it (TASK_COMM_LEN).
pub fn running(name: &str) -> Vec<u32> {
    let name = &name.as_bytes()[..name.len().min(15)];
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_it = |pid: &u32| std::fs::read(format!("/proc/{pid}/comm")).is_ok_and(|text| text.trim_ascii_end() == name);
    // Without root's rights nobody's namespaces are seen, and all count.
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = namespace("self");
    let is_hosts = |pid: &u32| {
        let is_roots = std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|its| its.uid() == 0);
        is_roots && namespace(&pid.to_string()).is_none_or(|its| Some(its) == own)
    };
    pids.filter(is_it).filter(is_hosts).collect()
}

/// Whether the process behind a pidfd has ended.
pub(crate) fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).map_or(true, |ready| ready > 0)
}

/// Whether the process that started then is gone. What cannot be looked at (too many open files, say) is not gone.
pub fn is_gone(pid: u32, start_time: u64) -> bool {
    match Pid::from_raw(pid as i32).map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
        None | Some(Err(rustix::io::Errno::SRCH)) => true,
        Some(Err(_)) => false,
        Some(Ok(fd)) => {
            let stat = procfs::process::Process::new(pid as i32).and_then(|process| process.stat());
            has_exited(fd.as_fd()) || stat.is_ok_and(|stat| stat.starttime != start_time)
        }
    }
}

/// The processes in the mount namespace of this one.
pub fn sharing_mounts(pid: u32) -> Vec<u32> {
    let Ok(its) = mount_namespace(&pid.to_string()) else { return Vec::new() };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| mount_namespace(&pid.to_string()).is_ok_and(|other| other == its)).collect()
}

/// Those of these processes that have the device open, as `PID (NAME)`.
pub fn holders_of(pids: &[u32], number: Number) -> Vec<String> {
    let has_open = |pid: &&u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.into_iter().any(|file| {
            // Without synchronisation, so that no file system of the container's making is asked.
            let stat = statx(CWD, file.path(), AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS);
            stat.is_ok_and(|stat| {
                let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
                    FileType::CharacterDevice => Kind::Char,
                    FileType::BlockDevice => Kind::Block,
                    _ => return false,
                };
                number == Number { kind, major: stat.stx_rdev_major, minor: stat.stx_rdev_minor }
            })
        })
    };
    let name = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.iter().filter(has_open).map(|pid| format!("{pid} ({})", name(pid).trim())).collect()
}

fn mount_namespace(pid: &str) -> std::io::Result<(u64, u64)> {
    Ok(rustix::fs::stat(format!("/proc/{pid}/ns/mnt")).map(|stat| (stat.st_dev, stat.st_ino))?)
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
