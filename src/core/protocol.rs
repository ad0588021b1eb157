//! What goes over the agent's socket: varlink (varlink.org), JSON objects that a NUL byte ends. `io.qmhotplug.varlink` is the
//! interface.
//!
//! The framing is ours, a few lines: the crates for varlink need a newer compiler than we do, and read a message of any
//! length.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::core::device::Access;
use crate::core::info::GrantInfo;

/// What the names of our methods and errors start with.
pub const INTERFACE: &str = "io.qmhotplug";
/// The interface that every service has.
pub const SERVICE: &str = "org.varlink.service";

/// The interfaces, with their descriptions.
const INTERFACES: [(&str, &str); 2] =
    [(SERVICE, include_str!("org.varlink.service.varlink")), (INTERFACE, include_str!("io.qmhotplug.varlink"))];

/// What a person or a program asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
    /// The devices of this host.
    #[serde(rename = "io.qmhotplug.Devices")]
    Devices(Devices),
    /// The running containers.
    #[serde(rename = "io.qmhotplug.Containers")]
    Containers(Nothing),
    /// Why a container can or cannot open a device.
    #[serde(rename = "io.qmhotplug.Explain")]
    Explain(Explain),
    /// Whether it can.
    #[serde(rename = "io.qmhotplug.Verify")]
    Verify(Verify),
    /// How the agent is.
    #[serde(rename = "io.qmhotplug.Status")]
    Status(Nothing),
    /// What happens from now on: a stream of [`crate::core::event::Event`], for callers that take more answers than one.
    #[serde(rename = "io.qmhotplug.Monitor")]
    Monitor(Monitor),
    /// Read the configuration again.
    #[serde(rename = "io.qmhotplug.Reload")]
    Reload(Nothing),
    /// Who answers.
    #[serde(rename = "org.varlink.service.GetInfo")]
    GetInfo(Nothing),
    /// What it can be asked.
    #[serde(rename = "org.varlink.service.GetInterfaceDescription")]
    GetInterfaceDescription(GetInterfaceDescription),
}

/// No parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Parameters of `Attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// As [`crate::core::container::Reference`] reads it.
    pub container: String,
    /// Absolute path on the host; links are followed.
    pub device: String,
    /// Absolute path inside; the device's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// Rights; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
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
#[serde(deny_unknown_fields)]
pub struct Persist {
    /// The device as it was typed: a path, or a selector.
    pub typed: String,
    /// The terms of the selector, without options, where it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
}

/// Parameters of `Detach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// As for `Attach`.
    pub container: String,
    /// The device's path on the host, or the node's path inside.
    pub device: String,
}

/// Parameters of `List`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    /// Only this container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// Parameters of `Monitor`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// Only of this container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// Parameters of `Devices`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// Only those that this means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
}

/// Parameters of `Explain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Explain {
    /// As for `Attach`.
    pub container: String,
    /// Absolute path on the host or inside.
    pub device: String,
}

/// Parameters of `Verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verify {
    /// As for `Attach`.
    pub container: String,
    /// Absolute path on the host or inside; all that it was granted if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Whether each is also opened for a moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<bool>,
}

/// Parameters of `GetInterfaceDescription`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetInterfaceDescription {
    /// Its name.
    pub interface: String,
}

/// The answer to `Attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OneGrant {
    /// What was made, or was there.
    pub grant: GrantInfo,
}

/// The answer to `Detach` and to `List`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// What is gone, or what there is.
    pub grants: Vec<GrantInfo>,
}

/// An answer: parameters, or an error's name with its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// `INTERFACE.NAME`, if it is an error.
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

    /// An error that every service has.
    fn of_service(name: &str, parameters: Value) -> Reply {
        Reply { error: Some(format!("{SERVICE}.{name}")), parameters, continues: false }
    }

    /// The caller may not do that.
    pub fn denied() -> Reply {
        Reply::of_service("PermissionDenied", json!({}))
    }

    /// Who answers.
    pub fn info() -> Reply {
        Reply::good(json!({
            "vendor": "qm-hotplug",
            "product": env!("CARGO_PKG_DESCRIPTION"),
            "version": env!("CARGO_PKG_VERSION"),
            "url": "https://github.com/containers/qm",
            "interfaces": INTERFACES.map(|(name, _)| name),
        }))
    }

    /// The description of an interface.
    pub fn description(request: &GetInterfaceDescription) -> Reply {
        match INTERFACES.iter().find(|(name, _)| *name == request.interface) {
            Some((_, description)) => Reply::good(json!({ "description": description })),
            None => Reply::of_service("InterfaceNotFound", json!({ "interface": request.interface })),
        }
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
    /// Whether the caller takes none.
    pub oneway: bool,
}

