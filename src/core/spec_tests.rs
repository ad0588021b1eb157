//! Edits of specifications.

use super::*;
use proptest::prelude::*;

fn tty(minor: u32) -> SpecDevice {
    SpecDevice {
        path: format!("/dev/ttyUSB{minor}"),
        number: Number { kind: Kind::Char, major: 188, minor },
        mode: 0o660,
        uid: 0,
        gid: 20,
        access: Access::ALL,
    }
}

#[test]
fn node_and_rule_come_after_what_is_there() {
    let mut spec: Value = serde_json::from_str(
        r#"{"z":1,"linux":{"resources":{"devices":[{"allow":false,"access":"rwm"}],"pids":{"limit":18446744073709551615}},"x":[]},"a":null}"#,
    )
    .unwrap();
    add_devices(&mut spec, &[tty(0)]).unwrap();
    assert_eq!(
        spec.to_string(),
        r#"{"z":1,"linux":{"resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":188,"minor":0,"access":"rwm"}],"pids":{"limit":18446744073709551615}},"x":[],"devices":[{"path":"/dev/ttyUSB0","type":"c","major":188,"minor":0,"fileMode":432,"uid":0,"gid":20}]},"a":null}"#
    );
}

#[test]
fn a_stale_node_is_corrected_and_nothing_is_added_twice() {
    let mut spec = json!({"linux": {"devices": [{"path": "/dev/ttyUSB0", "type": "c", "major": 188, "minor": 7, "fileMode": 384}]}});
    let first = add_devices(&mut spec, &[tty(0)]).unwrap();
    assert_eq!((first.corrected.len(), first.devices.len(), first.rules), (1, 0, 1));
    assert_eq!(spec["linux"]["devices"][0]["fileMode"], 384);
    let before = spec.clone();
    assert_eq!(add_devices(&mut spec, &[tty(0)]).unwrap(), Added::default());
    assert_eq!(spec, before);
}

#[test]
fn a_rule_that_a_later_one_overrides_is_added_again() {
    let allow = json!({"allow": true, "type": "c", "major": 188, "minor": 0, "access": "rwm"});
    let deny = json!({"allow": false, "access": "rwm"});
    for (rules, added) in [
        (json!([allow]), 0),
        (json!([deny, allow]), 0),
        (json!([allow, deny]), 1),
        (json!([{"allow": true, "type": "c", "major": 188, "minor": 0, "access": "rw"}]), 1),
        (json!([{"allow": true, "access": "rwm"}]), 1),
    ] {
        let mut spec = json!({"linux": {"resources": {"devices": rules}}});
        assert_eq!(add_devices(&mut spec, &[tty(0)]).unwrap().rules, added, "{rules}");
        assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().last(), Some(&allow), "{rules}");
    }
}

#[test]
fn the_container_is_known_by_its_cgroup_and_its_mounts() {
    let id = "9414c2935ef041b87193246a883cd65a2ecca97ab6fb2e7d426b52ac96aba21b";
    for path in [format!("machine.slice:libpod:{id}"), format!("/libpod_parent/libpod-{id}"), format!("/x/{id}")] {
        assert_eq!(container_id(&json!({"linux": {"cgroupsPath": path}})).as_deref(), Some(id));
    }
    assert_eq!(container_id(&json!({"linux": {"cgroupsPath": "/machine.slice/web"}})), None);
    let spec = json!({"mounts": [
        {"source": format!("/var/lib/containers/storage/overlay-containers/{id}/userdata/shm")},
        {"source": format!("/var/lib/containers/storage/overlay-containers/{id}/userdata/hosts")},
        {"source": "/home/userdata/x"},
        {"destination": "/proc"},
    ]});
    assert_eq!(storage_directories(&spec, id), ["/var/lib/containers/storage/overlay-containers"]);
    for (root, directory) in [
        ("/var/lib/containers/storage/overlay/9f3/merged", "/var/lib/containers/storage/overlay-containers"),
        ("/x/storage/vfs/dir/9f3", "/x/storage/vfs-containers"),
    ] {
        assert_eq!(storage_directories(&json!({"root": {"path": root}}), id), [directory]);
    }
    assert_eq!(container_id(&spec).as_deref(), Some(id), "rootless podman names no cgroup");
}

#[test]
fn the_cgroup_is_where_systemd_or_the_runtime_makes_it() {
    for (path, expected) in [
        ("machine.slice:libpod:9414", "/machine.slice/libpod-9414.scope"),
        ("user-app.slice::x", "/user.slice/user-app.slice/x.scope"),
        (":libpod:9414", "/system.slice/libpod-9414.scope"),
        ("-.slice:libpod:9414", "/libpod-9414.scope"),
        ("libpod-9414", "/libpod-9414"),
        ("/libpod_parent/libpod-9414", "/libpod_parent/libpod-9414"),
    ] {
        assert_eq!(cgroup_path(&json!({"linux": {"cgroupsPath": path}})).as_deref(), Some(expected));
    }
}

