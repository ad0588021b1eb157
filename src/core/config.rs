//! A configuration file, `*.toml` in `/etc/qm-hotplug/config.d` or `/usr/lib/qm-hotplug/config.d`:
//!
//! ```toml
//! enable = ["block"]
//! users = [1000]
//! require-policy = true
//!
//! [category.robot]
//! nodes = ["/dev/robot#", "/dev/arm/**"]
//!
//! [[policy]]
//! container = "web-*"
//! allow = ["ttyUSB", "usb=10c4:ea60"]
//! deny = ["serial=A1B2"]
//!
//! [[container]]
//! match = "podman:home-assistant"
//! devices = ["tty,usb=10c4:ea60,as=/dev/zigbee"]
//!
//! [[operator]]
//! group = "video-ops"
//! container = "cam-*"
//! allow = ["video"]
//! ```

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use crate::core::text::excerpt;

/// What one file says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// Categories that are off unless a file enables them.
    #[serde(default)]
    pub enable: Vec<Spanned<String>>,
    /// Ordinary users whose containers are looked for, by number.
    #[serde(default)]
    pub users: Vec<u32>,
    /// More categories, by name.
    #[serde(default)]
    pub category: BTreeMap<Spanned<String>, CategoryConfig>,
    /// Whether annotations get only what a policy allows.
    #[serde(default, rename = "require-policy")]
    pub require_policy: Option<Spanned<bool>>,
    /// What annotations may ask for.
    #[serde(default)]
    pub policy: Vec<Spanned<PolicyConfig>>,
    /// What containers get without asking.
    #[serde(default)]
    pub container: Vec<ContainerConfig>,
    /// Who beside root may attach and detach.
    #[serde(default)]
    pub operator: Vec<Spanned<OperatorConfig>>,
}

/// A category of character devices.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CategoryConfig {
    /// Patterns on the nodes' paths on the host; see [`crate::core::pattern::Pattern`].
    pub nodes: Vec<Spanned<String>>,
}

/// Bounds for the containers that all its conditions fit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// A glob on the container's name and on its id.
    pub container: Option<Spanned<String>>,
    /// A glob on the name of its image.
    pub image: Option<Spanned<String>>,
    /// The user who runs it, by number.
    pub owner: Option<u32>,
    /// A glob on the path of its cgroup.
    pub cgroup: Option<Spanned<String>>,
    /// Selectors: only these devices.
    pub allow: Option<Vec<Spanned<String>>>,
    /// Selectors: not these devices.
    #[serde(default)]
    pub deny: Vec<Spanned<String>>,
}

/// Devices for the containers of that name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerConfig {
    /// A glob on the container's name and on its id, perhaps with `podman:` before it.
    #[serde(rename = "match")]
    pub matches: Spanned<String>,
    /// Selectors with options.
    pub devices: Vec<Spanned<String>>,
}

/// Somebody who may attach devices and detach them, by `user` or by `group`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorConfig {
    /// A user, by name or number.
    pub user: Option<IdConfig>,
    /// All of a group, by name or number.
    pub group: Option<IdConfig>,
    /// A glob on the container's name and on its id.
    pub container: Option<Spanned<String>>,
    /// Selectors: these devices.
    pub allow: Vec<Spanned<String>>,
}

/// A user or a group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum IdConfig {
    /// By number.
    Number(u32),
    /// By name.
    Name(String),
}

/// What is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Offset of the byte at which it is wrong.
    pub at: usize,
    /// In words, on one line.
    pub reason: String,
}

impl Wrong {
    /// Something that a file says, from its beginning on.
    pub fn of<T>(what: &Spanned<T>, reason: impl AsRef<str>) -> Wrong {
        Wrong { at: what.span().start, reason: excerpt(reason.as_ref()) }
    }

    /// A string of the file, at its character `column`, counted from 1. Where the string has escapes, its place is that of
    /// its beginning, and the reason says which character it is.
    pub fn in_string(text: &str, string: &Spanned<String>, column: usize, reason: &str) -> Wrong {
        let (value, span) = (string.get_ref(), string.span());
        let Some(start) = text.get(span.clone()).and_then(|written| written.find(value.as_str())) else {
            return Wrong::of(string, format!("in \"{value}\", character {column}: {reason}"));
        };
        let within = value.char_indices().nth(column.saturating_sub(1)).map_or(value.len(), |(at, _)| at);
        Wrong { at: span.start + start + within, reason: format!("in \"{}\": {}", excerpt(value), excerpt(reason)) }
    }

    /// `PATH:LINE:COLUMN: REASON`, for the file with this text.
    pub fn at_place(&self, path: &str, text: &str) -> String {
        let before = text.get(..self.at).unwrap_or(text);
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!("{path}:{}:{column}: {}", line_of(text, self.at), self.reason)
    }
}

impl ConfigFile {
    /// Reads a file.
    pub fn parse(text: &str) -> Result<ConfigFile, Wrong> {
        toml::from_str(text).map_err(|error: toml::de::Error| Wrong {
            at: error.span().map_or(0, |span| span.start),
            reason: excerpt(&error.message().replace('\n', ", ")),
        })
    }
}

/// The line, counted from 1, that has the byte at this offset.
pub fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}
