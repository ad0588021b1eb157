//! A socket that systemd has made and hands over (sd_listen_fds(3)).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketType};

/// The listening socket that this process was started with, if it was. It is taken once.
pub fn socket() -> io::Result<Option<OwnedFd>> {
    let Some(number) = sd_notify::listen_fds()?.next() else { return Ok(None) };
    // SAFETY: systemd says that this descriptor is ours, and this is asked once, at the agent's start.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let is_ours = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
        && sockopt::socket_type(&socket)? == SocketType::STREAM
        && sockopt::socket_acceptconn(&socket)?;
    match is_ours {
        true => Ok(Some(socket)),
        false => Err(io::Error::other("what systemd handed over is no listening stream socket: see ListenStream=")),
    }
}

/// Hangs up on all who wait at that socket; for a process that ends without having taken it.
pub fn turn_away() {
    if let Ok(Some(socket)) = socket() {
        let listener = UnixListener::from(socket);
        let _ = listener.set_nonblocking(true);
        while listener.accept().is_ok() {}
    }
}
