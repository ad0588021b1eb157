//! Container runtimes: where each keeps its state, and how to read it. No engine is called.
//!
//! Each adapter is a pure `parse` of the state file and a thin loader; [`scan`] goes through all of them.

pub mod conmon;
pub mod crun;
pub mod runc;
pub mod storage;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::core::container::{Container, Runtime};
use crate::sys::process::Process;

/// A runtime's state directory: one directory a container, with a state file in it that is renamed into place.
#[derive(Debug, Clone, Copy)]
pub struct StateDirectory {
    /// Whose state it is.
    pub runtime: Runtime,
    /// Where it is, for root.
    pub path: &'static str,
    /// Name of the state file in a container's directory.
    pub file: &'static str,
}

/// The state directories that are looked at. They do not exist before the first container of that runtime.
pub const STATE_DIRECTORIES: [StateDirectory; 2] = [
    StateDirectory { runtime: Runtime::Crun, path: "/run/crun", file: "status" },
    StateDirectory { runtime: Runtime::Runc, path: "/run/runc", file: "state.json" },
];

/// All running containers, in no particular order. State that cannot be read (a container that is just coming or
/// going) is passed over with a debug line.
pub fn scan() -> Vec<Container> {
    STATE_DIRECTORIES
        .iter()
        .flat_map(|directory| ids(directory).into_iter().filter_map(|id| load(directory, &id)))
        .collect()
}

/// The containers that have a directory there.
pub fn ids(directory: &StateDirectory) -> Vec<String> {
    std::fs::read_dir(directory.path)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// One running container; `None` if its state is not there yet, cannot be read, or its init has ended.
pub fn load(directory: &StateDirectory, id: &str) -> Option<Container> {
    let place = Path::new(directory.path).join(id);
    let read = match directory.runtime {
        Runtime::Crun => crun::load(&place, id),
        Runtime::Runc => runc::load(&place),
        Runtime::Pid => return None,
    };
    let mut container = read
        .inspect_err(|reason| tracing::debug!(container = id, "state in {} passed over: {reason}", place.display()))
        .ok()?;
    let init = Process::open_same(container.pid, container.start_time)?;
    container.name = conmon::name_of(init.parent, &container.id);
    container.owner = std::fs::metadata(&place).ok()?.uid();
    Some(container)
}

/// The `annotations` object of an OCI specification. Values that are no strings are passed over.
fn annotations(spec: &Value) -> BTreeMap<String, String> {
    let pairs = spec.get("annotations").and_then(Value::as_object).into_iter().flatten();
    pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn parse_json<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests;
