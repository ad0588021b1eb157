//! Who may open a file: our reading of mode and access control list against the kernel's own answer.

#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::unistd::{ForkResult, fork};
use qm_hotplug::core::permission::User;
use qm_hotplug::sys::permission::look;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags, chmod, chown, lsetxattr, mknodat};

pub(crate) const TESTS: &[(&str, fn())] = &[("permission::we_read_a_file_as_the_kernel_does", as_the_kernel_does)];

/// Ids that nobody has; users and groups are drawn from a few, so that they meet often.
const IDS: u32 = 61_000;
const HOW_MANY: u32 = 4;
const FILES: usize = 1500;
/// Reading 4, writing 2, searching 1, and all unions of them.
const WANTED: std::ops::Range<u32> = 1..8;

/// Numbers that look random and are the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as u32 % limit
    }

    fn id(&mut self) -> u32 {
        IDS + self.below(HOW_MANY)
    }
}

/// A list that the kernel takes: in its order, each id once, with a mask where there is an entry for an id.
fn list(random: &mut Random) -> Vec<u8> {
    let mut entries = vec![(1u16, random.below(8), u32::MAX)];
    let ids = |tag, entries: &mut Vec<_>, random: &mut Random| {
        let all = (0..HOW_MANY).filter(|_| random.below(2) == 0).collect::<Vec<_>>();
        all.into_iter().for_each(|id| entries.push((tag, random.below(8), IDS + id)));
    };
    ids(2, &mut entries, random);
    entries.push((4, random.below(8), u32::MAX));
    ids(8, &mut entries, random);
    if entries.len() > 2 || random.below(2) == 0 {
        let mask = if random.below(4) == 0 { 0 } else { random.below(8) };
        entries.push((16, mask, u32::MAX));
    }
    entries.push((32, random.below(8), u32::MAX));
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, bits, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend((bits as u16).to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn make(directory: &Path, at: usize, random: &mut Random) -> String {
    let path = directory.join(at.to_string()).to_str().unwrap().to_owned();
    match at % 2 {
        0 => mknodat(CWD, &*path, FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap(),
        _ => std::fs::write(&path, "").unwrap(),
    }
    chown(&*path, Some(Uid::from_raw(random.id())), Some(Gid::from_raw(random.id()))).unwrap();
    chmod(&*path, Mode::from_raw_mode(random.below(0o1000))).unwrap();
    if random.below(4) > 0 {
        lsetxattr(&*path, "system.posix_acl_access", &list(random), XattrFlags::empty()).unwrap();
    }
    path
}

/// What the kernel lets the user do with each file, a byte each: bit N for what is wanted as N.
fn answers(user: &User, paths: &[String]) -> Vec<u8> {
    let (mut ours, mut its) = UnixStream::pair().unwrap();
    // SAFETY: the child uses nothing that another thread may have locked but the allocator, which glibc makes usable.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // SAFETY: these calls concern the child alone; the groups live until the call returns.
            let is_user = unsafe {
                libc::setgroups(user.groups.len(), user.groups.as_ptr()) == 0
                    && libc::setresgid(user.groups[0], user.groups[0], user.groups[0]) == 0
                    && libc::setresuid(user.uid, user.uid, user.uid) == 0
            };
            let may = |path: &str, wanted| {
                let wanted = rustix::fs::Access::from_bits_retain(wanted);
                u8::from(rustix::fs::accessat(CWD, path, wanted, AtFlags::EACCESS).is_ok())
            };
            let all = |path: &String| WANTED.map(|wanted| may(path, wanted) << wanted).sum();
            let bytes: Vec<u8> = paths.iter().map(all).collect();
            let told = is_user && its.write_all(&bytes).is_ok();
            // SAFETY: _exit(2) has no conditions.
            unsafe { libc::_exit(i32::from(!told)) }
        }
        ForkResult::Parent { child } => {
            drop(its);
            let mut bytes = Vec::new();
            ours.read_to_end(&mut bytes).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(bytes.len(), paths.len(), "an answer for each");
            bytes
        }
    }
}

fn as_the_kernel_does() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let directory = tempfile::tempdir().unwrap();
    chmod(directory.path(), Mode::from_raw_mode(0o755)).unwrap();
    let paths: Vec<String> = (0..FILES).map(|at| make(directory.path(), at, &mut random)).collect();
    let files: Vec<_> = paths.iter().map(|path| look(path).unwrap().1).collect();
    let (mut with_list, mut allowed) = (0, 0);
    for _ in 0..24 {
        let count = 1 + random.below(4);
        let user = User { uid: random.id(), groups: (0..count).map(|_| random.id()).collect() };
        for ((answer, file), path) in answers(&user, &paths).into_iter().zip(&files).zip(&paths) {
            for wanted in WANTED {
                let kernels = answer >> wanted & 1 == 1;
                assert_eq!(file.allows(&user, wanted), kernels, "{wanted} of {path}: {file:?} for {user:?}");
                allowed += usize::from(kernels);
            }
            with_list += usize::from(file.acl.is_some());
        }
    }
    assert!(with_list > 10_000 && allowed > 10_000, "lists: {with_list}, allowed: {allowed}");
}
