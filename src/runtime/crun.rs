//! crun: `STATE/ID/status` (libcrun/status.c), and the OCI specification in `STATE/ID/config.json`.

use serde::Deserialize;
use serde_json::Value;

use crate::core::container::{Container, Runtime};
use crate::core::spec::named_devices;
use crate::runtime::{annotations, parse_json};

/// The fields of `status` that we use.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Status {
    pid: u32,
    process_start_time: u64,
    cgroup_path: Option<String>,
    bundle: Option<String>,
}

/// Reads `status` and `config.json` of the container with that id. Errors are in words.
pub fn parse(id: &str, status: &str, spec: &str) -> Result<Container, String> {
    let status: Status = parse_json(status)?;
    let spec: Value = parse_json(spec)?;
    Ok(Container {
        id: id.to_owned(),
        name: None,
        runtime: Runtime::Crun,
        pid: status.pid,
        start_time: status.process_start_time,
        cgroup: status.cgroup_path.filter(|path| !path.is_empty()),
        annotations: annotations(&spec),
        devices: named_devices(spec.pointer("/linux/devices")),
        bundle: status.bundle,
        image: None,
        owner: 0,
    })
}
