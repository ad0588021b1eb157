//! `qm-hotplug reload`.

use std::io;

use crate::agent::client;
use crate::core::protocol::{Nothing, Request};
use crate::error::{Error, Result};

/// Runs it.
pub(super) fn run() -> Result<()> {
    match client::call(&Request::Reload(Nothing {}))? {
        Some(Nothing {}) => Ok(()),
        None => {
            let error = io::Error::other("no agent is running: it reads the configuration when it starts");
            Err(Error::host("reload")(error))
        }
    }
}
