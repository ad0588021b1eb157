//! What runtimes do with bpf(2) and this program does not, and what refuses it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use qm_hotplug::sys::bpf::Program;

const PROG_ATTACH: u32 = 8;
const PROG_GET_FD_BY_ID: u32 = 13;

/// Puts one attached program into the place of another, as `crun update` does (`BPF_F_REPLACE`).
pub fn replace(cgroup: BorrowedFd<'_>, old: &Program, new: &Program) -> io::Result<()> {
    const CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI_REPLACE: u32 = 2 | 4;
    let (old, new) = (fd_of(old)?, fd_of(new)?);
    let (cgroup, old, new) = (cgroup.as_raw_fd() as u32, old.as_raw_fd() as u32, new.as_raw_fd() as u32);
    bpf(PROG_ATTACH, &[cgroup, new, CGROUP_DEVICE, ALLOW_MULTI_REPLACE, old]).map(drop)
}

fn fd_of(program: &Program) -> io::Result<OwnedFd> {
    let fd = bpf(PROG_GET_FD_BY_ID, &[program.info()?.id])?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// With an attribute that starts with these numbers. For commands without pointers.
fn bpf(command: u32, start: &[u32]) -> io::Result<i64> {
    let mut attribute = [0u32; 48];
    attribute[..start.len()].copy_from_slice(start);
    // SAFETY: the attribute is as long as we say, and holds no pointers.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_mut_ptr(), size_of_val(&attribute)) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// From now on bpf(2) fails with `errno` in this process and its children: every command, or this one. For `pre_exec`.
pub fn refuse_bpf(command: Option<u32>, errno: i32) -> io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // Offsets in struct seccomp_data: nr 0, args[0] 16. Any command is equal to itself.
    let mut filter = [
        step(LOAD, 0, 0, 0),
        step(IF_EQUAL, 0, 3, libc::SYS_bpf as u32),
        step(LOAD, 0, 0, 16),
        step(IF_EQUAL, 0, if command.is_some() { 1 } else { 0 }, command.unwrap_or_default()),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its length are those of the array above, which outlives the call.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
