//! A configuration file, `*.toml` in `/etc/qm-hotplug/config.d` or `/usr/lib/qm-hotplug/config.d`:
//!
//! ```toml
//! enable = ["block"]
//!
//! [category.robot]
//! nodes = ["/dev/robot#", "/dev/arm/**"]
//! ```

use std::collections::BTreeMap;

use serde::Deserialize;

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
}

/// A category of character devices.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CategoryConfig {
    /// Patterns on the nodes' paths on the host; see [`crate::core::pattern::Pattern`].
    pub nodes: Vec<String>,
}

impl ConfigFile {
    /// Reads a file. The error is one line.
    pub fn parse(text: &str) -> Result<ConfigFile, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            excerpt(&format!("line {line}: {}", error.message().replace('\n', ", ")))
        })
    }
}
