//! A configuration file, `*.toml` in `/etc/qm-hotplug/config.d` or `/usr/lib/qm-hotplug/config.d`:
//!
//! ```toml
//! enable = ["block"]
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
    pub enable: Vec<String>,
    /// More categories, by name.
    #[serde(default)]
    pub category: BTreeMap<String, CategoryConfig>,
    /// Whether annotations get only what a policy allows.
    #[serde(default, rename = "require-policy")]
    pub require_policy: Option<Spanned<bool>>,
    /// What annotations may ask for.
    #[serde(default)]
    pub policy: Vec<Spanned<PolicyConfig>>,
    /// What containers get without asking.
    #[serde(default)]
    pub container: Vec<ContainerConfig>,
}

/// A category of character devices.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CategoryConfig {
    /// Patterns on the nodes' paths on the host; see [`crate::core::pattern::Pattern`].
    pub nodes: Vec<String>,
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

impl ConfigFile {
    /// Reads a file. The error is one line.
    pub fn parse(text: &str) -> Result<ConfigFile, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            excerpt(&format!("line {line}: {}", error.message().replace('\n', ", ")))
        })
    }
}

/// The line, counted from 1, that has the byte at this offset.
pub fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}
