//! What libudev in a container is shown of a device: an entry of udev's database, links, and messages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::core::annotation::UDEV;
use crate::core::device::Number;
use crate::core::ledger::Granted;

/// Where udev's database is, on the host as inside.
pub const RUN_UDEV: &str = "/run/udev";

/// Whether a container is shown what udev knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Unless it runs systemd, or a udevd of its own.
    Usual,
    /// In any case.
    Always,
    /// Not at all.
    Never,
}

impl Wish {
    /// From the value of the annotation [`UDEV`]. One that cannot be read says nothing.
    pub fn of<'a>(mut annotations: impl Iterator<Item = (&'a str, &'a str)>) -> Wish {
        match annotations.find(|(key, _)| *key == UDEV).map(|(_, value)| value) {
            Some("true" | "1" | "yes") => Wish::Always,
            Some("false" | "0" | "no") => Wish::Never,
            _ => Wish::Usual,
        }
    }
}

/// What udev tells of a device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Profile {
    /// The device's directory below `/sys`.
    pub devpath: String,
    /// Inode of that directory: tells it from a later device in its place.
    #[serde(default)]
    pub inode: u64,
    /// All properties, as libudev gives them.
    pub properties: BTreeMap<String, String>,
    /// The kernel's own, as they stand in the device's file `uevent` below `/sys`.
    pub uevent: String,
    /// Its entry in udev's database; `None` where no udevd has made one.
    pub record: Option<String>,
}

/// What the host knows of a device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Description {
    /// Of the device itself.
    pub profile: Profile,
    /// Links below `/dev` that lead to its node on the host.
    pub links: Vec<String>,
    /// The device without a node that it is a part of: a sound card, of which PulseAudio and PipeWire want to hear, or an
    /// input device.
    pub whole: Option<Profile>,
}

/// A device as it is shown to a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Which one.
    pub device: Granted,
    /// The path of its node inside: links lead there.
    pub node: String,
    /// What is told of it.
    pub description: Description,
    /// Whether all of it is done: else it was only written down before the act.
    pub is_done: bool,
}

/// The name of a device's entry in udev's database (systemd's sd-device.c): `c188:0`, `b8:16`.
pub fn record_name(number: Number) -> String {
    format!("{}{}:{}", number.kind.letter(), number.major, number.minor)
}

/// The tags in an entry of udev's database. Each is the name of a directory there.
pub fn tags(record: &str) -> impl Iterator<Item = &str> {
    let tags = record.lines().filter_map(|line| line.strip_prefix("G:"));
    tags.filter(|tag| !tag.is_empty() && !tag.contains('/') && !tag.starts_with('.'))
}

impl Shown {
    /// Each link with what it has in it, where it is at another place than a node of the container's.
    pub fn links(&self) -> impl Iterator<Item = (&str, String)> {
        let links = self.description.links.iter().filter(|link| **link != self.node);
        links.filter_map(|link| Some((link.as_str(), relative(link, &self.node)?)))
    }
}

impl Profile {
    /// The name of the entry in udev's database of a device without a node (systemd's sd-device.c): `+sound:card0`.
    pub fn name(&self) -> String {
        let name = self.devpath.rsplit('/').next().unwrap_or_default();
        format!("+{}:{name}", self.subsystem())
    }

    /// Whether both are of the same device, whatever is told of it.
    pub fn is_same(&self, other: &Profile) -> bool {
        (&self.devpath, self.inode) == (&other.devpath, other.inode)
    }

    /// libudev drops messages without one.
    fn subsystem(&self) -> &str {
        self.properties.get("SUBSYSTEM").map_or("unknown", String::as_str)
    }

    /// udev's message: what happened, and all that is known of the device.
    pub fn message<'a>(
        &'a self,
        action: &'a str,
        sequence: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> + Clone {
        let own =
            [("ACTION", action), ("DEVPATH", &*self.devpath), ("SEQNUM", sequence), ("SUBSYSTEM", self.subsystem())];
        let others = self.properties.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        own.into_iter().chain(others.filter(move |(key, _)| !own.iter().any(|(its, _)| its == key)))
    }

    /// The kernel's own message, without what comes first and last.
    pub fn kernels(&self) -> impl Iterator<Item = (&str, &str)> + Clone {
        let lines = self.uevent.lines().filter_map(|line| line.split_once('='));
        std::iter::once(("SUBSYSTEM", self.subsystem())).chain(lines)
    }
}

