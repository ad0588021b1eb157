//! What the agent tells those who monitor it.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::device::{Access, Kind, Number};
use crate::core::info::GrantInfo;
use crate::core::ledger::{Entry, Grant};

/// One event. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The first one: what happens from now on will be told, of this container or of all.
    Ready {
        /// Its name, or its id where it has none.
        container: Option<String>,
        /// Its id.
        id: Option<String>,
    },
    /// A device was plugged in, and these containers ask for it: what they are granted follows.
    Plugged(Plug),
    /// A device was unplugged, and these containers had it: what they are deprived of follows.
    Unplugged(Plug),
    /// A container with annotations of ours was refused a device. At most so many are told a second.
    Refused(Refused),
    /// A container was given a device.
    Granted(Changed),
    /// A device was taken from a container.
    Revoked(Changed),
    /// This reader was too slow to be told of so many events.
    Lost {
        /// How many.
        count: u64,
    },
}

/// A device that came or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plug {
    /// The device's node on the host.
    pub device: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Names of the containers, or their ids where they have none; sorted.
    pub containers: Vec<String>,
    /// Microseconds from hearing of it until that was known.
    pub micros: u64,
}

impl Plug {
    /// Of a device, and of those to whom these grants of it are made or were made.
    pub fn new<'a>(node: &str, number: Number, grants: impl Iterator<Item = &'a Grant>, micros: u64) -> Plug {
        let containers: BTreeSet<&str> = grants.map(|grant| grant.holder.label()).collect();
        let (Number { kind, major, minor }, device) = (number, node.to_owned());
        Plug { device, kind, major, minor, containers: containers.into_iter().map(str::to_owned).collect(), micros }
    }

    fn tell(&self, f: &mut fmt::Formatter<'_>, how: &str) -> fmt::Result {
        let number = Number { kind: self.kind, major: self.major, minor: self.minor };
        let containers = if self.containers.is_empty() { "no container" } else { &self.containers.join(", ") };
        write!(f, "{} ({number}) was {how} {containers} ({} µs)", self.device, self.micros)
    }
}

/// A refused open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Name of the container, or its id where it has none.
    pub container: String,
    /// Its id.
    pub id: String,
    /// `char` or `block`.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The device's node on the host, if the host has the device.
    pub device: Option<String>,
    /// What was wanted.
    pub access: Access,
    /// The annotation that would allow it, with its value, where there is one that the container has not.
    pub annotation: Option<String>,
}

/// A grant that came or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Name of the container, or its id where it has none.
    pub container: String,
    /// Its id.
    pub id: String,
    /// The device's node on the host.
    pub device: String,
    /// Path of the node inside.
    pub path: String,
    /// `manual`, `start`, or `rule:` and what asks for it.
    pub origin: String,
    /// Microseconds from hearing of the cause until it was done, where one event was the cause.
    pub micros: Option<u64>,
}

impl Changed {
    /// Of a line in the ledger.
    pub fn new(entry: &Entry, micros: Option<u64>) -> Changed {
        let GrantInfo { container, id, device, path, origin, .. } = GrantInfo::from(entry);
        Changed { container, id, device, path, origin, micros }
    }
}

impl Event {
    /// Whether it is to be told to one who asks for the container of that name and id.
    pub fn concerns(&self, container: &str, id: &str) -> bool {
        let (its_name, its_id) = match self {
            Event::Ready { .. } | Event::Lost { .. } => return true,
            Event::Plugged(plug) | Event::Unplugged(plug) => {
                return plug.containers.iter().any(|its| its == container || its == id);
            }
            Event::Refused(refused) => (&refused.container, &refused.id),
            Event::Granted(changed) | Event::Revoked(changed) => (&changed.container, &changed.id),
        };
        // Another run may have another id, and podman tells the name of one that is being made late.
        its_name == container || its_id == id
    }
}

/// As a person reads it.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Ready { container: Some(container), .. } => write!(f, "waiting for events of container {container}"),
            Event::Ready { .. } => f.write_str("waiting for events"),
            Event::Plugged(plug) => plug.tell(f, "plugged in, for"),
            Event::Unplugged(plug) => plug.tell(f, "unplugged, from"),
            Event::Refused(refused) => write!(f, "container {} was {refused}", refused.container),
            Event::Granted(changed) => write!(f, "container {} was granted {changed}", changed.container),
            Event::Revoked(changed) => write!(f, "container {} was deprived of {changed}", changed.container),
            Event::Lost { count } => write!(f, "{count} events were lost: they came faster than they were read"),
        }
    }
}

