//! Edits of an OCI `config.json` (runtime-spec, config.md and config-linux.md). The document stays a
//! [`serde_json::Value`]: a typed round trip would drop fields that a newer runtime knows.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType};
use serde_json::{Map, Value, json};

use crate::core::annotation::AT_START;
use crate::core::device::{Access, Device, Kind, Number};
use crate::core::ledger::Node;

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
    /// Rights.
    pub access: Access,
}

impl SpecDevice {
    /// That device with this node. A link becomes a second node: the specification knows no links in `/dev`.
    pub fn new(number: Number, node: &Node, access: Access) -> SpecDevice {
        let Node { uid, gid, mode, .. } = *node;
        SpecDevice { path: node.path.clone(), number, mode, uid, gid, access }
    }
}

impl From<&Device> for SpecDevice {
    fn from(device: &Device) -> SpecDevice {
        SpecDevice::new(device.number, &Node::of(device), Access::ALL)
    }
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

/// An annotation's value: a string, or in words what it is instead. A JSON `true` counts as the string, since people
/// write it so.
pub type Annotation = Result<String, &'static str>;

/// The annotations, in their order.
pub fn annotations(spec: &Value) -> Result<Vec<(String, Annotation)>, String> {
    let spec = spec.as_object().ok_or("the top level is not a JSON object")?;
    let Some(annotations) = spec.get("annotations").filter(|value| !value.is_null()) else { return Ok(Vec::new()) };
    let annotations = annotations.as_object().ok_or("'annotations' is not an object")?;
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(true) => Ok("true".to_owned()),
        other => Err(kind_of(other)),
    };
    Ok(annotations.iter().map(|(key, value)| (key.clone(), text(value))).collect())
}

/// How many entries `linux.devices` has.
pub fn device_count(spec: &Value) -> usize {
    spec.pointer("/linux/devices").and_then(Value::as_array).map_or(0, Vec::len)
}

/// The container's id: podman has it at the end of `linux.cgroupsPath` (`machine.slice:libpod:ID`,
/// `/libpod_parent/libpod-ID`), and in the places of files that it mounts (`…/ID/userdata/hosts`).
pub fn container_id(spec: &Value) -> Option<String> {
    let is_id = |text: &&str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let cgroup = spec.pointer("/linux/cgroupsPath").and_then(Value::as_str);
    let in_cgroup = cgroup.and_then(|path| path.rsplit(['/', ':', '-']).next()).filter(is_id);
    let in_mounts =
        || mount_sources(spec).find_map(|source| source.split("/userdata/").next()?.rsplit('/').next().filter(is_id));
    in_cgroup.or_else(in_mounts).map(str::to_owned)
}

/// The path that its cgroup will have, as far as `linux.cgroupsPath` tells it: as it stands, or for systemd
/// (`SLICE:PREFIX:NAME`, runc's docs/systemd.md) that of the scope.
pub fn cgroup_path(spec: &Value) -> Option<String> {
    let path = spec.pointer("/linux/cgroupsPath")?.as_str()?;
    let mut parts = path.split(':');
    let (Some(slice), Some(prefix), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Some(format!("/{}", path.trim_start_matches('/')));
    };
    // A slice `a-b.slice` is in `a.slice` (systemd.slice(5)).
    let stem = match slice.strip_suffix(".slice").unwrap_or(slice) {
        "" => "system",
        "-" => "",
        stem => stem,
    };
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]).filter(|end| *end > 0);
    let slices: String = ends.map(|end| format!("/{}.slice", &stem[..end])).collect();
    let dash = if prefix.is_empty() { "" } else { "-" };
    Some(format!("{slices}/{prefix}{dash}{name}.scope"))
}

/// Writes down which nodes were added for selectors: the agent reads it with the other annotations.
pub fn note_at_start(spec: &mut Value, paths: &[String]) {
    if let (false, Some(root)) = (paths.is_empty(), spec.as_object_mut()) {
        object(root, "annotations").insert(AT_START.into(), json!(json!(paths).to_string()));
    }
}

