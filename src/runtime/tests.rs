//! The adapters on state files of real containers (tests/fixtures), and on what is cut short or made up.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::core::device::{Kind, Number};
use crate::sys::cgroup::own_path;

fn fixture(release: &str, runtime: &str, file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(release).join(runtime).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The container of a fixture as its adapter reads it.
fn container(release: &str, runtime: &str) -> Container {
    let mut container = match runtime {
        "crun" => {
            let (status, spec) = (fixture(release, runtime, "status"), fixture(release, runtime, "config.json"));
            let bundle: serde_json::Value = serde_json::from_str(&status).unwrap();
            let id = bundle["bundle"].as_str().unwrap().split('/').nth_back(1).unwrap().to_owned();
            crun::parse(&id, &status, &spec).unwrap()
        }
        _ => runc::parse(&fixture(release, runtime, "state.json")).unwrap(),
    };
    container.name = conmon::parse(fixture(release, runtime, "conmon.cmdline").as_bytes(), &container.id);
    container
}

#[test]
fn real_state_files_of_each_runtime_and_release() {
    for release in ["bookworm", "trixie"] {
        for runtime in ["crun", "runc"] {
            let container = container(release, runtime);
            assert_eq!(container.name.as_deref(), Some(&*format!("fx-{runtime}")), "{release}");
            assert_eq!(container.runtime.to_string(), runtime);
            assert_eq!(container.annotations["foo"], "bar", "{release} {runtime}");
            assert_eq!(container.annotations["org.containers.qm.device.ttyUSB"], "true", "{release} {runtime}");
            let null = Number { kind: Kind::Char, major: 1, minor: 3 };
            let named = (runtime == "runc").then(|| (null, "/dev/null".to_owned()));
            assert_eq!(container.devices.iter().find(|(number, _)| *number == null), named.as_ref(), "{release}");
            let stat = fixture(release, runtime, "stat");
            let (pid, rest) = stat.split_once(' ').unwrap();
            assert_eq!(container.pid.to_string(), pid, "{release} {runtime}");
            let start_time = rest.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap();
            assert_eq!(container.start_time.to_string(), start_time, "{release} {runtime}");
            let cgroup = fixture(release, runtime, "cgroup");
            let init = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
            assert_eq!(own_path(init, container.cgroup.as_deref()).as_deref(), Some(init), "{release} {runtime}");
            assert_eq!(init.ends_with("/container"), runtime == "crun");
        }
    }
}

#[test]
fn devices_of_the_specification_are_known() {
    let status = r#"{"pid":1,"process-start-time":2}"#;
    let spec = r#"{"linux":{"devices":[{"path":"/dev/ttyUSB0","type":"c","major":188,"minor":0},{"path":"/dev/sda","type":"b","major":8,"minor":0},{"path":"/dev/p","type":"p"},{}]}}"#;
    let devices = crun::parse("x", status, spec).unwrap().devices;
    let stick = Number { kind: Kind::Char, major: 188, minor: 0 };
    let disk = Number { kind: Kind::Block, major: 8, minor: 0 };
    assert_eq!(devices, [(stick, "/dev/ttyUSB0".into()), (disk, "/dev/sda".into())]);
}

#[test]
fn state_without_a_cgroup_or_annotations_is_no_error() {
    let state =
        runc::parse(r#"{"id":"x","init_process_pid":1,"init_process_start":2,"config":{"labels":null}}"#).unwrap();
    assert_eq!((state.cgroup, state.annotations.len()), (None, 0));
    let state = crun::parse("x", r#"{"pid":1,"process-start-time":2,"cgroup-path":""}"#, "{}").unwrap();
    assert!(state.devices.is_empty());
    assert_eq!((state.cgroup, state.annotations.len()), (None, 0));
}

proptest! {
    #[test]
    fn state_that_is_cut_short_or_changed_is_an_error_or_a_container(at in 0usize..4000, byte in any::<u8>(), cut in any::<bool>()) {
        let damage = |text: String| {
            let mut bytes = text.into_bytes();
            let at = at % bytes.len();
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let _ = runc::parse(&damage(fixture("trixie", "runc", "state.json")));
        let _ = crun::parse("x", &damage(fixture("trixie", "crun", "status")), &damage(fixture("trixie", "crun", "config.json")));
        let _ = conmon::parse(damage(fixture("trixie", "crun", "conmon.cmdline")).as_bytes(), "x");
    }
}
