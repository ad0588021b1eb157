//! What goes over the agent's socket: varlink's framing (a JSON object and a NUL byte), methods `io.qmhotplug.…`.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};

use crate::core::device::{Access, Kind};
use crate::core::ledger::{Entry, Origin, Placement};

/// What the names of methods and errors start with.
pub const INTERFACE: &str = "io.qmhotplug";

/// What a person or a program asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "parameters")]
pub enum Request {
    /// Give a container a device.
    #[serde(rename = "io.qmhotplug.Attach")]
    Attach(Attach),
    /// Take it back.
    #[serde(rename = "io.qmhotplug.Detach")]
    Detach(Detach),
    /// What is in force.
    #[serde(rename = "io.qmhotplug.List")]
    List(List),
    /// How the agent is.
    #[serde(rename = "io.qmhotplug.Status")]
    Status(Nothing),
    /// Read the configuration again.
    #[serde(rename = "io.qmhotplug.Reload")]
    Reload(Nothing),
    /// What happens from now on: a stream of [`crate::core::event::Event`], for callers that take more answers than one.
    #[serde(rename = "io.qmhotplug.Monitor")]
    Monitor(Monitor),
}

/// No parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

/// Parameters of `Attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// As [`crate::core::container::Reference`] reads it.
    pub container: String,
    /// Absolute path on the host; links are followed.
    pub device: String,
    /// Absolute path inside.
    pub destination: String,
    /// Rights.
    pub access: Access,
    /// Permission bits; the host node's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// Owner; the host node's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group; the host node's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// What is to be kept for the container's and the machine's restarts, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persist: Option<Persist>,
}

/// How a device is meant that is attached for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Persist {
    /// The device as it was typed: a path, or a selector.
    pub typed: String,
    /// The terms of the selector, without options, where it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
}

/// Parameters of `Detach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detach {
    /// As for `Attach`.
    pub container: String,
    /// The device's path on the host, or the node's path inside.
    pub device: String,
}

/// Parameters of `List`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// Only this container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// Parameters of `Monitor`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Monitor {
    /// Only of this container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// A grant as it is told to people and programs. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantInfo {
    /// Name of the container, or its id where it has none.
    pub container: String,
    /// Its id.
    pub id: String,
    /// The device's node on the host.
    pub device: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Rights, a subset of `rwm`.
    pub access: Access,
    /// What the right is: `filter`, an entry in the device filter, or `node` where the container has no filter of its own.
    #[serde(default = "filter")]
    pub right: String,
    /// Path of the node inside.
    pub path: String,
    /// Whose the node is: `ours`, `container's` or `host's`; `pending` while it is being made; `none` where something that
    /// was attached for good is not in force.
    pub node: String,
    /// Owner of the node.
    pub uid: u32,
    /// Group of the node.
    pub gid: u32,
    /// Permission bits of the node, as a number.
    pub mode: u32,
    /// `manual`, or `rule:` and the category.
    pub origin: String,
    /// Whether it is granted again after a restart of the container or of the machine, by `attach --persist`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub persist: bool,
    /// What else is to be said: left over, unplugged, container exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// An agent of another version does not say.
fn filter() -> String {
    right(true).to_owned()
}

/// What the right is, by whether the holder has a device filter.
pub fn right(has_filter: bool) -> &'static str {
    if has_filter { "filter" } else { "node" }
}

impl From<&Entry> for GrantInfo {
    fn from(entry: &Entry) -> GrantInfo {
        let grant = &entry.grant;
        GrantInfo {
            container: grant.holder.label().to_owned(),
            id: grant.holder.id.clone(),
            device: grant.device.node.clone(),
            kind: grant.device.number.kind,
            major: grant.device.number.major,
            minor: grant.device.number.minor,
            access: grant.access,
            right: right(grant.holder.has_filter()).to_owned(),
            path: grant.node.path.clone(),
            node: match entry.placement {
                Placement::Pending | Placement::Making(_) => "pending",
                Placement::Ours(_) => "ours",
                Placement::Container => "container's",
                Placement::Host => "host's",
            }
            .to_owned(),
            uid: grant.node.uid,
            gid: grant.node.gid,
            mode: grant.node.mode,
            origin: match &grant.origin {
                Origin::Manual | Origin::Persist => "manual".to_owned(),
                Origin::Rule(_) if grant.at_start && entry.placement == Placement::Container => "start".to_owned(),
                Origin::Rule(category) => format!("rule:{category}"),
            },
            persist: grant.origin == Origin::Persist,
            note: entry.left_over.as_ref().map(|reason| format!("left over: {reason}")),
        }
    }
}

/// How the agent and the filter are. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// Whether an agent answered.
    pub agent: bool,
    /// Its version, or this program's.
    pub version: String,
    /// `override`, `degraded` (a foreign program at the cgroup root runs after ours) or `none`.
    pub filter: String,
    /// Names of those foreign programs.
    pub after: Vec<String>,
    /// Entries in the filter's map.
    pub entries: usize,
    /// Rights that runtimes gave at a container's start, withdrawn while their device is unplugged.
    pub withdrawn: usize,
    /// Containers that run, as far as they are found.
    pub containers: usize,
    /// Grants in the ledger.
    pub grants: usize,
    /// Where device events come from: `udev`, `kernel`, or `none` without an agent.
    pub events: String,
    /// What is wrong with the configuration, each `FILE:LINE:COLUMN: REASON`: it was refused, or files were passed over.
    #[serde(default)]
    pub configuration: Vec<String>,
}

