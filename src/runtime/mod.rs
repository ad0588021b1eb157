//! Container runtimes: where each keeps its state, and how to read it. No engine is called.
//!
//! Each adapter is a pure `parse` of the state file and a thin loader; [`scan`] goes through all of them.

pub mod conmon;
pub mod containerd;
pub mod crun;
pub mod docker;
pub mod lxc;
pub mod nspawn;
pub mod places;
pub mod runc;
pub mod storage;
pub mod users;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::core::container::{Container, is_users};
use crate::core::spec;
use crate::runtime::places::{Adapter, Patterns, Place};
use crate::sys::process::Process;

/// What is at a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A container that runs.
    Running(Box<Container>),
    /// A container whose own program has not started, of an engine that gives no sign when it does.
    Starting,
    /// No container, or none that runs.
    Nothing,
}

/// All running containers, in no particular order. State that cannot be read (a container that is just coming or
/// going) is passed over with a debug line.
pub fn scan() -> Vec<Container> {
    let running = |place: Place| match load(&place) {
        Found::Running(container) => Some(*container),
        Found::Starting | Found::Nothing => None,
    };
    let roots = Patterns::of_host().places().into_iter().filter_map(running);
    roots.chain(users::uids().into_iter().flat_map(|uid| users::containers(uid).containers)).collect()
}

/// What is at a place now.
pub fn load(place: &Place) -> Found {
    let read = match place.adapter {
        Adapter::Podman | Adapter::Docker | Adapter::Containerd => load_oci(place),
        Adapter::Lxc => lxc::load(&place.path),
        Adapter::Nspawn => nspawn::load(&place.path),
    };
    let found = read.and_then(|found| match found {
        Found::Running(container) if has_control_characters(&container) => {
            Err(format!("its name {:?} has control characters", container.label()))
        }
        Found::Running(container) if is_users(&container.id) => {
            Err(format!("its id {} is one that only an ordinary user's container has", container.id))
        }
        found => Ok(found),
    });
    found.unwrap_or_else(|reason| {
        tracing::debug!("state in {} passed over: {reason}", place.path.display());
        Found::Nothing
    })
}

/// A directory of crun or runc, whoever called it.
fn load_oci(place: &Place) -> Result<Found, String> {
    let id = file_name(&place.path)?;
    let state_file = place.path.join("state.json");
    let (mut container, state) = if state_file.exists() {
        let state = read(&state_file)?;
        (runc::parse(&state)?, state)
    } else {
        let spec = read(&place.path.join("config.json"))?;
        (crun::parse(id, &read(&place.path.join("status"))?, &spec)?, spec)
    };
    let Some(init) = Process::open_same(container.pid, container.start_time) else { return Ok(Found::Nothing) };
    container.owner = std::fs::metadata(&place.path).map_err(|error| error.to_string())?.uid();
    match place.adapter {
        Adapter::Docker => docker::describe(&mut container, &state),
        Adapter::Containerd => {
            let namespace = place.path.parent().map(file_name).ok_or("it has no namespace")??;
            if namespace == docker::NAMESPACE {
                docker::describe(&mut container, &state);
            } else {
                containerd::describe(&mut container, namespace);
            }
        }
        _ => container.name = conmon::name_of(&init, &container.id),
    }
    Ok(Found::Running(Box::new(container)))
}

/// No engine lets such names be; whoever made one up wants it to look like something else.
fn has_control_characters(container: &Container) -> bool {
    let texts = [Some(&container.id), container.name.as_ref()];
    texts.into_iter().flatten().any(|text| text.chars().any(char::is_control))
}

/// Whether a container of root's Podman has systemd as its program. Its specification tells so also while its init is the
/// runtime still.
pub fn runs_systemd(id: &str) -> bool {
    let of_crun = || read(&Path::new("/run/crun").join(id).join("config.json")).ok();
    let of_runc = || {
        let container = runc::parse(&read(&Path::new("/run/runc").join(id).join("state.json")).ok()?).ok()?;
        read(&Path::new(&container.bundle?).join("config.json")).ok()
    };
    let text = of_crun().or_else(of_runc);
    text.and_then(|text| serde_json::from_str(&text).ok()).is_some_and(|spec| spec::runs_systemd(&spec))
}

fn file_name(path: &Path) -> Result<&str, String> {
    path.file_name().and_then(|name| name.to_str()).ok_or_else(|| "its name is no text".to_owned())
}

/// The `annotations` object of an OCI specification. Values that are no strings are passed over.
fn annotations(spec: &Value) -> BTreeMap<String, String> {
    let pairs = spec.get("annotations").and_then(Value::as_object).into_iter().flatten();
    pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn parse_json<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// How long a file may be: a specification with thousands of devices has one or two MiB.
const LONGEST: u64 = 16 << 20;

/// Reads a file, no link and nothing that makes the reader wait.
fn read(path: &Path) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(format!("{}: no regular file", path.display()));
    }
    let mut text = String::new();
    file.take(LONGEST + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > LONGEST {
        return Err(format!("{}: longer than 16 MiB", path.display()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
