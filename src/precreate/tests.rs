//! The hook over made-up devices.

use std::io;

use super::*;
use crate::core::device::{Access, Kind, Number};
use crate::core::rule::Rule;
use crate::core::spec::SpecDevice;
use crate::precreate::discovery::{Found, Request};

/// Two sticks, a sound card that may not be opened, and a seat that cannot be looked for.
struct Two;

impl Discovery for Two {
    fn devices(&self, rule: &Rule, _: &Request<'_>) -> io::Result<Found> {
        let stick = |minor| SpecDevice {
            path: format!("/dev/ttyUSB{minor}"),
            number: Number { kind: Kind::Char, major: 188, minor },
            mode: 0o660,
            uid: 0,
            gid: 20,
            access: Access::ALL,
        };
        match rule.to_string().as_str() {
            "ttyUSB" => Ok(Found { devices: vec![stick(0), stick(1)], withheld: vec![] }),
            "audio" => Ok(Found {
                devices: vec![],
                withheld: vec![("/dev/snd/timer".into(), "this user may not open it".into())],
            }),
            "seat7" => Err(io::ErrorKind::NotFound.into()),
            _ => Ok(Found::default()),
        }
    }
}

/// What the hook writes, and its log without the times.
fn hook(as_whom: Option<&'static Hook>, input: &str) -> (Result<String>, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let mut output = Vec::new();
    let around = Surroundings { discovery: &Two, log: Some(log.clone()), has_udev: false };
    let result = run(as_whom, &around, &mut input.as_bytes(), &mut output);
    let lines = std::fs::read_to_string(log).unwrap_or_default();
    let lines = lines.lines().map(|line| {
        assert_eq!(&line[4..5], "-", "{line}");
        assert_eq!((&line[10..11], &line[13..14], &line[19..22]), (" ", ":", " - "), "{line}");
        line[22..].to_owned()
    });
    (result.map(|()| String::from_utf8(output).unwrap()), lines.collect())
}

fn annotated(annotations: &str) -> String {
    format!("{{\"annotations\":{{{annotations}}},\"linux\":{{}}}}")
}

#[test]
fn without_our_annotations_every_byte_stays() {
    for text in [
        "{ }\n",
        "{\"annotations\":{\"a\":\"b\"},  \"x\":1e3}",
        "{\"annotations\":{\"org.containers.qm.device.audio\":\"no\"}} ",
        "{\"annotations\":{\"org.containers.qm.device.dvb\":\"yes\"}, \"x\": 1.0, \"y\":18446744073709551615,\"linux\":{}}",
        "{\"annotations\":null,\"linux\":[]}",
    ] {
        assert_eq!(hook(None, text).0.unwrap(), text);
    }
}