/// The way from a link to a path, both absolute, as udev writes it: `/dev/serial/by-id/x` → `/dev/ttyUSB0` is
/// `../../ttyUSB0`. `None` where one of them has no name.
fn relative(link: &str, target: &str) -> Option<String> {
    let parts = |path: &str| path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let (link, target) = (parts(link), parts(target));
    let directory = &link[..link.len().checked_sub(1)?];
    let common = directory.iter().zip(&target).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n("..".to_owned(), directory.len() - common);
    (common < target.len()).then(|| up.chain(target[common..].iter().cloned()).collect::<Vec<_>>().join("/"))
}

/// The actions that udevd tells of (systemd's device-private.h), but for `remove`.
pub const ACTIONS: [&str; 7] = ["add", "change", "move", "online", "offline", "bind", "unbind"];

/// A message of udev's about a device that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// One of [`ACTIONS`].
    pub action: &'static str,
    /// The number of the event, counted by the kernel.
    pub sequence: u64,
    /// Whether it is about the device that this one is a part of.
    pub of_whole: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::plan::tests::device;

    fn shown(node: &str, links: &[&str]) -> Shown {
        let device = device("/dev/ttyUSB0", 188, 0);
        let links = links.iter().map(|link| (*link).to_owned()).collect();
        let properties =
            [("SUBSYSTEM", "tty"), ("ACTION", "x"), ("ID_MODEL", "m")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let uevent = "MAJOR=188\nMINOR=0\nDEVNAME=ttyUSB0\n".to_owned();
        let devpath = device.identity.devpath.clone();
        let profile = Profile { devpath, inode: 1, properties: properties.into(), uevent, record: None };
        let description = Description { profile, links, whole: None };
        Shown { device: Granted::from(&device), node: node.into(), description, is_done: true }
    }

    #[test]
    fn links_lead_to_the_node_inside() {
        let links = ["/dev/serial/by-id/usb-x", "/dev/modem", "/dev/zigbee/stick"];
        let of = |node: &str| shown(node, &links).links().map(|(_, to)| to).collect::<Vec<_>>();
        assert_eq!(of("/dev/ttyUSB0"), ["../../ttyUSB0", "ttyUSB0", "../ttyUSB0"]);
        // A node at a link's place has no link there.
        assert_eq!(of("/dev/zigbee/stick"), ["../../zigbee/stick", "zigbee/stick"]);
        assert_eq!(of("/opt/stick"), ["../../../opt/stick", "../opt/stick", "../../opt/stick"]);
    }

    #[test]
    fn a_message_has_what_libudev_needs_once() {
        let profile = shown("/dev/ttyUSB0", &[]).description.profile;
        let all: Vec<_> = profile.message("remove", "12").collect();
        let devpath = profile.devpath.as_str();
        let expected =
            [("ACTION", "remove"), ("DEVPATH", devpath), ("SEQNUM", "12"), ("SUBSYSTEM", "tty"), ("ID_MODEL", "m")];
        assert_eq!(all, expected);
        let kernels: Vec<_> = profile.kernels().collect();
        assert_eq!(kernels, [("SUBSYSTEM", "tty"), ("MAJOR", "188"), ("MINOR", "0"), ("DEVNAME", "ttyUSB0")]);
    }

    #[test]
    fn what_has_no_node_is_named_by_its_subsystem() {
        let properties = [("SUBSYSTEM".to_owned(), "sound".to_owned())].into();
        let card = Profile { devpath: "/devices/pci/sound/card0".into(), properties, ..Profile::default() };
        assert_eq!(card.name(), "+sound:card0");
    }

    #[test]
    fn tags_are_names_of_files() {
        assert_eq!(
            tags("I:1\nG:systemd\nE:G:x\nG:../a\nG:seat\nQ:seat\nG:\nG:.\n").collect::<Vec<_>>(),
            ["systemd", "seat"]
        );
    }

    #[test]
    fn wishes() {
        let of = |value: &'static str| Wish::of([("a", "b"), (UDEV, value)].into_iter());
        assert_eq!(
            (of("true"), of("no"), of("maybe"), Wish::of([].into_iter())),
            (Wish::Always, Wish::Never, Wish::Usual, Wish::Usual)
        );
    }
}
