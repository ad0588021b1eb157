//! A selector with its options: the value of `org.containers.qm.hotplug.NAME`, and an entry of `devices` in a
//! configuration file.
//!
//! ```text
//! option   = "as=" PATH          ; the node's path inside, whatever it is outside
//!          / "link=" PATH        ; a symbolic link inside to the node; may be repeated
//!          / "links=udev"        ; the links that udev made to the node outside
//!          / "access=" *("r" / "w" / "m") / "mode=" OCTAL / "uid=" NUMBER / "gid=" ( NUMBER / GROUP )
//!          / "required"          ; the container does not start without it
//!          / "wait=" DURATION    ; how long its start waits for it: 500ms, 5s, 1m
//!          / "exclusive"         ; one container at a time has the device
//!          / "children"          ; also the tty, hidraw, sound and input nodes of the same USB device
//! ```

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use crate::core::destination;
use crate::core::device::{Access, Device};
use crate::core::facts::{Facts, Other};
use crate::core::ledger::Node;
use crate::core::selector::{Selector, quoted};

/// Which devices a container asks for, and how it wants them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// What the rule is called: the annotation's `NAME`, or the text in a configuration file.
    pub name: String,
    /// Which devices.
    pub selector: Selector,
    /// How.
    pub options: Options,
    /// Whether root wrote it into a configuration file: then no policy bounds it.
    pub trusted: bool,
    /// Whether a person attached it for good: then it is told as that.
    pub persist: bool,
}

/// How a container wants its devices. What is not given is as on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Path of the node inside.
    pub path: Option<String>,
    /// Paths of links to it.
    pub links: Vec<String>,
    /// Whether udev's links are made, too.
    pub udev_links: bool,
    /// Rights.
    pub access: Option<Access>,
    /// Permission bits of the node.
    pub mode: Option<u32>,
    /// Owner of the node.
    pub uid: Option<u32>,
    /// Group of the node.
    pub gid: Option<Group>,
    /// Whether the container does not start without it.
    pub required: bool,
    /// How long its start waits for it.
    pub wait: Option<Duration>,
    /// Whether one container at a time may have the device.
    pub exclusive: bool,
    /// Whether other nodes of the same USB device belong to it.
    pub children: bool,
}

/// A group inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    /// By number.
    Number(u32),
    /// By its name in the container's `/etc/group`.
    Name(String),
}

impl Group {
    /// Numbers by name, from the text of the container's `/etc/group` (group(5)). The first of a name counts.
    pub fn all_in(text: &str) -> HashMap<String, u32> {
        let mut all = HashMap::new();
        for line in text.lines() {
            let mut fields = line.split(':');
            if let (Some(name), Some(Ok(number))) = (fields.next(), fields.nth(1).map(|text| text.trim().parse())) {
                all.entry(name.to_owned()).or_insert(number);
            }
        }
        all
    }
}

/// How a device came to be meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matched {
    /// The terms match it.
    Itself,
    /// The terms match another node of the same USB device.
    Child,
}

/// Subsystems of the nodes that `children` brings.
const OF_CHILDREN: [&str; 4] = ["tty", "hidraw", "sound", "input"];

impl Selection {
    /// Whether the device is meant, and how.
    pub fn matches(&self, facts: &Facts<'_>) -> Option<Matched> {
        if self.selector.matches(facts) {
            return Some(Matched::Itself);
        }
        let may_be_child = self.options.children
            && OF_CHILDREN.contains(&facts.device.subsystem.as_str())
            && !self.selector.is_withheld(facts);
        let matches = |other: &Other| {
            let others = facts.of(other);
            self.selector.terms.iter().all(|term| term.matches(&others))
        };
        (may_be_child && facts.family().iter().any(matches)).then_some(Matched::Child)
    }

    /// Whether other devices decide on one, too: then it has to be looked at again when one of them comes or goes.
    pub fn looks_around(&self) -> bool {
        self.options.children || self.selector.looks_around()
    }

    /// The nodes that the container gets for a device: the device's own first, then the links to it. `gid` is the
    /// number of the group that the options name, if they do.
    pub fn nodes(&self, device: &Device, how: Matched, gid: Option<u32>) -> Vec<Node> {
        let options = &self.options;
        let own = Node {
            path: options.path.clone().filter(|_| how == Matched::Itself).unwrap_or_else(|| device.node.clone()),
            uid: options.uid.unwrap_or(device.uid),
            gid: gid.unwrap_or(device.gid),
            mode: options.mode.unwrap_or(device.mode),
            link_to: None,
        };
        let named = options.links.iter().map(String::as_str).filter(|_| how == Matched::Itself);
        let of_udev = device.properties.get("DEVLINKS").map(String::as_str).filter(|_| options.udev_links);
        // udev's names come from the device: they are checked like everybody's.
        let of_udev = of_udev
            .unwrap_or_default()
            .split_whitespace()
            .filter(|path| path.starts_with("/dev/") && destination::check(path).is_ok_and(|checked| checked == *path));
        let mut nodes = vec![own];
        for path in named.chain(of_udev) {
            if nodes.iter().all(|node| node.path != path) {
                let link = Node { path: path.to_owned(), link_to: Some(nodes[0].path.clone()), ..nodes[0].clone() };
                nodes.push(link);
            }
        }
        nodes
    }

    /// Whether a node at that path may have been made for it.
    pub fn may_have_made(&self, path: &str) -> bool {
        self.options.path.as_deref() == Some(path) || self.options.links.iter().any(|link| link == path)
    }
}

/// `500ms`, `5s`, `1m`, or a number of seconds.
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().ok()?;
    match &text[digits..] {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        _ => None,
    }
}

/// The number of a user or a group. The highest one is none: to chown(2) it means to change nothing.
pub(super) fn number(value: &str) -> Option<u32> {
    value.parse().ok().filter(|number| *number != u32::MAX)
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut items = Vec::new();
        items.extend(self.path.iter().map(|path| format!("as={}", quoted(path))));
        items.extend(self.links.iter().map(|path| format!("link={}", quoted(path))));
        items.extend(self.udev_links.then(|| "links=udev".to_owned()));
        items.extend(self.access.map(|access| format!("access={access}")));
        items.extend(self.mode.map(|mode| format!("mode={mode:04o}")));
        items.extend(self.uid.map(|uid| format!("uid={uid}")));
        items.extend(self.gid.as_ref().map(|gid| match gid {
            Group::Number(gid) => format!("gid={gid}"),
            Group::Name(name) => format!("gid={name}"),
        }));
        items.extend(self.wait.map(|wait| match wait.as_millis() {
            millis if millis % 1000 == 0 => format!("wait={}s", millis / 1000),
            millis => format!("wait={millis}ms"),
        }));
        for (is_set, name) in [(self.required, "required"), (self.exclusive, "exclusive"), (self.children, "children")]
        {
            items.extend(is_set.then(|| name.to_owned()));
        }
        f.write_str(&items.join(","))
    }
}

/// As it is written: reading it gives the same.
impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = self.options.to_string();
        let comma = if options.is_empty() { "" } else { "," };
        write!(f, "{}{comma}{options}", self.selector)
    }
}
