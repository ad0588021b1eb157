//! Messages about devices, sent in a container's network namespace.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, UnixCredentials, sendmsg,
    socket,
};

use crate::sys::process::Process;

/// udev's group of the uevent socket; the kernel's is 1.
const UDEV_GROUP: u32 = 2;
/// `NS_GET_USERNS` (ioctl_ns(2)): the user namespace that a namespace belongs to.
const NS_GET_USERNS: libc::Ioctl = 0xb701;
/// Inode of the initial user namespace (include/linux/proc_ns.h).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// What tells a network namespace from others: device and inode.
pub type NetworkId = (u64, u64);

/// A message.
#[derive(Debug, Clone)]
pub enum Message {
    /// As udevd sends it, to those who listen to udev.
    Udev(Vec<u8>),
    /// As the kernel does. It is sent only where the kernel does not do so itself: to network namespaces that belong to
    /// another user namespace than the first (uevent_net_init, lib/kobject_uevent.c).
    Kernel(Vec<u8>),
    /// The same, also where the kernel has sent its own.
    Again(Vec<u8>),
}

/// The network namespace of a process.
pub fn of(process: &Process) -> io::Result<NetworkId> {
    id_of(&process.pid.to_string())
}

/// Our own: the host's.
pub fn own() -> io::Result<NetworkId> {
    id_of("self")
}

fn id_of(pid: &str) -> io::Result<NetworkId> {
    let stat = std::fs::metadata(format!("/proc/{pid}/ns/net"))?;
    Ok((stat.dev(), stat.ino()))
}

/// Sends messages in the network namespace of a process, if it is that one still, as root of the process's user namespace:
/// libudev takes messages from nobody else.
///
/// A thread of its own joins the namespace and ends after that. Nobody who listens there can make it wait.
pub fn send(process: &Process, network: NetworkId, messages: Vec<Message>) -> io::Result<()> {
    let pidfd = process.as_fd().try_clone_to_owned()?;
    // Where it has no root, libudev takes messages from nobody.
    let (Some(uid), Some(gid)) = (root_of(process.pid, "uid_map"), root_of(process.pid, "gid_map")) else {
        return Ok(());
    };
    let root = (uid, gid);
    let work = move || {
        setns(&pidfd, CloneFlags::CLONE_NEWNET)?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let stat = namespace.metadata()?;
        if (stat.dev(), stat.ino()) != network {
            return Ok(());
        }
        send_here(&messages, root, &namespace)
    };
    let thread = std::thread::Builder::new().name("network".into()).spawn(work)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that sends panicked")))
}

fn send_here(messages: &[Message], (uid, gid): (u32, u32), namespace: &File) -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkKObjectUEvent)?;
    // Whom a message is from is written into it, which CAP_SETUID and CAP_SETGID allow (cred(7), unix(7)).
    let credentials = UnixCredentials::from(libc::ucred { pid: std::process::id() as i32, uid, gid });
    let is_kernels_own = std::cell::LazyCell::new(|| belongs_to_the_first(namespace));
    for message in messages {
        let (bytes, to) = match message {
            Message::Udev(bytes) => (bytes.clone(), NetlinkAddr::new(0, UDEV_GROUP)),
            Message::Kernel(_) if *is_kernels_own => continue,
            // To the kernel, which spreads it in this namespace (uevent_net_rcv_skb, lib/kobject_uevent.c).
            Message::Kernel(bytes) | Message::Again(bytes) => (with_header(bytes), NetlinkAddr::new(0, 0)),
        };
        let parts = [io::IoSlice::new(&bytes)];
        match sendmsg(
            socket.as_raw_fd(),
            &parts,
            &[ControlMessage::ScmCredentials(&credentials)],
            MsgFlags::empty(),
            Some(&to),
        ) {
            // Nobody listens.
            Ok(_) | Err(nix::errno::Errno::ECONNREFUSED) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// `struct nlmsghdr` before the text: length, type (above those that control a connection), flags (a request: the kernel
/// reads nothing else, netlink_rcv_skb), sequence, port.
fn with_header(text: &[u8]) -> Vec<u8> {
    const HEADER: usize = 16;
    const TYPE: u16 = 16;
    const REQUEST: u16 = 1;
    let mut bytes = ((HEADER + text.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(TYPE.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(text);
    bytes
}

fn belongs_to_the_first(namespace: &File) -> bool {
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return true;
    }
    // SAFETY: it was just returned, and nobody else has it.
    let owner = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    owner.metadata().map_or(true, |stat| stat.ino() == INITIAL_USER_NAMESPACE)
}

/// Whom id 0 in the user namespace of a process stands for here.
pub(crate) fn root_of(pid: u32, map: &str) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{map}")).unwrap_or_default();
    let lines = text.lines().map(|line| line.split_whitespace().map(|number| number.parse::<u32>()));
    let mut roots = lines.filter_map(|mut numbers| match (numbers.next()?.ok()?, numbers.next()?.ok()?) {
        (0, outside) => Some(outside),
        _ => None,
    });
    roots.next()
}