impl Incoming {
    /// One that takes a stream.
    pub fn streamed(request: Request) -> Incoming {
        Incoming { request, more: true, oneway: false }
    }
}

/// As a client of ours sends it.
impl Serialize for Incoming {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = serde_json::to_value(&self.request).map_err(serde::ser::Error::custom)?;
        if self.more {
            value["more"] = true.into();
        }
        value.serialize(serializer)
    }
}

/// Why a message is no request.
#[derive(Debug, Clone, PartialEq)]
pub enum Bad {
    /// It is no varlink at all, why in words: there is nobody to answer.
    NoMessage(String),
    /// The answer; none to a caller who takes none.
    Refused(Option<Reply>),
}

/// A message as varlink has it.
#[derive(Deserialize)]
struct Message {
    method: String,
    parameters: Option<Map<String, Value>>,
    #[serde(default)]
    more: bool,
    #[serde(default)]
    oneway: bool,
    #[serde(default)]
    upgrade: bool,
}

/// Reads a request.
pub fn parse_request(message: &[u8]) -> Result<Incoming, Bad> {
    let no_message = |error: serde_json::Error| Bad::NoMessage(format!("this is no varlink message: {error}"));
    let Message { method, parameters, more, oneway, upgrade } = serde_json::from_slice(message).map_err(no_message)?;
    let refused = |reply: Reply| Bad::Refused((!oneway).then_some(reply));
    if upgrade {
        return Err(refused(Reply::of_service("InvalidParameter", json!({ "parameter": "upgrade" }))));
    }
    // Varlink lets a caller leave empty parameters out.
    let request = request(&method, parameters.unwrap_or_default().into()).map_err(refused)?;
    match request {
        Request::Monitor(_) if !more => Err(refused(Reply::of_service("ExpectedMore", json!({})))),
        request => Ok(Incoming { request, more, oneway }),
    }
}

/// The error is the answer.
fn request(method: &str, parameters: Value) -> Result<Request, Reply> {
    let Some((interface, name)) = method.rsplit_once('.') else {
        return Err(Reply::of_service("MethodNotFound", json!({ "method": method })));
    };
    match (interface, name) {
        (INTERFACE, "Attach") => read(parameters).map(Request::Attach),
        (INTERFACE, "Detach") => read(parameters).map(Request::Detach),
        (INTERFACE, "List") => read(parameters).map(Request::List),
        (INTERFACE, "Devices") => read(parameters).map(Request::Devices),
        (INTERFACE, "Containers") => read(parameters).map(Request::Containers),
        (INTERFACE, "Explain") => read(parameters).map(Request::Explain),
        (INTERFACE, "Verify") => read(parameters).map(Request::Verify),
        (INTERFACE, "Status") => read(parameters).map(Request::Status),
        (INTERFACE, "Monitor") => read(parameters).map(Request::Monitor),
        (INTERFACE, "Reload") => read(parameters).map(Request::Reload),
        (SERVICE, "GetInfo") => read(parameters).map(Request::GetInfo),
        (SERVICE, "GetInterfaceDescription") => read(parameters).map(Request::GetInterfaceDescription),
        (INTERFACE | SERVICE, _) => Err(Reply::of_service("MethodNotFound", json!({ "method": method }))),
        _ => Err(Reply::of_service("InterfaceNotFound", json!({ "interface": interface }))),
    }
}

/// Reads parameters; the answer to wrong ones names the first that is wrong.
fn read<T: DeserializeOwned>(parameters: Value) -> Result<T, Reply> {
    serde_path_to_error::deserialize(parameters).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner().to_string();
        // One that is missing has no path, but is named in the reason.
        let named = || reason.split('`').nth(1).unwrap_or("parameters").to_owned();
        let parameter = if path == "." { named() } else { path };
        Reply::of_service("InvalidParameter", json!({ "parameter": parameter }))
    })
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
