//! bpf(2), as far as device programs need it. Structures are laid out by hand after `union bpf_attr`,
//! `struct bpf_prog_info` and `struct bpf_map_info` of linux/bpf.h.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::core::filter_program::{Insn, assemble};

const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const MAP_GET_NEXT_KEY: i32 = 4;
const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const PROG_GET_FD_BY_ID: i32 = 13;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;

const MAP_TYPE_HASH: u32 = 1;
const MAP_TYPE_PERCPU_ARRAY: u32 = 6;
const MAP_TYPE_RINGBUF: u32 = 27;
const F_NO_PREALLOC: u32 = 1;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_TYPE_CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 2;
const F_REPLACE: u32 = 4;

/// `union bpf_attr`, zeroed and longer than any kernel's: BPF_PROG_QUERY of Linux 6.17 writes past a short one.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Attr([u8; 192]);

impl Attr {
    fn new() -> Attr {
        Attr([0; 192])
    }

    fn u32(mut self, at: usize, value: u32) -> Attr {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, at: usize, value: u64) -> Attr {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Attr {
        self.u32(at, fd.as_raw_fd() as u32)
    }

    fn pointer<T>(self, at: usize, pointer: *const T) -> Attr {
        self.u64(at, pointer as u64)
    }

    /// At most 15 characters, so that the last byte stays zero.
    fn name(mut self, at: usize, name: &str) -> Attr {
        self.0[at..at + name.len().min(15)].copy_from_slice(&name.as_bytes()[..name.len().min(15)]);
        self
    }

    fn get_u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }
}

/// Calls bpf(2); EAGAIN (the verifier was interrupted) is tried again.
///
/// # Safety
/// Every pointer in `attr` must be valid for what `command` reads and writes through it.
unsafe fn bpf(command: i32, attr: &mut Attr) -> io::Result<i64> {
    loop {
        // SAFETY: the caller vouches for the pointers; the attribute itself is as long as we say.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr.0, size_of::<Attr>()) };
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EAGAIN) {
            return Err(error);
        }
    }
}

/// # Safety
/// As [`bpf`]; and `command` must be one that returns a new file descriptor.
unsafe fn bpf_fd(command: i32, attr: &mut Attr) -> io::Result<OwnedFd> {
    // SAFETY: a non-negative result of such a command is a descriptor that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attr)? as i32)) }
}

/// A map with keys and values of fixed sizes.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

impl Map {
    /// A hash map that takes memory for the entries it has, not for those it may have.
    pub fn create_hash(name: &str, key_size: usize, value_size: usize, max_entries: u32) -> io::Result<Map> {
        Map::create(MAP_TYPE_HASH, name, key_size, value_size, max_entries, F_NO_PREALLOC)
    }

    /// An array with one set of values per CPU.
    pub fn create_percpu_array(name: &str, value_size: usize, max_entries: u32) -> io::Result<Map> {
        Map::create(MAP_TYPE_PERCPU_ARRAY, name, 4, value_size, max_entries, 0)
    }

    /// A ring for [`crate::sys::ring::Ring`], of that many bytes: a power of two of pages.
    pub fn create_ring(name: &str, bytes: u32) -> io::Result<Map> {
        Map::create(MAP_TYPE_RINGBUF, name, 0, 0, bytes, 0)
    }

    fn create(kind: u32, name: &str, key_size: usize, value_size: usize, entries: u32, flags: u32) -> io::Result<Map> {
        let mut attr = Attr::new()
            .u32(0, kind)
            .u32(4, key_size as u32)
            .u32(8, value_size as u32)
            .u32(12, entries)
            .u32(16, flags)
            .name(28, name);
        // SAFETY: no pointers.
        let fd = unsafe { bpf_fd(MAP_CREATE, &mut attr)? };
        Ok(Map { fd, key_size, value_size })
    }

    /// Opens an existing map by its id.
    pub fn by_id(id: u32) -> io::Result<(Map, String)> {
        // SAFETY: no pointers.
        let fd = unsafe { bpf_fd(MAP_GET_FD_BY_ID, &mut Attr::new().u32(0, id))? };
        let info = info(fd.as_fd(), Info::new())?;
        let map = Map { fd, key_size: info.u32(8) as usize, value_size: info.u32(12) as usize };
        Ok((map, info.name(24)))
    }

    /// Sizes of key and value in bytes.
    pub fn sizes(&self) -> (usize, usize) {
        (self.key_size, self.value_size)
    }

