//! The kernel's own uevents, from netlink.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket};

use crate::core::uevent::{Uevent, parse};

/// Group 1 carries the kernel's messages, group 2 udev's (libudev-monitor).
const KERNEL_GROUP: u32 = 1;
/// Room for tens of thousands of events that wait while we work.
pub const RECEIVE_BUFFER: usize = 64 << 20;
/// A uevent is at most 2 KiB of variables and a header (UEVENT_BUFFER_SIZE, include/linux/kobject.h).
const MESSAGE: usize = 8192;

/// A socket that receives the kernel's uevents.
#[derive(Debug)]
pub struct KernelEvents(OwnedFd);

/// What came of one reading.
#[derive(Debug)]
pub enum Received {
    /// An event of a device with a node.
    Event(Uevent),
    /// A message that does not matter.
    Nothing,
    /// Events were lost: look at everything anew.
    Lost,
    /// No more for now.
    Empty,
}

impl KernelEvents {
    /// Subscribes.
    pub fn listen() -> io::Result<KernelEvents> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
        enlarge_buffer(fd.as_fd());
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(KernelEvents(fd))
    }

    /// Takes the next message. Messages that do not come from the kernel (port 0) are dropped: they are forged.
    pub fn receive(&self) -> io::Result<Received> {
        let mut buffer = [0; MESSAGE];
        match recvfrom::<NetlinkAddr>(self.0.as_raw_fd(), &mut buffer) {
            Ok((length, Some(sender))) if sender.pid() == 0 => {
                Ok(parse(&buffer[..length]).map_or(Received::Nothing, Received::Event))
            }
            Ok(_) | Err(Errno::EINTR) => Ok(Received::Nothing),
            Err(Errno::EAGAIN) => Ok(Received::Empty),
            Err(Errno::ENOBUFS) => Ok(Received::Lost),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for KernelEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Beyond net.core.rmem_max where CAP_NET_ADMIN allows it, up to it elsewhere.
pub fn enlarge_buffer(socket: BorrowedFd<'_>) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
    if set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER).is_err() {
        let _ = set_socket_recv_buffer_size(socket, RECEIVE_BUFFER);
    }
}