/// An answer: parameters, or an error's name with its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// `io.qmhotplug.NAME`, if it is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The answer, or `message` and `code` of an error.
    #[serde(default)]
    pub parameters: Value,
    /// Whether more answers to the same request follow.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
}

impl Reply {
    /// A good answer.
    pub fn good(parameters: impl Serialize) -> Reply {
        let parameters = serde_json::to_value(parameters).expect("an answer is valid JSON");
        Reply { error: None, parameters, continues: false }
    }

    /// An error, with the exit code that the command should end with.
    pub fn bad(code: u8, message: &str) -> Reply {
        let name = match code {
            2 => "Usage",
            3 => "NoSuchContainer",
            4 => "NoSuchDevice",
            5 => "Refused",
            6 => "TimedOut",
            _ => "Failed",
        };
        let parameters = json!({ "message": message, "code": code });
        Reply { error: Some(format!("{INTERFACE}.{name}")), parameters, continues: false }
    }

    /// The same, with more to follow.
    pub fn continued(self) -> Reply {
        Reply { continues: true, ..self }
    }
}

/// One message, with the NUL that ends it.
pub fn frame(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).expect("a message is valid JSON");
    bytes.push(0);
    bytes
}

/// A request as it comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// What is asked for.
    pub request: Request,
    /// Whether the caller takes more answers than one.
    pub more: bool,
}

impl Incoming {
    /// One that takes a stream.
    pub fn streamed(request: Request) -> Incoming {
        Incoming { request, more: true }
    }
}

/// As varlink has it: the request with `more`, where that is set.
impl Serialize for Incoming {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = serde_json::to_value(&self.request).map_err(serde::ser::Error::custom)?;
        if self.more {
            value["more"] = true.into();
        }
        value.serialize(serializer)
    }
}

/// Reads a request. Errors are in words.
pub fn parse_request(message: &[u8]) -> Result<Incoming, String> {
    let mut value: Value =
        serde_json::from_slice(message).map_err(|error| format!("this is no JSON object: {error}"))?;
    // Varlink lets a caller leave empty parameters out.
    if let Some(object) = value.as_object_mut() {
        object.entry("parameters").or_insert_with(|| json!({}));
    }
    let more = value.get("more").is_some_and(|more| *more == true);
    let request =
        serde_json::from_value(value).map_err(|error| format!("this is no request of {INTERFACE}: {error}"))?;
    match request {
        Request::Monitor(_) if !more => {
            Err(format!("{INTERFACE}.Monitor answers with a stream: ask with \"more\": true"))
        }
        request => Ok(Incoming { request, more }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_looks_as_varlink_has_it() {
        let request = Request::Detach(Detach { container: "web".into(), device: "/dev/x".into() });
        let text = frame(&request);
        assert_eq!(
            text.strip_suffix(b"\0").unwrap(),
            br#"{"method":"io.qmhotplug.Detach","parameters":{"container":"web","device":"/dev/x"}}"#
        );
        let parsed = |text: &[u8]| parse_request(text).map(|incoming| incoming.request);
        assert_eq!(parsed(text.strip_suffix(b"\0").unwrap()).unwrap(), request);
        assert_eq!(parsed(br#"{"method":"io.qmhotplug.List"}"#).unwrap(), Request::List(List::default()));
    }

    #[test]
    fn a_stream_is_for_those_who_ask_for_more() {
        let request = Incoming::streamed(Request::Monitor(Monitor { container: Some("web".into()) }));
        let text = frame(&request);
        assert_eq!(
            text.strip_suffix(b"\0").unwrap(),
            br#"{"method":"io.qmhotplug.Monitor","parameters":{"container":"web"},"more":true}"#
        );
        assert_eq!(parse_request(text.strip_suffix(b"\0").unwrap()).unwrap(), request);
        for more in ["", r#","more":false"#, r#","more":"true""#] {
            let text = format!(r#"{{"method":"io.qmhotplug.Monitor"{more}}}"#);
            assert!(parse_request(text.as_bytes()).unwrap_err().contains(r#""more": true"#), "{text}");
        }
        let reply = Reply::good(json!({}));
        assert_eq!(serde_json::to_string(&reply).unwrap(), r#"{"parameters":{}}"#);
        assert_eq!(serde_json::to_string(&reply.continued()).unwrap(), r#"{"parameters":{},"continues":true}"#);
    }

    #[test]
    fn nonsense_is_told_in_words() {
        assert!(parse_request(b"{").unwrap_err().starts_with("this is no JSON object"));
        assert!(parse_request(br#"{"method":"io.qmhotplug.Explode"}"#).unwrap_err().starts_with("this is no request"));
        assert!(parse_request(b"[]").is_err());
    }

    proptest! {
        #[test]
        fn no_request_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_request(&text);
        }
    }
}
