//! The log file of containers/qm's hooks, in their format, because their users look there.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::core::text::printable;
use crate::sys::clock::local_time;

/// Lines `2026-11-21 09:30:00 - NAME - LEVEL - message`, kept until [`Log::write`] appends them at once: the lines of
/// hooks that run side by side do not mix.
#[derive(Debug)]
pub struct Log {
    name: &'static str,
    path: PathBuf,
    lines: String,
}

impl Log {
    /// For the hook of that name, into that file.
    pub fn new(name: &'static str, path: &Path) -> Log {
        Log { name, path: path.to_owned(), lines: String::new() }
    }

    /// What was done.
    pub fn info(&mut self, message: &str) {
        self.line("INFO", message);
    }

    /// What was not done though it was asked for.
    pub fn warning(&mut self, message: &str) {
        self.line("WARNING", message);
    }

    /// Why the hook fails.
    pub fn error(&mut self, message: &str) {
        self.line("ERROR", message);
    }

    fn line(&mut self, level: &str, message: &str) {
        self.lines += &format!("{} - {} - {level} - {}\n", local_time(), self.name, printable(message));
    }

    /// Appends the lines to the file. Where that fails the journal has the same; a container does not wait for it.
    pub fn write(&self) {
        if let Err(error) = self.append() {
            tracing::warn!("cannot write to {}: {error}", self.path.display());
        }
    }

    fn append(&self) -> io::Result<()> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let mut file = File::options().append(true).create(true).mode(0o644).custom_flags(flags).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        file.write_all(self.lines.as_bytes())
    }
}