    /// The kernel's id of it.
    pub fn id(&self) -> io::Result<u32> {
        Ok(info(self.fd.as_fd(), Info::new())?.u32(4))
    }

    /// How many entries it takes.
    pub fn capacity(&self) -> io::Result<u32> {
        Ok(info(self.fd.as_fd(), Info::new())?.u32(16))
    }

    /// Inserts or overwrites. E2BIG: the map is full.
    pub fn insert(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!((key.len(), value.len()), (self.key_size, self.value_size), "sizes of this map");
        let mut attr = self.attr().pointer(8, key.as_ptr()).pointer(16, value.as_ptr());
        // SAFETY: key and value are as long as the map's.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut attr).map(drop) }
    }

    /// Deletes; says whether there was an entry.
    pub fn remove(&self, key: &[u8]) -> io::Result<bool> {
        assert_eq!(key.len(), self.key_size, "size of this map's keys");
        // SAFETY: the key is as long as the map's.
        found(unsafe { bpf(MAP_DELETE_ELEM, &mut self.attr().pointer(8, key.as_ptr())) }).map(|entry| entry.is_some())
    }

    /// The value under a key. Not for per-CPU maps, whose values are longer.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        assert_eq!(key.len(), self.key_size, "size of this map's keys");
        let mut value = vec![0; self.value_size];
        let mut attr = self.attr().pointer(8, key.as_ptr()).pointer(16, value.as_mut_ptr());
        // SAFETY: key and value are as long as the map's.
        Ok(found(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) })?.map(|_| value))
    }

    /// All keys. Keys that come or go meanwhile may or may not be among them.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.key_size];
            let last = keys.last().map_or(std::ptr::null(), |key| key.as_ptr());
            let mut attr = self.attr().pointer(8, last).pointer(16, next.as_mut_ptr());
            // SAFETY: both keys are as long as the map's; a null key means "the first".
            match found(unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) })? {
                Some(_) => keys.push(next),
                None => return Ok(keys),
            }
        }
    }

    fn attr(&self) -> Attr {
        Attr::new().fd(0, self.fd.as_fd())
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Map {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// ENOENT as `None`.
fn found(result: io::Result<i64>) -> io::Result<Option<i64>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A loaded device program.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
}

/// What the kernel tells of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    /// The kernel's id of it.
    pub id: u32,
    /// Its name, at most 15 characters.
    pub name: String,
    /// Ids of the maps it uses.
    pub map_ids: Vec<u32>,
}

impl Program {
    /// Loads a device program. When the verifier refuses, the last line of its log is in the error.
    pub fn load(name: &str, program: &[Insn]) -> io::Result<Program> {
        Program::load_bytes(name, &assemble(program))
    }

    pub(super) fn load_bytes(name: &str, bytes: &[u8]) -> io::Result<Program> {
        // Not GPL-only: no helper that we call asks for it.
        let license = c"Dual MIT/GPL";
        let attr = Attr::new()
            .u32(0, PROG_TYPE_CGROUP_DEVICE)
            .u32(4, (bytes.len() / 8) as u32)
            .pointer(8, bytes.as_ptr())
            .pointer(16, license.as_ptr())
            .name(48, name)
            .u32(68, ATTACH_TYPE_CGROUP_DEVICE);
        // SAFETY: instructions and licence live until the call returns.
        let error = match unsafe { bpf_fd(PROG_LOAD, &mut attr.clone()) } {
            Ok(fd) => return Ok(Program { fd }),
            Err(error) => error,
        };
        let mut log = vec![0u8; 64 * 1024];
        let mut attr = attr.u32(24, 1).u32(28, log.len() as u32).pointer(32, log.as_mut_ptr());
        // SAFETY: as above, and the log is as long as we say.
        let _ = unsafe { bpf_fd(PROG_LOAD, &mut attr) };
        let text = String::from_utf8_lossy(&log);
        let mut lines =
            text.trim_end_matches('\0').lines().filter(|line| !line.is_empty() && !line.starts_with("processed "));
        match lines.next_back() {
            Some(line) => Err(io::Error::new(error.kind(), format!("{error}: verifier: {line}"))),
            None => Err(error),
        }
    }

    /// Opens an existing program by its id.
    pub fn by_id(id: u32) -> io::Result<Program> {
        // SAFETY: no pointers.
        Ok(Program { fd: unsafe { bpf_fd(PROG_GET_FD_BY_ID, &mut Attr::new().u32(0, id))? } })
    }

