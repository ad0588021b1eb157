//! `lxc-device`: the command of that name, lxc-device(1), for containers of any runtime.

use std::ffi::OsString;
use std::path::Path;

use clap::Parser;

use crate::cli::{absolute, change};
use crate::core::destination;
use crate::core::protocol::{Attach, Detach, Grants, OneGrant, Request};
use crate::error::{Error, Result};
use crate::ops::{self, Executor};
use crate::runtime;

/// The name that it is called by.
pub const NAME: &str = "lxc-device";

/// Give a running container a device, or take it back.
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version = concat!(env!("CARGO_PKG_VERSION"), " (qm-hotplug)"),
    override_usage = "lxc-device -n NAME add|del DEV [DEST]",
    after_help = "DEV is a path below /dev; network interfaces are not supported.\nExit codes: 0 done, 1 failed."
)]
pub struct LxcDevice {
    /// Container of any runtime: name, id, ENGINE:NAME or pid:N
    #[arg(short, long, value_name = "NAME")]
    name: Option<String>,
    /// add or del, the device on the host, and the node's path inside [default: the device's]; without -n, the container first
    #[arg(value_name = "add|del DEV [DEST]")]
    words: Vec<String>,
}

impl LxcDevice {
    /// Whether a program of that path is called as this command.
    pub fn is_called(program: &str) -> bool {
        Path::new(program).file_name().is_some_and(|name| name == NAME)
    }

    /// Runs it. As with LXC's own, nothing is said where all is well.
    pub fn run(self) -> Result<()> {
        match self.words()[..] {
            [container, "add", device] => add(container, path(device)?, None),
            [container, "add", device, destination] => add(container, path(device)?, Some(destination)),
            [container, "del", device] => delete(container, path(device)?),
            // Of several nodes of a device, it is that one.
            [container, "del", device, destination] => path(device).and_then(|_| delete(container, destination.into())),
            _ => Err(Error::Usage("give -n NAME and add DEV or del DEV: see lxc-device --help".into())),
        }
    }

    /// The container, and what follows it.
    fn words(&self) -> Vec<&str> {
        self.name.iter().chain(&self.words).map(String::as_str).collect()
    }
}

/// Reads the command line. Help and version are printed, and what is wrong with it; then the exit code is the error, which
/// is 0 or 1 as with LXC's own.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<LxcDevice, u8> {
    LxcDevice::try_parse_from(arguments).map_err(|error| {
        // A terminal that is gone reads no help.
        let _ = error.print();
        u8::from(error.use_stderr())
    })
}

/// The device's path, made absolute. What is neither a path nor a file here is an interface to LXC's own.
fn path(device: &str) -> Result<String> {
    if !device.contains('/') && !Path::new(device).exists() {
        return Err(Error::Usage(format!(
            "'{device}' is no path of a device, and network interfaces are not supported: `ip link set {device} netns PID` moves one"
        )));
    }
    absolute(device)
}

fn add(container: &str, device: String, destination: Option<&str>) -> Result<()> {
    let path = destination.unwrap_or(&device);
    let destination =
        destination::check(path).map_err(|reason| Error::BadDestination { path: path.to_owned(), reason })?;
    let request = Attach {
        container: container.to_owned(),
        device,
        destination: Some(destination),
        access: None,
        mode: None,
        uid: None,
        gid: None,
        persist: None,
    };
    let here = |executor: &mut Executor| {
        ops::request::attach(executor, &runtime::scan(), &request).map(|grant| OneGrant { grant })
    };
    change(&Request::Attach(request.clone()), here).map(drop)
}

fn delete(container: &str, device: String) -> Result<()> {
    let request = Detach { container: container.to_owned(), device };
    let here = |executor: &mut Executor| {
        ops::request::detach(executor, &runtime::scan(), &request, false).map(|grants| Grants { grants })
    };
    change(&Request::Detach(request.clone()), here).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_known_by_its_name() {
        assert!(LxcDevice::is_called("lxc-device") && LxcDevice::is_called("/usr/local/bin/lxc-device"));
        assert!(!LxcDevice::is_called("qm-hotplug") && !LxcDevice::is_called("/lxc-device/x"));
    }

    #[test]
    fn the_container_is_named_in_each_of_its_ways() {
        for line in [
            "-n web add /dev/x",
            "-nweb add /dev/x",
            "--name web add /dev/x",
            "--name=web add /dev/x",
            "--name=web -- add /dev/x",
            "add /dev/x -n web",
            "web add /dev/x",
        ] {
            let parsed = LxcDevice::try_parse_from([NAME].into_iter().chain(line.split(' '))).unwrap();
            assert_eq!(parsed.words(), ["web", "add", "/dev/x"], "{line}");
        }
    }
}
