//! runc: `STATE/ID/state.json` (libcontainer/container_linux.go, `State`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::core::container::{Container, Runtime};
use crate::core::spec::named_devices;
use crate::runtime::parse_json;

/// The fields of `state.json` that we use.
#[derive(Deserialize)]
struct StateFile {
    id: String,
    init_process_pid: u32,
    init_process_start: u64,
    #[serde(default)]
    cgroup_paths: BTreeMap<String, String>,
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    /// Annotations as `key=value`, and `bundle=PATH`.
    #[serde(default)]
    labels: Option<Vec<String>>,
    /// Entries as in the OCI specification, but for the type.
    devices: Option<Value>,
}

/// Reads `state.json`. Errors are in words.
pub fn parse(state: &str) -> Result<Container, String> {
    let mut state: StateFile = parse_json(state)?;
    let labels = state.config.labels.unwrap_or_default();
    Ok(Container {
        id: state.id,
        name: None,
        runtime: Runtime::Runc,
        pid: state.init_process_pid,
        start_time: state.init_process_start,
        // The empty name is the unified hierarchy; others are those of cgroup v1.
        cgroup: state.cgroup_paths.remove("").filter(|path| !path.is_empty()),
        annotations: labels
            .iter()
            .filter_map(|label| label.split_once('='))
            .map(|(key, value)| (key.into(), value.into()))
            .collect(),
        devices: named_devices(state.config.devices.as_ref()),
        bundle: labels.iter().rev().find_map(|label| label.strip_prefix("bundle=")).map(str::to_owned),
        image: None,
        owner: 0,
    })
}