    /// Its instructions. Only of programs without maps: the kernel does not tell which.
    pub(super) fn instructions(&self) -> io::Result<Vec<u8>> {
        let first = info(self.fd.as_fd(), Info::new())?;
        if first.u32(52) != 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the program uses maps"));
        }
        let mut bytes = vec![0u8; first.u32(20) as usize];
        let ask = Info::new().u32_at(20, bytes.len() as u32).u64_at(32, bytes.as_mut_ptr() as u64);
        info(self.fd.as_fd(), ask)?;
        Ok(bytes)
    }

    /// Id, name and maps.
    pub fn info(&self) -> io::Result<ProgramInfo> {
        let first = info(self.fd.as_fd(), Info::new())?;
        let mut map_ids = vec![0u32; first.u32(52) as usize];
        if !map_ids.is_empty() {
            let ask = Info::new().u32_at(52, map_ids.len() as u32).u64_at(56, map_ids.as_mut_ptr() as u64);
            info(self.fd.as_fd(), ask)?;
        }
        Ok(ProgramInfo { id: first.u32(4), name: first.name(64), map_ids })
    }

    /// Attaches it to a cgroup's directory, after those that are there. It stays when this process ends.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = self.attachment(cgroup).u32(12, F_ALLOW_MULTI);
        // SAFETY: no pointers.
        unsafe { bpf(PROG_ATTACH, &mut attr).map(drop) }
    }

    /// Attaches it in the place of another one, in one step: never a moment with both or with neither.
    pub fn replace(&self, cgroup: BorrowedFd<'_>, old: &Program) -> io::Result<()> {
        let mut attr = self.attachment(cgroup).u32(12, F_ALLOW_MULTI | F_REPLACE).fd(16, old.fd.as_fd());
        // SAFETY: no pointers.
        unsafe { bpf(PROG_ATTACH, &mut attr).map(drop) }
    }

    /// Detaches it from a cgroup's directory.
    pub fn detach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: no pointers.
        unsafe { bpf(PROG_DETACH, &mut self.attachment(cgroup)).map(drop) }
    }

    fn attachment(&self, cgroup: BorrowedFd<'_>) -> Attr {
        Attr::new().fd(0, cgroup).fd(4, self.fd.as_fd()).u32(8, ATTACH_TYPE_CGROUP_DEVICE)
    }
}

/// The attached programs whose names start so, with their names, in the order in which they run.
pub fn attached_as(cgroup: BorrowedFd<'_>, prefix: &str) -> io::Result<Vec<(Program, String)>> {
    let mut found = Vec::new();
    for program in attached(cgroup)? {
        let name = program.info()?.name;
        if name.starts_with(prefix) {
            found.push((program, name));
        }
    }
    Ok(found)
}

/// The device programs attached to this very cgroup, in the order in which they run.
pub fn attached(cgroup: BorrowedFd<'_>) -> io::Result<Vec<Program>> {
    // The kernel takes 64 programs a cgroup at most (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0u32; 64];
    let mut attr = Attr::new()
        .fd(0, cgroup)
        .u32(4, ATTACH_TYPE_CGROUP_DEVICE)
        .pointer(16, ids.as_mut_ptr())
        .u32(24, ids.len() as u32);
    // SAFETY: the array is as long as we say.
    unsafe { bpf(PROG_QUERY, &mut attr)? };
    let count = (attr.get_u32(24) as usize).min(ids.len());
    let mut programs = Vec::with_capacity(count);
    for id in &ids[..count] {
        match Program::by_id(*id) {
            Ok(program) => programs.push(program),
            // Detached and freed between the two calls.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(programs)
}

/// `struct bpf_prog_info` or `struct bpf_map_info`, longer than any kernel's.
#[repr(C, align(8))]
struct Info([u8; 256]);

impl Info {
    fn new() -> Info {
        Info([0; 256])
    }

    fn u32_at(mut self, at: usize, value: u32) -> Info {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64_at(mut self, at: usize, value: u64) -> Info {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    fn name(&self, at: usize) -> String {
        let bytes = &self.0[at..at + 16];
        String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
    }
}

fn info(fd: BorrowedFd<'_>, mut info: Info) -> io::Result<Info> {
    let mut attr = Attr::new().fd(0, fd).u32(4, size_of::<Info>() as u32).pointer(8, &raw mut info.0);
    // SAFETY: the buffer is as long as we say, and pointers within it were set by callers that keep them alive.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr)? };
    Ok(info)
}
