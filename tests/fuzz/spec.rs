//! Any bytes as the hook's config.json: it edits the devices and notes some for the agent, or refuses and writes nothing.
#![no_main]

use std::io;

use libfuzzer_sys::fuzz_target;
use qm_hotplug::core::annotation::{AT_START, HOTPLUG_PREFIX};
use qm_hotplug::core::device::{Access, Kind, Number};
use qm_hotplug::core::rule::Rule;
use qm_hotplug::core::spec::SpecDevice;
use qm_hotplug::precreate::discovery::{Discovery, Found, Request};
use qm_hotplug::precreate::{DEVICE_MANAGER, Hook, Surroundings, WAYLAND_CLIENT, run};
use serde_json::{Map, Value, json};

fuzz_target!(|input: &[u8]| {
    let Ok(output) = hook(None, input) else { return };
    // What has nothing of ours in it is passed on without being read as a whole, so it may be no JSON after all.
    let Ok(before) = serde_json::from_slice(input) else { return assert_eq!(text(&output), text(input)) };
    if output != input {
        assert_only_devices_differ(&before, &serde_json::from_slice(&output).unwrap());
    }
    assert_eq!(text(&hook(None, &output).unwrap()), text(&output), "a second time nothing changes");
    let in_turn = hook(Some(&WAYLAND_CLIENT), &hook(Some(&DEVICE_MANAGER), input).unwrap()).unwrap();
    assert_eq!(text(&in_turn), text(&output), "the one hook does what the two do");
});

/// The same two sticks for whatever is asked for.
struct Sticks;

const STICKS: [(&str, u32); 2] = [("/dev/ttyUSB0", 0), ("/dev/ttyUSB1", 1)];

impl Discovery for Sticks {
    fn devices(&self, _: &Rule, _: &Request<'_>) -> io::Result<Found> {
        let stick = |(path, minor): (&str, u32)| SpecDevice {
            path: path.to_owned(),
            number: Number { kind: Kind::Char, major: 188, minor },
            mode: 0o660,
            uid: 0,
            gid: 20,
            access: Access::ALL,
        };
        Ok(Found { devices: STICKS.map(stick).into(), withheld: vec![] })
    }
}

fn hook(as_whom: Option<&'static Hook>, mut input: &[u8]) -> Result<Vec<u8>, ()> {
    let around = Surroundings { discovery: &Sticks, log: Some("/dev/null".into()), has_udev: false };
    let mut output = Vec::new();
    run(as_whom, &around, &mut input, &mut output).map(|()| output.clone()).map_err(|error| {
        assert_eq!(text(&output), "", "what is refused is not written");
        let message = error.chain();
        assert!(!message.contains(char::is_control), "one line that is fit for a log: {message:?}");
    })
}

fn assert_only_devices_differ(before: &Value, after: &Value) {
    // As text, for the order of the keys counts as well.
    assert_eq!(without_ours(before).to_string(), without_ours(after).to_string());
    if after["annotations"][AT_START] != before["annotations"][AT_START] {
        let annotations = before["annotations"].as_object().unwrap();
        assert!(annotations.keys().any(|key| key.starts_with(HOTPLUG_PREFIX)), "{annotations:?}");
        let noted: Vec<String> = serde_json::from_str(after["annotations"][AT_START].as_str().unwrap()).unwrap();
        assert!(!noted.is_empty() && noted.iter().all(|path| STICKS.iter().any(|stick| stick.0 == path)), "{noted:?}");
    }
    let (old, new) = (list(before, "/linux/resources/devices"), list(after, "/linux/resources/devices"));
    assert!(new.starts_with(old), "the rules that were there come first and unchanged");
    for rule in &new[old.len()..] {
        assert!(rule["allow"] == true && STICKS.iter().any(|stick| has_numbers(rule, stick.1)), "{rule}");
    }
    let (old, new) = (list(before, "/linux/devices"), list(after, "/linux/devices"));
    let (kept, added) = new.split_at(old.len());
    for (old, new) in old.iter().zip(kept) {
        let stick = STICKS.iter().find(|stick| old.get("path").is_some_and(|path| path == stick.0));
        let corrected = |stick: &(&str, u32)| {
            has_numbers(new, stick.1) && without_numbers(old).to_string() == without_numbers(new).to_string()
        };
        assert!(old.to_string() == new.to_string() || stick.is_some_and(corrected), "{old} became {new}");
    }
    for node in added {
        assert!(STICKS.iter().any(|stick| node["path"] == stick.0 && has_numbers(node, stick.1)), "{node}");
    }
    for (path, minor) in STICKS {
        let node = new.iter().find(|node| node.get("path").is_some_and(|it| it == path));
        assert!(node.is_some_and(|node| has_numbers(node, minor)), "{path} is not in {new:?}");
    }
}

/// Whether it is a character device of the sticks' driver. The type's first letter counts, or its code.
fn has_numbers(entry: &Value, minor: u32) -> bool {
    let kind = &entry["type"];
    let letter = kind.as_str().and_then(|text| text.bytes().next()).map(u64::from).or(kind.as_u64());
    letter.is_some_and(|letter| b"cu".map(u64::from).contains(&letter))
        && (entry["major"].as_u64(), entry["minor"].as_u64()) == (Some(188), Some(minor.into()))
}

fn without_numbers(node: &Value) -> Value {
    let mut node = node.as_object().unwrap().clone();
    for key in ["type", "major", "minor"] {
        node.shift_remove(key);
    }
    Value::Object(node)
}

/// The document with neither nodes nor rules, nor what holds nothing but them, nor what the hook notes for the agent.
fn without_ours(spec: &Value) -> Value {
    let mut spec = spec.clone();
    if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.shift_remove(AT_START);
    }
    let mut linux = spec.get("linux").and_then(Value::as_object).cloned().unwrap_or_default();
    let mut resources = linux.get("resources").and_then(Value::as_object).cloned().unwrap_or_default();
    resources.shift_remove("devices");
    linux.shift_remove("devices");
    put(&mut linux, "resources", resources);
    put(spec.as_object_mut().unwrap(), "linux", linux);
    spec
}

fn put(parent: &mut Map<String, Value>, key: &str, value: Map<String, Value>) {
    if value.is_empty() {
        parent.shift_remove(key);
    } else {
        parent.insert(key.to_owned(), json!(value));
    }
}

fn list<'a>(spec: &'a Value, pointer: &str) -> &'a [Value] {
    spec.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// For messages.
fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}
