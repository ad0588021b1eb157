//! What can go wrong, in the words that a person reads, with the exit code that goes with it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::core::device::Number;

/// The result of everything in this crate that can fail in a way a person should read.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure names the container, device or path, what stood in the way, and what to do.
#[derive(Debug, Error)]
pub enum Error {
    /// The command line or a request is malformed.
    #[error("{0}")]
    Usage(String),
    /// The destination is not a path where a node may be made.
    #[error("destination '{path}' {reason}")]
    BadDestination {
        /// As given.
        path: String,
        /// In words, following the path.
        reason: &'static str,
    },
    /// No container answers to this name.
    #[error("no running container '{0}': `qm-hotplug ps` lists those that are found")]
    NoSuchContainer(String),
    /// Several containers share a name, or the beginning of an id.
    #[error("'{name}' is ambiguous: name one of {}", candidates.join(" and "))]
    AmbiguousContainer {
        /// As given.
        name: String,
        /// What can be typed for each.
        candidates: Vec<String>,
    },
    /// The container ended while we were at work.
    #[error("container '{0}' exited meanwhile; nothing is left behind in it")]
    ContainerExited(String),
    /// The device's path does not exist.
    #[error("no device '{0}' on this host: plug it in first, or see `ls -l {parent}`", parent = parent(.0))]
    NoSuchDevice(String),
    /// No device is meant by a selector.
    #[error("no device matches '{0}' on this host: `qm-hotplug devices` lists what there is")]
    NoMatch(String),
    /// A selector means several devices.
    #[error(
        "'{selector}' means {count} devices, {}{}: make it narrower, or give --all",
        candidates.join(" and "),
        if candidates.len() < *count { " and others" } else { "" }
    )]
    AmbiguousDevice {
        /// As given.
        selector: String,
        /// How many it means.
        count: usize,
        /// The first of their nodes, each with what tells it from others.
        candidates: Vec<String>,
    },
    /// No container can ask for a device.
    #[error("no annotation asks for '{device}': {reason}")]
    NoAnnotation {
        /// As given.
        device: String,
        /// In words.
        reason: String,
    },
    /// The path is something else than a device node.
    #[error("'{path}' is {what}, not a device node: give a path such as /dev/ttyUSB0")]
    NotADevice {
        /// As given.
        path: String,
        /// `a directory`, `a regular file`, …
        what: &'static str,
    },
    /// Nothing in the ledger is named by a `detach`.
    #[error("container '{container}' has no grant for '{device}': `qm-hotplug list` shows what is in force")]
    NoSuchGrant {
        /// Name or id.
        container: String,
        /// As given.
        device: String,
    },
    /// What is asked for must not or cannot be done to this container.
    #[error("container '{container}': {reason}")]
    Refused {
        /// Name or id.
        container: String,
        /// In words, with the advice.
        reason: String,
    },
    /// `verify` found a device that cannot be opened.
    #[error("container '{container}': {reason}")]
    Inaccessible {
        /// Name or id.
        container: String,
        /// In words, with the advice.
        reason: String,
        /// The exit code that goes with it.
        code: u8,
    },
    /// A container must not start without a device that it does not get.
    #[error("container '{container}' does not start: {rule}: {reason}")]
    Required {
        /// Name and id.
        container: String,
        /// The annotation.
        rule: String,
        /// In words.
        reason: String,
        /// The exit code: why it does not get it.
        code: u8,
    },
    /// Our own process lacks something.
    #[error("{0}")]
    Unfit(String),
    /// `doctor` found what keeps this host from doing the work; with the topics.
    #[error("this host cannot do the work: see what is said of {0}")]
    Unwell(String),
    /// Something did not answer in time.
    #[error("{0}")]
    TimedOut(String),
    /// The kernel cannot carry the device filter.
    #[error(
        "this kernel ({release}) cannot carry the device filter: {what}: it needs Linux 6.1 with CONFIG_CGROUP_BPF and a process with CAP_SYS_ADMIN or CAP_BPF"
    )]
    NoDeviceFilter {
        /// `uname -r`.
        release: String,
        /// Which step failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A system call on behalf of a container failed.
    #[error("container '{container}': cannot {what}")]
    InContainer {
        /// Name or id.
        container: String,
        /// What was tried, with the path or device concerned.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A system call on the host failed.
    #[error("cannot {what}")]
    Host {
        /// What was tried, with the path concerned.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A file of ours or of a runtime cannot be understood.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// In words.
        reason: String,
    },
    /// A step failed and taking back the steps before it failed too.
    #[error(
        "{}; and undoing it failed: {}: the ledger keeps {device} of container '{container}' as left over, `qm-hotplug detach` tries again",
        first.chain(),
        undo.chain()
    )]
    Undo {
        /// The first failure.
        first: Box<Error>,
        /// What the undo failed on.
        undo: Box<Error>,
        /// Name or id.
        container: String,
        /// The device.
        device: Number,
    },
    /// The agent answered with an error.
    #[error("{message}")]
    Remote {
        /// The agent's words.
        message: String,
        /// The exit code that goes with them.
        code: u8,
    },
}

impl Error {
    /// The documented exit code: 1 failed, 2 usage, 3 no such container, 4 no such device, 5 refused, 6 timed out.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) | Error::BadDestination { .. } => 2,
            Error::NoSuchContainer(_) | Error::AmbiguousContainer { .. } | Error::ContainerExited(_) => 3,
            Error::NoSuchDevice(_)
            | Error::NotADevice { .. }
            | Error::NoMatch(_)
            | Error::AmbiguousDevice { .. }
            | Error::NoSuchGrant { .. } => 4,
            Error::Required { code, .. } => *code,
            Error::Refused { .. } | Error::Unfit(_) | Error::NoAnnotation { .. } => 5,
            Error::NoDeviceFilter { source, .. } => match source.raw_os_error() {
                // What may be otherwise at the next try is no refusal.
                Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::EINTR) => 1,
                _ => 5,
            },
            Error::TimedOut(_) => 6,
            Error::InContainer { .. } | Error::Host { .. } | Error::BadFile { .. } | Error::Unwell(_) => 1,
            Error::Undo { first, .. } => first.exit_code(),
            Error::Remote { code, .. } | Error::Inaccessible { code, .. } => *code,
        }
    }

    /// The message with the causes behind it, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        text
    }

    /// For `map_err` on a host call.
    pub fn host<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
        move |source| Error::Host { what: what.into(), source: source.into() }
    }
}

fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/dev",
        Some(at) => &path[..at],
    }
}