/// Whether the container's program is systemd, by its path: the same that Podman takes for it (`--systemd=true`).
pub fn runs_systemd(spec: &Value) -> bool {
    let program = spec.pointer("/process/args/0").and_then(Value::as_str).unwrap_or_default();
    program.rsplit('/').next() == Some("systemd")
        || matches!(program, "/sbin/init" | "/usr/sbin/init" | "/usr/local/sbin/init")
}

/// Adds a bind mount, read-only and private, unless something is mounted there, or something of the host's above it. Says
/// whether it did.
pub fn add_mount(spec: &mut Value, source: &str, destination: &str) -> Result<bool, String> {
    let root = spec.as_object_mut().ok_or("the top level is not a JSON object")?;
    let mounts = root.get("mounts").filter(|mounts| !mounts.is_null());
    if mounts.is_some_and(|mounts| !mounts.is_array()) {
        return Err("'mounts' is not an array".into());
    }
    let is_in_the_way = |mount: &Value| {
        let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default();
        let path = text("destination").trim_end_matches('/');
        // `/run` is where `/var/run` leads to.
        let path = path.strip_prefix("/var").filter(|rest| rest.starts_with("/run")).unwrap_or(path);
        let below = destination.strip_prefix(path);
        // What was mounted in it on purpose would be covered.
        let is_in_it = path.strip_prefix(destination).is_some_and(|rest| rest.starts_with('/'));
        is_in_it || below == Some("") || below.is_some_and(|rest| rest.starts_with('/')) && text("type") != "tmpfs"
    };
    if mounts.and_then(Value::as_array).into_iter().flatten().any(is_in_the_way) {
        return Ok(false);
    }
    array(root, "mounts").push(json!({
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": ["bind", "ro", "nosuid", "nodev", "noexec", "private"],
    }));
    Ok(true)
}

/// Whether it will have a user namespace: there runtimes bind the host's nodes.
pub fn has_user_namespace(spec: &Value) -> bool {
    let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    namespaces.is_some_and(|all| all.iter().any(|one| one.get("type").and_then(Value::as_str) == Some("user")))
}

fn mount_sources(spec: &Value) -> impl Iterator<Item = &str> {
    let mounts = spec.get("mounts").and_then(Value::as_array).into_iter().flatten();
    mounts.filter_map(|mount| mount.get("source")?.as_str())
}

/// Directories that may have one of the container's own in them, judged by what is mounted from there and by where its
/// root is (`STORAGE/overlay/X/merged`, `STORAGE/vfs/dir/X`).
pub fn storage_directories(spec: &Value, id: &str) -> Vec<String> {
    let mut found: Vec<String> = mount_sources(spec)
        .filter_map(|source| Some(source.split_once(&format!("/{id}/userdata/"))?.0.to_owned()))
        .collect();
    let root = spec.pointer("/root/path").and_then(Value::as_str).unwrap_or_default();
    found.extend(root.rsplitn(4, '/').last().and_then(|storage| {
        let driver = root.strip_prefix(storage)?.strip_prefix('/')?.split('/').next()?;
        Some(format!("{storage}/{driver}-containers"))
    }));
    found.sort();
    found.dedup();
    found
}

/// Whether all that [`add_devices`] changes is of the right type where it is there. The error says in words what is not.
pub fn check(spec: &Value) -> Result<(), String> {
    if !spec.is_object() {
        return Err("the top level is not a JSON object".into());
    }
    for (name, wanted) in [
        ("linux", "an object"),
        ("linux.devices", "an array"),
        ("linux.resources", "an object"),
        ("linux.resources.devices", "an array"),
    ] {
        let value = spec.pointer(&format!("/{}", name.replace('.', "/"))).unwrap_or(&Value::Null);
        if !value.is_null() && kind_of(value) != wanted {
            return Err(format!("'{name}' is not {wanted} but {}", kind_of(value)));
        }
    }
    Ok(())
}

/// Makes `linux` where it is missing. Returns whether it was; its type is not looked at.
pub fn ensure_linux(spec: &mut Value) -> bool {
    let is_missing = spec.get("linux").is_none_or(Value::is_null);
    if let (true, Some(root)) = (is_missing, spec.as_object_mut()) {
        object(root, "linux");
    }
    is_missing
}

