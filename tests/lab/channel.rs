//! The command channel to the agent in the guest (`scripts/lab/guest/usr/local/lib/qmh-lab/agent`, which
//! describes the framing).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// What a command in the guest left behind.
#[derive(Debug)]
pub(crate) struct Output {
    /// Exit status; 128 + N when signal N ended it, 124 when it was killed because its time was up.
    pub(crate) status: i32,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub(crate) stdout: String,
    /// Standard error, likewise.
    pub(crate) stderr: String,
}

impl Output {
    /// Whether the command ended with status 0.
    pub(crate) fn success(&self) -> bool {
        self.status == 0
    }
}

/// One end of the virtio-serial port.
#[derive(Debug)]
pub(crate) struct Channel {
    reader: BufReader<UnixStream>,
}

impl Channel {
    /// Waits until the agent in the guest says that it reads. What is written earlier is lost, so nothing is.
    ///
    /// # Errors
    /// When nothing is heard within `timeout`, or the port closes because the machine ended.
    pub(crate) fn open(stream: UnixStream, timeout: Duration) -> io::Result<Self> {
        let mut channel = Self { reader: BufReader::new(stream) };
        channel.wait_for_hello(timeout)?;
        Ok(channel)
    }

    /// The same after the machine was started anew.
    ///
    /// # Errors
    /// As for [`Channel::open`].
    pub(crate) fn wait_for_hello(&mut self, timeout: Duration) -> io::Result<()> {
        self.reader.get_ref().set_read_timeout(Some(timeout))?;
        match read_line(&mut self.reader)?.as_str() {
            "HELLO" => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Runs a bash script in the guest and waits for its end, at most `timeout` (whole seconds, at least one).
    ///
    /// # Errors
    /// When the guest's agent does not answer, which no later command will repair.
    pub(crate) fn run(&mut self, script: &str, timeout: Duration) -> io::Result<Output> {
        let seconds = timeout.as_secs().max(1);
        // The agent keeps the time; the host only notices when the whole machine hangs.
        let patience = Duration::from_secs(seconds + 60);
        self.reader.get_ref().set_read_timeout(Some(patience))?;
        let mut request = format!("RUN {seconds} {}\n", script.len()).into_bytes();
        request.extend_from_slice(script.as_bytes());
        self.reader.get_mut().write_all(&request)?;

        let header = read_line(&mut self.reader)?;
        let mut fields = header.strip_prefix("DONE ").ok_or_else(|| unexpected(&header))?.split(' ');
        let mut number =
            || fields.next().and_then(|field| field.parse::<u32>().ok()).ok_or_else(|| unexpected(&header));
        let (status, stdout, stderr) = (number()?, number()?, number()?);
        Ok(Output {
            status: i32::try_from(status).map_err(io::Error::other)?,
            stdout: read_text(&mut self.reader, stdout)?,
            stderr: read_text(&mut self.reader, stderr)?,
        })
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

fn read_text(reader: &mut impl Read, length: u32) -> io::Result<String> {
    let mut bytes = vec![0; length as usize];
    reader.read_exact(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn unexpected(text: &str) -> io::Error {
    io::Error::other(format!("unexpected words from the guest's agent: {text:?}"))
}
