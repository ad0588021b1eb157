//! Edits of an OCI `config.json` (runtime-spec, config.md and config-linux.md). The document stays a
//! [`serde_json::Value`]: a typed round trip would drop fields that a newer runtime knows.

use oci_spec::runtime::{LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType};
use serde_json::{Map, Value, json};

use crate::core::device::{Access, Kind, Number};

/// A device as the specification has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecDevice {
    /// Path of the node inside.
    pub path: String,
    /// Kind and numbers.
    pub number: Number,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What [`add_devices`] changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Added {
    /// Paths of new entries in `linux.devices`.
    pub devices: Vec<String>,
    /// Paths of entries whose numbers or kind were stale and are corrected.
    pub corrected: Vec<String>,
    /// Number of new rules in `linux.resources.devices`.
    pub rules: usize,
}

/// The annotations. A value `true` that is no string counts as one, since people write it so; other values are no
/// annotations.
pub fn annotations(spec: &Value) -> Result<Vec<(String, String)>, String> {
    let spec = spec.as_object().ok_or("the top level is not a JSON object")?;
    let Some(annotations) = spec.get("annotations").filter(|value| !value.is_null()) else { return Ok(Vec::new()) };
    let annotations = annotations.as_object().ok_or("'annotations' is not an object")?;
    Ok(annotations
        .iter()
        .filter_map(|(key, value)| match value {
            Value::String(text) => Some((key.clone(), text.clone())),
            Value::Bool(true) => Some((key.clone(), "true".to_owned())),
            _ => None,
        })
        .collect())
}

/// Adds each device to `linux.devices` and a rule that allows `rwm` to `linux.resources.devices`, after those that are
/// there. What is there already is not added again; everything else stays as it is. Errors are in words.
pub fn add_devices(spec: &mut Value, devices: &[SpecDevice]) -> Result<Added, String> {
    let mut added = Added::default();
    if devices.is_empty() {
        return Ok(added);
    }
    // Both lists are checked before anything is changed.
    let root = spec.as_object_mut().ok_or("the top level is not a JSON object")?;
    let linux = object(root, "linux", "linux")?;
    if let Some(list) = linux.get("devices").filter(|list| !list.is_array() && !list.is_null()) {
        return Err(format!("'linux.devices' is not an array but {}", kind_of(list)));
    }
    let resources = object(linux, "resources", "linux.resources")?;
    let rules = array(resources, "devices", "linux.resources.devices")?;
    for device in devices {
        if !rules.iter().any(|rule| allows(rule, device.number)) {
            rules.push(rule_for(device.number)?);
            added.rules += 1;
        }
    }
    let nodes = array(linux, "devices", "linux.devices")?;
    for device in devices {
        match nodes.iter_mut().find(|node| node.get("path").and_then(Value::as_str) == Some(&device.path)) {
            Some(node) if number_of(node) == Some(device.number) => {}
            Some(node) => {
                let node = node.as_object_mut().expect("it has a path");
                node.insert("type".into(), json!(device.number.kind.letter().to_string()));
                node.insert("major".into(), json!(device.number.major));
                node.insert("minor".into(), json!(device.number.minor));
                added.corrected.push(device.path.clone());
            }
            None => {
                nodes.push(node_for(device)?);
                added.devices.push(device.path.clone());
            }
        }
    }
    Ok(added)
}

fn node_for(device: &SpecDevice) -> Result<Value, String> {
    let node = LinuxDeviceBuilder::default()
        .path(&device.path)
        .typ(spec_type(device.number.kind))
        .major(i64::from(device.number.major))
        .minor(i64::from(device.number.minor))
        .file_mode(device.mode)
        .uid(device.uid)
        .gid(device.gid)
        .build();
    serde_json::to_value(node.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
}

fn rule_for(number: Number) -> Result<Value, String> {
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(spec_type(number.kind))
        .major(i64::from(number.major))
        .minor(i64::from(number.minor))
        .access(Access::ALL.to_string())
        .build();
    serde_json::to_value(rule.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
}

fn spec_type(kind: Kind) -> LinuxDeviceType {
    match kind {
        Kind::Block => LinuxDeviceType::B,
        Kind::Char => LinuxDeviceType::C,
    }
}

/// Whether a rule allows `rwm` on just this device.
fn allows(rule: &Value, number: Number) -> bool {
    let access = rule.get("access").and_then(Value::as_str).unwrap_or_default();
    rule.get("allow") == Some(&Value::Bool(true))
        && "rwm".chars().all(|right| access.contains(right))
        && number_of(rule) == Some(number)
}

fn number_of(entry: &Value) -> Option<Number> {
    let kind = match entry.get("type")?.as_str()? {
        "b" => Kind::Block,
        "c" | "u" => Kind::Char,
        _ => return None,
    };
    let part = |name: &str| u32::try_from(entry.get(name)?.as_u64()?).ok();
    Some(Number { kind, major: part("major")?, minor: part("minor")? })
}

fn object<'a>(parent: &'a mut Map<String, Value>, key: &str, name: &str) -> Result<&'a mut Map<String, Value>, String> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    let kind = kind_of(value);
    value.as_object_mut().ok_or_else(|| format!("'{name}' is not an object but {kind}"))
}

fn array<'a>(parent: &'a mut Map<String, Value>, key: &str, name: &str) -> Result<&'a mut Vec<Value>, String> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    let kind = kind_of(value);
    value.as_array_mut().ok_or_else(|| format!("'{name}' is not an array but {kind}"))
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tty(minor: u32) -> SpecDevice {
        SpecDevice {
            path: format!("/dev/ttyUSB{minor}"),
            number: Number { kind: Kind::Char, major: 188, minor },
            mode: 0o660,
            uid: 0,
            gid: 20,
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
                    let linux = object(value.as_object_mut().unwrap(), "linux", "").unwrap();
                    linux.remove("devices");
                    object(linux, "resources", "").unwrap().remove("devices");
                    value
                };
                prop_assert_eq!(strip(spec), strip(before));
            } else if count == 0 {
                prop_assert_eq!(spec, before);
            }
        }
    }
}
