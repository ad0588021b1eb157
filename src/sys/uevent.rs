//! Uevents from netlink: the kernel's own, and what udevd sends after its rules ran.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};

/// Room for tens of thousands of events that wait while we work.
const RECEIVE_BUFFER: usize = 64 << 20;
/// The kernel's are at most 2 KiB of variables and a header (UEVENT_BUFFER_SIZE, include/linux/kobject.h); udevd's have
/// all properties of a device, which the default of net.core.wmem_max keeps below this.
const MESSAGE: usize = 256 << 10;

/// A socket that receives uevents of one group.
#[derive(Debug)]
pub struct Uevents {
    socket: OwnedFd,
    is_kernels: bool,
    buffer: Box<[u8]>,
}

/// What came of one reading.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A message, to be parsed.
    Message(&'a [u8]),
    /// One that does not matter.
    Nothing,
    /// Messages were lost: look at everything anew.
    Lost,
    /// No more for now.
    Empty,
}

impl Uevents {
    /// Subscribes to the kernel's (group 1). Only the kernel can send them: what comes from elsewhere is dropped.
    pub fn of_kernel() -> io::Result<Uevents> {
        Uevents::listen(1)
    }

    /// Subscribes to udev's (group 2), sent after the rules ran, so that permissions, links and properties are final.
    /// Whoever has CAP_NET_ADMIN in this network namespace can send some, too, a container on the host's network for
    /// one: they tell where to look, and nothing else.
    pub fn of_udev() -> io::Result<Uevents> {
        Uevents::listen(2)
    }

    fn listen(group: u32) -> io::Result<Uevents> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        // Beyond net.core.rmem_max where CAP_NET_ADMIN allows it, up to it elsewhere.
        if set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
            let _ = set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER);
        }
        bind(&socket, &SocketAddrNetlink::new(0, group))?;
        Ok(Uevents { socket, is_kernels: group == 1, buffer: vec![0; MESSAGE].into() })
    }

    /// Takes the next message.
    pub fn receive(&mut self) -> io::Result<Received<'_>> {
        let (length, sender) = match recvfrom(&self.socket, &mut *self.buffer, RecvFlags::TRUNC) {
            Ok((_, length, sender)) => (length, sender),
            Err(Errno::INTR) => return Ok(Received::Nothing),
            Err(Errno::AGAIN) => return Ok(Received::Empty),
            Err(Errno::NOBUFS) => return Ok(Received::Lost),
            Err(errno) => return Err(errno.into()),
        };
        let port = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok()).map(|sender| sender.pid());
        if self.is_kernels && port != Some(0) {
            return Ok(Received::Nothing);
        }
        // A longer one takes privileges to send that udevd does not use (SO_SNDBUFFORCE).
        Ok(self.buffer.get(..length).map_or(Received::Nothing, Received::Message))
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