/// Without the container: `refused c 81:0 /dev/video0 (rw)`, and the annotation.
impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = Number { kind: self.kind, major: self.major, minor: self.minor };
        let node = self.device.as_deref().map(|node| format!(" {node}")).unwrap_or_default();
        write!(f, "refused {number}{node} ({})", self.access)?;
        match &self.annotation {
            Some(annotation) => write!(f, "; the annotation {annotation} would allow it"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.device)?;
        if self.path != self.device {
            write!(f, " at {}", self.path)?;
        }
        write!(f, " ({}", self.origin)?;
        match self.micros {
            Some(micros) => write!(f, ", {micros} µs)"),
            None => f.write_str(")"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused() -> Refused {
        Refused {
            container: "web".into(),
            id: "0123".into(),
            kind: Kind::Char,
            major: 81,
            minor: 0,
            device: Some("/dev/video0".into()),
            access: "rw".parse().unwrap(),
            annotation: Some("org.containers.qm.device.video=true".into()),
        }
    }

    fn changed() -> Changed {
        Changed {
            container: "web".into(),
            id: "0123".into(),
            device: "/dev/ttyUSB0".into(),
            path: "/dev/zigbee".into(),
            origin: "rule:ttyUSB".into(),
            micros: Some(285),
        }
    }

    fn plug(containers: &[&str]) -> Plug {
        let containers = containers.iter().map(|name| (*name).to_owned()).collect();
        Plug { device: "/dev/ttyUSB0".into(), kind: Kind::Char, major: 188, minor: 0, containers, micros: 85 }
    }

    #[test]
    fn each_event_as_programs_and_people_read_it() {
        for (event, value, text) in [
            (
                Event::Ready { container: None, id: None },
                json!({ "event": "ready", "container": null, "id": null }),
                "waiting for events",
            ),
            (
                Event::Plugged(plug(&["web", "zigbee"])),
                json!({
                    "event": "plugged", "device": "/dev/ttyUSB0", "kind": "char", "major": 188, "minor": 0,
                    "containers": ["web", "zigbee"], "micros": 85,
                }),
                "/dev/ttyUSB0 (c 188:0) was plugged in, for web, zigbee (85 µs)",
            ),
            (
                Event::Unplugged(plug(&[])),
                json!({
                    "event": "unplugged", "device": "/dev/ttyUSB0", "kind": "char", "major": 188, "minor": 0,
                    "containers": [], "micros": 85,
                }),
                "/dev/ttyUSB0 (c 188:0) was unplugged, from no container (85 µs)",
            ),
            (
                Event::Refused(refused()),
                json!({
                    "event": "refused", "container": "web", "id": "0123", "kind": "char", "major": 81, "minor": 0,
                    "device": "/dev/video0", "access": "rw", "annotation": "org.containers.qm.device.video=true",
                }),
                "container web was refused c 81:0 /dev/video0 (rw); the annotation org.containers.qm.device.video=true would allow it",
            ),
            (
                Event::Refused(Refused { device: None, annotation: None, ..refused() }),
                json!({
                    "event": "refused", "container": "web", "id": "0123", "kind": "char", "major": 81, "minor": 0,
                    "device": null, "access": "rw", "annotation": null,
                }),
                "container web was refused c 81:0 (rw)",
            ),
            (
                Event::Granted(changed()),
                json!({
                    "event": "granted", "container": "web", "id": "0123", "device": "/dev/ttyUSB0",
                    "path": "/dev/zigbee", "origin": "rule:ttyUSB", "micros": 285,
                }),
                "container web was granted /dev/ttyUSB0 at /dev/zigbee (rule:ttyUSB, 285 µs)",
            ),
            (
                Event::Revoked(Changed { path: "/dev/ttyUSB0".into(), micros: None, ..changed() }),
                json!({
                    "event": "revoked", "container": "web", "id": "0123", "device": "/dev/ttyUSB0",
                    "path": "/dev/ttyUSB0", "origin": "rule:ttyUSB", "micros": null,
                }),
                "container web was deprived of /dev/ttyUSB0 (rule:ttyUSB)",
            ),
            (
                Event::Lost { count: 7 },
                json!({ "event": "lost", "count": 7 }),
                "7 events were lost: they came faster than they were read",
            ),
        ] {
            assert_eq!(serde_json::to_value(&event).unwrap(), value);
            // As it comes over the socket.
            let read: serde_json::Value = serde_json::from_str(&serde_json::to_string(&event).unwrap()).unwrap();
            assert_eq!(serde_json::from_value::<Event>(read).unwrap(), event);
            assert_eq!(event.to_string(), text);
        }
    }

    #[test]
    fn one_container_is_known_by_name_or_id() {
        let event = Event::Refused(refused());
        assert!(event.concerns("web", "4567") && event.concerns("other", "0123") && !event.concerns("other", "4567"));
        assert!(Event::Lost { count: 1 }.concerns("other", "4567"));
        let event = Event::Plugged(plug(&["web", "0123"]));
        assert!(event.concerns("web", "4567") && event.concerns("other", "0123") && !event.concerns("other", "4567"));
    }
}
