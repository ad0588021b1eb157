//! The other end of the agent's socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::core::protocol::{INTERFACE, Reply, Request, frame};
use crate::error::{Error, Result};
use crate::ops::RUN_DIRECTORY;

/// Longer than the agent may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Path of the agent's socket.
pub fn socket_path() -> PathBuf {
    PathBuf::from(RUN_DIRECTORY).join(INTERFACE)
}

/// Asks the agent; `None` if none runs.
pub fn call<T: DeserializeOwned>(request: &Request) -> Result<Option<T>> {
    let path = socket_path();
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(Error::Unfit(
                "talking to the agent and changing containers needs root: run it with sudo".into(),
            ));
        }
        Err(error) => return Err(Error::host(format!("connect to the agent at {}", path.display()))(error)),
    };
    let talk = || Error::host::<io::Error>(format!("talk to the agent at {}", path.display()));
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
    let unreadable = |error: serde_json::Error| Error::BadFile {
        path: path.clone(),
        reason: format!("the agent's answer: {error}"),
    };
    let reply: Reply = serde_json::from_slice(&message).map_err(unreadable)?;
    if reply.error.is_some() {
        let message = reply.parameters.get("message").and_then(Value::as_str).unwrap_or("the agent gave no reason");
        let code = reply.parameters.get("code").and_then(Value::as_u64).unwrap_or(1);
        return Err(Error::Remote { message: message.to_owned(), code: code as u8 });
    }
    serde_json::from_value(reply.parameters).map(Some).map_err(unreadable)
}