#[test]
fn what_is_asked_for_is_added_and_nothing_else_changes() {
    let text = r#"{"z":1.50,"annotations":{"org.containers.qm.device.ttyUSB":true,"a":3},"linux":{"x":[1e+400]},"y":"\u00e9"}"#;
    let output = hook(None, text).0.unwrap();
    let node = |n: u32| {
        format!(r#"{{"path":"/dev/ttyUSB{n}","type":"c","major":188,"minor":{n},"fileMode":432,"uid":0,"gid":20}}"#)
    };
    let rule = |n: u32| format!(r#"{{"allow":true,"type":"c","major":188,"minor":{n},"access":"rwm"}}"#);
    assert_eq!(
        output,
        format!(
            r#"{{"z":1.50,"annotations":{{"org.containers.qm.device.ttyUSB":true,"a":3}},"linux":{{"x":[1e+400],"resources":{{"devices":[{},{}]}},"devices":[{},{}]}},"y":"é"}}"#,
            rule(0),
            rule(1),
            node(0),
            node(1)
        )
    );
    assert_eq!(hook(None, &output).0.unwrap(), output, "a second time nothing changes");
    let without_linux = r#"{"annotations":{"org.containers.qm.device.dvb":"yes"},"x":1}"#;
    let made = r#"{"annotations":{"org.containers.qm.device.dvb":"yes"},"x":1,"linux":{}}"#;
    assert_eq!(hook(None, without_linux).0.unwrap(), made);
}

#[test]
fn what_is_no_specification_is_refused_in_one_line() {
    let sticks = "\"annotations\":{\"org.containers.qm.device.ttyUSB\":\"true\"}";
    let dvb = "\"annotations\":{\"org.containers.qm.device.dvb\":\"true\"}";
    for (text, reason) in [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("{", "not valid JSON"),
        ("{}{}", "not valid JSON"),
        ("[]", "the top level is not a JSON object"),
        (&format!("{{{sticks},\"x\":{{\"$serde_json::private::Number\":\"1\"}}}}"), "could not be kept"),
        ("3", "the top level is not a JSON object"),
        ("{\"annotations\":[]}", "'annotations' is not an object"),
        (&format!("{{{sticks},\"linux\":{{\"devices\":{{}}}}}}"), "'linux.devices' is not an array but an object"),
        (&format!("{{{dvb},\"linux\":{{\"devices\":3}}}}"), "'linux.devices' is not an array but a number"),
        (&format!("{{{sticks},\"linux\":[]}}"), "'linux' is not an object but an array"),
    ] {
        let (result, log) = hook(None, text);
        let message = result.unwrap_err().chain();
        assert!(message.starts_with("config.json on stdin: ") && !message.contains('\n'), "{message}");
        assert!(message.contains(reason), "{text}: {message}");
        assert_eq!(log.last().unwrap(), &format!("qm-device-manager - ERROR - {message}"));
    }
}

#[test]
fn the_log_tells_what_containers_qm_users_look_for() {
    let id = "9414c2935ef041b87193246a883cd65a2ecca97ab6fb2e7d426b52ac96aba21b";
    let text = format!(
        r#"{{"annotations":{{"org.containers.qm.device.ttyUSB":"yes","org.containers.qm.device.audio":"1","org.containers.qm.device.tape":"true","org.containers.qm.device.video":"on\nx","org.containers.qm.device.radio":7,"org.containers.qm.wayland.seat":"seat7","org.containers.qm.wayland-client.gpu":"TRUE"}},"linux":{{"cgroupsPath":"machine.slice:libpod:{id}"}}}}"#
    );
    let (output, log) = hook(None, &text);
    assert!(output.unwrap().contains("/dev/ttyUSB1"));
    assert_eq!(
        log,
        [
            "qm-device-manager - INFO - Processing QM device annotations of container 9414c2935ef0",
            "qm-device-manager - INFO - Adding device: /dev/ttyUSB0 (type=c, major=188, minor=0)",
            "qm-device-manager - INFO - Adding device: /dev/ttyUSB1 (type=c, major=188, minor=1)",
            "qm-device-manager - INFO - Added 2 ttyUSB devices to container 9414c2935ef0",
            "qm-device-manager - WARNING - Not adding device: /dev/snd/timer: this user may not open it",
            "qm-device-manager - INFO - Added 0 audio devices to container 9414c2935ef0",
            "qm-device-manager - WARNING - Skipping annotation org.containers.qm.device.tape: there is no category 'tape'",
            "qm-device-manager - WARNING - Skipping annotation org.containers.qm.device.video: 'on\\nx' is none of true, 1 and yes",
            "qm-device-manager - WARNING - Skipping annotation org.containers.qm.device.radio: its value is a number, not a string",
            "qm-device-manager - WARNING - Cannot look for Wayland seat devices for seat7: entity not found",
            "qm-device-manager - INFO - Total devices in spec: 2",
            "qm-device-manager - INFO - QM Device Manager hook completed successfully",
            "qm-wayland-client-devices - INFO - Processing QM device annotations of container 9414c2935ef0",
            "qm-wayland-client-devices - INFO - Added 0 wayland-client.gpu devices to container 9414c2935ef0",
            "qm-wayland-client-devices - INFO - Total devices in spec: 2",
            "qm-wayland-client-devices - INFO - QM Wayland Client Devices hook completed successfully",
        ]
    );
}

#[test]
fn under_the_name_of_a_hook_only_its_annotations_count() {
    let text = annotated(r#""org.containers.qm.device.ttyUSB":"true""#);
    let (output, log) = hook(Hook::called_as("/usr/libexec/oci/hooks.d/oci-qm-wayland-client-devices"), &text);
    assert_eq!(output.unwrap(), text);
    assert_eq!(log[0], "qm-wayland-client-devices - INFO - No QM device annotations found");
    let (output, log) = hook(Hook::called_as("oci-qm-device-manager"), &text);
    assert!(output.unwrap().contains("/dev/ttyUSB0"));
    assert!(log.iter().all(|line| line.starts_with("qm-device-manager - ")), "{log:?}");
    for other in ["qm-hotplug", "/usr/bin/oci-qm-device-manager/x", ""] {
        assert!(Hook::called_as(other).is_none(), "{other}");
    }
}

#[test]
fn a_log_that_cannot_be_written_is_no_reason_to_fail() {
    let text = annotated(r#""org.containers.qm.device.ttyUSB":"true""#);
    let directory = tempfile::tempdir().unwrap();
    let (fifo, link) = (directory.path().join("fifo"), directory.path().join("link"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    std::os::unix::fs::symlink("elsewhere", &link).unwrap();
    for log in ["/nonexistent/directory/log".into(), fifo, link] {
        let around = Surroundings { discovery: &Two, log: Some(log), has_udev: false };
        let mut output = Vec::new();
        run(None, &around, &mut text.as_bytes(), &mut output).unwrap();
        assert!(String::from_utf8(output).unwrap().contains("/dev/ttyUSB0"));
    }
    assert!(!directory.path().join("elsewhere").exists());
}

#[test]
fn all_that_is_waited_for_is_waited_for_at_once() {
    let keys = ["a", "b", "c"].map(|name| format!("\"org.containers.qm.hotplug.{name}\":\"tty,wait=400ms\""));
    let start = std::time::Instant::now();
    hook(None, &annotated(&keys.join(","))).0.unwrap();
    let took = start.elapsed().as_millis();
    assert!((400..800).contains(&took), "{took} ms");
}

#[test]
fn a_policy_counts_for_nodes_whose_driver_is_not_loaded() {
    use crate::core::facts::Facts;
    use crate::core::policy::Subject;
    use crate::core::settings::Settings;
    use crate::sys::sysfs::KernelSysfs;
    let node = SpecDevice {
        path: "/dev/net/tun".into(),
        number: Number { kind: Kind::Char, major: 10, minor: 200 },
        mode: 0o666,
        uid: 0,
        gid: 0,
        access: Access::ALL,
    };
    // No node of this host, so nothing but the node is known.
    let (device, sysfs) = (discovery::described("/nonexistent/net/tun", &node), KernelSysfs::default());
    for (file, allowed) in [
        ("require-policy = true", false),
        ("require-policy = true\n[[policy]]\nallow = ['devname=/nonexistent/net/*']", true),
        ("[[policy]]\nallow = ['ttyUSB']", false),
        ("[[policy]]\ndeny = ['devname=*/tun']", false),
        ("[[policy]]\ndeny = ['ttyUSB']", true),
    ] {
        let (settings, _) = Settings::read(&[("/etc/0.toml".into(), Ok(file.into()))]);
        let refusal = settings.policies.bounds(&Subject::default()).refusal(&Facts::new(&device, &sysfs));
        assert_eq!(refusal.is_none(), allowed, "{file}: {refusal:?}");
    }
}