#[test]
fn a_selector_may_ask_for_less() {
    let mut spec = json!({"annotations": {"a": "b"}});
    let device = SpecDevice { access: "rw".parse().unwrap(), ..tty(0) };
    add_devices(&mut spec, std::slice::from_ref(&device)).unwrap();
    assert_eq!(spec["linux"]["resources"]["devices"][0]["access"], "rw");
    assert_eq!(add_devices(&mut spec, &[device]).unwrap(), Added::default());
    assert_eq!(add_devices(&mut spec, &[tty(0)]).unwrap().rules, 1, "a category asks for more");
    note_at_start(&mut spec, &["/dev/ttyUSB0".into()]);
    assert_eq!(spec["annotations"][AT_START], "[\"/dev/ttyUSB0\"]");
}

#[test]
fn wrong_types_are_named() {
    for (text, name) in [
        ("[]", "top level"),
        (r#"{"linux":[]}"#, "'linux'"),
        (r#"{"linux":{"devices":{}}}"#, "'linux.devices'"),
        (r#"{"linux":{"resources":3}}"#, "'linux.resources'"),
        (r#"{"linux":{"resources":{"devices":"x"}}}"#, "'linux.resources.devices'"),
    ] {
        let error = add_devices(&mut serde_json::from_str(text).unwrap(), &[tty(0)]).unwrap_err();
        assert!(error.contains(name), "{text}: {error}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec(("(linux|devices|resources|annotations|[a-z]{1,3})", inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_document_is_edited_only_where_granted(mut spec in any_json(), count in 0u32..3) {
        let before = spec.clone();
        let devices: Vec<_> = (0..count).map(tty).collect();
        if add_devices(&mut spec, &devices).is_ok() && count > 0 {
            for device in &devices {
                let nodes = spec["linux"]["devices"].as_array().unwrap();
                prop_assert!(nodes.iter().any(|node| node["path"] == device.path.as_str() && number_of(node) == Some(device.number)));
            }
            // Take the two lists out on both sides: nothing else differs.
            let strip = |mut value: Value| {
                let linux = object(value.as_object_mut().unwrap(), "linux");
                linux.remove("devices");
                object(linux, "resources").remove("devices");
                value
            };
            prop_assert_eq!(strip(spec), strip(before));
        } else if count == 0 {
            prop_assert_eq!(spec, before);
        }
    }
}

#[test]
fn a_mount_is_added_where_nothing_is_in_its_way() {
    let mount = |destination: &str, kind: &str| json!({"destination": destination, "type": kind, "source": "x"});
    for (mounts, is_added) in [
        (json!(null), true),
        (json!([mount("/proc", "proc"), mount("/run", "tmpfs"), mount("/run/.containerenv", "bind")]), true),
        (json!([mount("/run/udevil", "bind")]), true),
        (json!([mount("/run/udev/data", "bind")]), false),
        (json!([mount("/run/udev", "bind")]), false),
        (json!([mount("/run/udev/", "tmpfs")]), false),
        (json!([mount("/var/run/udev", "bind")]), false),
        (json!([mount("/run", "bind")]), false),
        (json!([mount("/var/run", "bind")]), false),
    ] {
        let mut spec = json!({"mounts": mounts});
        assert_eq!(add_mount(&mut spec, "/srv/view", "/run/udev"), Ok(is_added), "{mounts}");
        let last = spec["mounts"].as_array().and_then(|all| all.last()).cloned().unwrap_or_default();
        assert_eq!(last["source"] == "/srv/view", is_added, "{mounts}");
        assert_eq!(is_added, spec["mounts"] != mounts);
    }
    assert!(add_mount(&mut json!({"mounts": {}}), "/a", "/b").is_err());
}

#[test]
fn what_a_container_is_like() {
    let of = |program: &str| runs_systemd(&json!({"process": {"args": [program, "--x"]}}));
    assert!(of("/sbin/init") && of("systemd") && of("/usr/lib/systemd/systemd"));
    assert!(!of("/bin/sh") && !of("/init") && !of("initial") && !runs_systemd(&json!({})));
    let with = |kind: &str| has_user_namespace(&json!({"linux": {"namespaces": [{"type": "pid"}, {"type": kind}]}}));
    assert!(with("user") && !with("mount") && !has_user_namespace(&json!({})));
}
