//! The part of the QEMU Machine Protocol that plugging devices needs: commands, and waiting for one event.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

/// A QMP session on which the capabilities have been negotiated.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl Qmp {
    /// Reads the greeting and leaves the negotiation mode.
    ///
    /// # Errors
    /// When qemu does not answer within half a minute, or not as the protocol says.
    pub(crate) fn open(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut session = Self { reader: BufReader::new(stream), events: Vec::new() };
        session.read()?;
        session.execute("qmp_capabilities", json!({}))?;
        Ok(session)
    }

    /// Runs a command and gives its `return` value.
    ///
    /// # Errors
    /// With qemu's own description when it refuses the command.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.reader.get_mut().write_all(request.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {}", error["desc"])));
            }
            match answer.get_mut("return") {
                Some(value) => return Ok(value.take()),
                None => self.events.push(answer),
            }
        }
    }

    /// Waits until the device `id` is really gone; only then its id and its chardev are free again.
    ///
    /// # Errors
    /// When the event does not come within half a minute.
    pub(crate) fn wait_deleted(&mut self, id: &str) -> io::Result<()> {
        let deleted = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id;
        loop {
            if let Some(position) = self.events.iter().position(deleted) {
                self.events.remove(position);
                return Ok(());
            }
            let event = self.read()?;
            self.events.push(event);
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
