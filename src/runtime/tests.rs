//! The adapters on state files of real containers (tests/fixtures), and on what is cut short or made up.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::core::container::short_id;
use crate::core::device::{Kind, Number};
use crate::sys::cgroup::own_path;

fn fixture(release: &str, runtime: &str, file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(release).join(runtime).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The container of a fixture as its adapter reads it.
fn container(release: &str, runtime: &str) -> Container {
    let file = |name: &str| fixture(release, runtime, name);
    match runtime {
        "crun" => {
            let bundle: serde_json::Value = serde_json::from_str(&file("status")).unwrap();
            let id = bundle["bundle"].as_str().unwrap().split('/').nth_back(1).unwrap().to_owned();
            let container = crun::parse(&id, &file("status"), &file("config.json")).unwrap();
            Container { name: conmon::parse(file("conmon.cmdline").as_bytes(), &id), ..container }
        }
        "runc" => {
            let container = runc::parse(&file("state.json")).unwrap();
            Container { name: conmon::parse(file("conmon.cmdline").as_bytes(), &container.id), ..container }
        }
        "docker" => {
            let mut container = runc::parse(&file("state.json")).unwrap();
            assert_eq!(docker::data_root(&container.id, &file("state.json")).as_deref(), Some("/var/lib/docker"));
            let described = docker::parse(&file("config.v2.json")).unwrap();
            docker::add(&mut container, described, |_| docker::parse_image(&file("image.json")));
            container
        }
        _ => {
            let mut container = runc::parse(&file("state.json")).unwrap();
            containerd::describe(&mut container, "lab");
            container
        }
    }
}

/// Pid and start time of a fixture's first process (proc_pid_stat(5)).
fn process(release: &str, runtime: &str) -> (u32, u64) {
    let stat = fixture(release, runtime, "stat");
    let (pid, rest) = stat.split_once(' ').unwrap();
    let start_time = rest.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap();
    (pid.parse().unwrap(), start_time.parse().unwrap())
}

/// The cgroup of a fixture's first process.
fn cgroup(release: &str, runtime: &str) -> String {
    let cgroup = fixture(release, runtime, "cgroup");
    cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned()
}

const RELEASES: [&str; 2] = ["bookworm", "trixie"];

#[test]
fn real_state_files_of_each_runtime_and_release() {
    for (release, runtime) in RELEASES.iter().flat_map(|r| ["crun", "runc", "docker", "containerd"].map(|e| (*r, e))) {
        let container = container(release, runtime);
        assert_eq!(container.name.as_deref(), Some(&*format!("fx-{runtime}")), "{release}");
        assert_eq!(container.runtime.to_string(), runtime);
        // Docker of bookworm knows no annotations; its own labels are no annotations but for ours.
        let foo = container.annotations.get("foo").map(String::as_str);
        assert_eq!(foo, (runtime != "docker").then_some("bar"), "{release} {runtime}");
        assert_eq!(container.annotations["org.containers.qm.device.ttyUSB"], "true", "{release} {runtime}");
        let null = Number { kind: Kind::Char, major: 1, minor: 3 };
        let named = (runtime != "crun").then(|| (null, "/dev/null".to_owned()));
        assert_eq!(container.devices.iter().find(|(number, _)| *number == null), named.as_ref(), "{release}");
        assert_eq!((container.pid, container.start_time), process(release, runtime), "{release} {runtime}");
        let init = cgroup(release, runtime);
        assert_eq!(own_path(&init, container.cgroup.as_deref()), Some(init.clone()), "{release} {runtime}");
        assert_eq!(init.ends_with("/container"), runtime == "crun");
        let image = (runtime == "docker").then_some("docker.io/library/lab:1");
        assert_eq!(container.image.as_deref(), image, "{release} {runtime}");
        let id = if runtime == "containerd" { "containerd:lab/fx-containerd" } else { short_id(&container.id) };
        assert!(container.id.starts_with(id) && (id.len() == 12 || runtime == "containerd"), "{}", container.id);
    }
}

#[test]
fn real_processes_and_machines_of_engines_without_state() {
    for release in RELEASES {
        let file = |runtime: &str, name: &str| fixture(release, runtime, name);
        assert!(lxc::is_init(&file("lxc", "status")), "{release}");
        let monitored = lxc::parse_monitor(file("lxc", "monitor.cmdline").as_bytes());
        assert_eq!(monitored, Some(lxc::Monitored { path: "/var/lib/lxc".into(), name: "fx".into() }), "{release}");
        assert_eq!(cgroup(release, "lxc"), "/lxc.payload.fx");

        let machine = nspawn::parse(&file("nspawn", "machine")).unwrap().unwrap();
        assert_eq!(machine.leader, process(release, "nspawn").0, "{release}");
        let own = nspawn::own_cgroup(&machine.unit, &cgroup(release, "nspawn"));
        assert_eq!(own.as_deref(), Some("/machine.slice/machine-fx.scope/payload"), "{release}");
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
        let _ = docker::parse(&damage(fixture("trixie", "docker", "config.v2.json")));
        let _ = docker::parse_image(&damage(fixture("trixie", "docker", "image.json")));
        let _ = docker::data_root("x", &damage(fixture("trixie", "docker", "state.json")));
        let _ = nspawn::parse(&damage(fixture("trixie", "nspawn", "machine")));
        let _ = nspawn::own_cgroup("machine-fx.scope", &damage(cgroup("trixie", "nspawn")));
        let _ = lxc::parse_monitor(damage(fixture("trixie", "lxc", "monitor.cmdline")).as_bytes());
        let _ = lxc::is_init(&damage(fixture("trixie", "lxc", "status")));
        let _ = conmon::parse(damage(fixture("trixie", "crun", "conmon.cmdline")).as_bytes(), "x");
    }
}
