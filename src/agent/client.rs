//! The other end of the agent's socket.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::core::event::Event;
use crate::core::protocol::{Attach, INTERFACE, Incoming, Monitor, Reply, Request, frame};
use crate::error::{Error, Result};
use crate::ops::RUN_DIRECTORY;

/// Longer than the agent may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

const NO_ENTRY: &str =
    "talking to the agent and changing containers needs root: run it with sudo, or be in the group qm-hotplug";
const NO_OPERATOR: &str = "the agent refuses you that: run it with sudo, or have root write an [[operator]] for you and this container into /etc/qm-hotplug/config.d";
const ROOT_ALONE: &str = "the agent refuses you that, which root alone may do: run it with sudo";

/// Path of the agent's socket.
pub fn socket_path() -> PathBuf {
    PathBuf::from(RUN_DIRECTORY).join(INTERFACE)
}

/// What the agent holds while it runs: at a socket of systemd's, to connect would start one.
fn lock_path() -> PathBuf {
    PathBuf::from(RUN_DIRECTORY).join("agent")
}

/// Says that an agent runs, as long as it is not dropped.
#[derive(Debug)]
pub(super) struct Running {
    _lock: File,
}

impl Running {
    pub(super) fn begin() -> io::Result<Running> {
        let path = lock_path();
        loop {
            let lock = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
            flock(&lock, FlockOperation::LockExclusive)?;
            // An agent that ended meanwhile took its file away, and that one was waited for.
            let held = lock.metadata()?;
            match std::fs::metadata(&path) {
                Ok(now) if (now.dev(), now.ino()) == (held.dev(), held.ino()) => return Ok(Running { _lock: lock }),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(lock_path());
    }
}

/// Whether an agent runs. Who cannot look at that has to call to know, and is told that one does; so is who can do nothing
/// without one, since his call has it started at a socket of systemd's.
pub fn is_there() -> bool {
    match File::open(lock_path()) {
        Ok(file) => flock(&file, FlockOperation::NonBlockingLockShared).is_err(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => !rustix::process::geteuid().is_root(),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    }
}

/// A connection to the agent; `None` if none runs.
fn connect() -> Result<Option<UnixStream>> {
    if !is_there() {
        return Ok(None);
    }
    let path = socket_path();
    match UnixStream::connect(&path) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(Error::Unfit(NO_ENTRY.into())),
        Err(error) => Err(Error::host(format!("connect to the agent at {}", path.display()))(error)),
    }
}

fn talk() -> impl FnOnce(io::Error) -> Error {
    Error::host::<io::Error>(format!("talk to the agent at {}", socket_path().display()))
}

/// Asks the agent; `None` if none runs.
pub fn call<T: DeserializeOwned>(request: &Request) -> Result<Option<T>> {
    let Some(mut stream) = connect()? else { return Ok(None) };
    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.write_all(&frame(request))).map_err(talk())?;
    let mut message = Vec::new();
    let mut buffer = [0; 4096];
    while message.last() != Some(&0) {
        match stream.read(&mut buffer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => {
                Error::TimedOut("the agent does not answer: see `systemctl status qm-hotplug`".into())
            }
            _ => talk()(error),
        })? {
            0 => return Err(talk()(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up"))),
            length => message.extend_from_slice(&buffer[..length]),
        }
    }
    message.pop();
    let denied = match request {
        Request::Attach(Attach { persist: None, .. }) | Request::Detach(_) => NO_OPERATOR,
        _ => ROOT_ALONE,
    };
    parse(&message, denied).map(Some)
}

/// Why no more events are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// No agent runs.
    NoAgent,
    /// It has ended.
    AgentEnded,
    /// Nobody reads any more.
    NobodyReads,
}

/// Asks the agent for events and hands each on, until one cannot be written to `output` or its reader has gone.
pub fn monitor(request: Monitor, output: impl AsFd, mut write: impl FnMut(&Event) -> Result<bool>) -> Result<End> {
    let Some(mut stream) = connect()? else { return Ok(End::NoAgent) };
    stream.write_all(&frame(&Incoming::streamed(Request::Monitor(request)))).map_err(talk())?;
    let (mut pending, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        while let Some(end) = pending.iter().position(|byte| *byte == 0) {
            let message: Vec<u8> = pending.drain(..=end).collect();
            if !write(&parse(&message[..end], ROOT_ALONE)?)? {
                return Ok(End::NobodyReads);
            }
        }
        // That a pipe's reader has gone is told without being asked for.
        let mut ready = [PollFd::new(&stream, PollFlags::IN), PollFd::new(&output, PollFlags::empty())];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(talk()(errno.into())),
        }
        let [has_answer, has_no_reader] = ready.map(|ready| !ready.revents().is_empty());
        if has_no_reader {
            return Ok(End::NobodyReads);
        }
        match if has_answer { stream.read(&mut buffer) } else { continue } {
            Ok(0) => return Ok(End::AgentEnded),
            Ok(length) => pending.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(End::AgentEnded),
            Err(error) => return Err(talk()(error)),
        }
    }
}

/// Reads an answer.
fn parse<T: DeserializeOwned>(message: &[u8], denied: &str) -> Result<T> {
    let unreadable = |error: serde_json::Error| Error::BadFile {
        path: socket_path(),
        reason: format!("the agent's answer: {error}"),
    };
    let reply: Reply = serde_json::from_slice(message).map_err(unreadable)?;
    if let Some(name) = reply.error {
        let said = |field: &str| reply.parameters.get(field);
        let message = match said("message").and_then(Value::as_str) {
            Some(message) => message.to_owned(),
            None if name.ends_with(".PermissionDenied") => return Err(Error::Unfit(denied.into())),
            None => format!("the agent answers {name} {}", reply.parameters),
        };
        let code = said("code").and_then(Value::as_u64).unwrap_or(1);
        return Err(Error::Remote { message, code: code as u8 });
    }
    serde_json::from_value(reply.parameters).map_err(unreadable)
}