/// Adds each device to `linux.devices` and a rule that allows `rwm` to `linux.resources.devices`, after those that are
/// there. What is there already is not added again; everything else stays as it is. Errors are in words.
pub fn add_devices(spec: &mut Value, devices: &[SpecDevice]) -> Result<Added, String> {
    let mut added = Added::default();
    check(spec)?;
    if devices.is_empty() {
        return Ok(added);
    }
    let linux = object(spec.as_object_mut().expect("it was checked"), "linux");
    let rules = array(object(linux, "resources"), "devices");
    let mut allowed = allowed(rules);
    for device in devices {
        let has = allowed.get(&device.number).copied().unwrap_or(Access::NONE);
        if has.union(device.access) == has {
            continue;
        }
        allowed.insert(device.number, has.union(device.access));
        rules.push(rule_for(device.number, device.access)?);
        added.rules += 1;
    }
    let nodes = array(linux, "devices");
    let mut paths: HashMap<String, usize> = HashMap::new();
    for (at, node) in nodes.iter().enumerate() {
        // Of two with one path, the first is the one that counts to us.
        if let Some(path) = node.get("path").and_then(Value::as_str) {
            paths.entry(path.to_owned()).or_insert(at);
        }
    }
    for device in devices {
        match paths.get(&device.path).map(|at| &mut nodes[*at]) {
            Some(node) if number_of(node) == Some(device.number) => {}
            Some(node) => {
                let node = node.as_object_mut().expect("it has a path");
                node.insert("type".into(), json!(device.number.kind.letter().to_string()));
                node.insert("major".into(), json!(device.number.major));
                node.insert("minor".into(), json!(device.number.minor));
                added.corrected.push(device.path.clone());
            }
            None => {
                paths.insert(device.path.clone(), nodes.len());
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

fn rule_for(number: Number, access: Access) -> Result<Value, String> {
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(spec_type(number.kind))
        .major(i64::from(number.major))
        .minor(i64::from(number.minor))
        .access(access.to_string())
        .build();
    serde_json::to_value(rule.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
}

fn spec_type(kind: Kind) -> LinuxDeviceType {
    match kind {
        Kind::Block => LinuxDeviceType::B,
        Kind::Char => LinuxDeviceType::C,
    }
}

/// The rights that rules for single devices allow, with none after them that forbids anything: the last one counts.
fn allowed(rules: &[Value]) -> HashMap<Number, Access> {
    let mut allowed = HashMap::new();
    for rule in rules {
        let access = rule.get("access").and_then(Value::as_str).and_then(|text| text.parse::<Access>().ok());
        if rule.get("allow") != Some(&Value::Bool(true)) {
            allowed.clear();
        } else if let (Some(number), Some(access)) = (number_of(rule), access) {
            let has = allowed.entry(number).or_insert(Access::NONE);
            *has = has.union(access);
        }
    }
    allowed
}

/// The devices that entries of `linux.devices` name, with their paths. runc's state has the same entries, but for the
/// type, which is the character's code there.
pub fn named_devices(entries: Option<&Value>) -> Vec<(Number, String)> {
    let entries = entries.and_then(Value::as_array).into_iter().flatten();
    entries.filter_map(|entry| Some((number_of(entry)?, entry.get("path")?.as_str()?.to_owned()))).collect()
}

fn number_of(entry: &Value) -> Option<Number> {
    let letter = match entry.get("type")? {
        Value::String(letter) if letter.len() == 1 => letter.chars().next()?,
        code => char::from(u8::try_from(code.as_u64()?).ok()?),
    };
    let kind = match letter {
        'b' => Kind::Block,
        'c' | 'u' => Kind::Char,
        _ => return None,
    };
    let part = |name: &str| u32::try_from(entry.get(name)?.as_u64()?).ok();
    Some(Number { kind, major: part("major")?, minor: part("minor")? })
}

/// The object under the key, made where there is none. Its type was checked.
fn object<'a>(parent: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut().expect("its type was checked")
}

/// The same for an array.
fn array<'a>(parent: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut().expect("its type was checked")
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
#[path = "spec_tests.rs"]
mod tests;
