//! Categories: what `org.containers.qm.device.NAME` stands for. One table for the hook and the agent.

use crate::core::device::{Device, Kind};

/// A named set of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Category {
    /// The last part of the annotation, `ttyUSB`.
    pub name: &'static str,
    /// Patterns on the node's path. They may end in `#` (a number), `[a-b]` (one character) or `/**` (all below).
    pub patterns: &'static [&'static str],
}

/// The categories of containers/qm's device manager, with the same meaning.
pub const CATEGORIES: &[Category] = &[
    Category { name: "audio", patterns: &["/dev/snd/**"] },
    Category { name: "video", patterns: &["/dev/video#", "/dev/media#"] },
    Category { name: "input", patterns: &["/dev/input/**"] },
    Category { name: "ttys", patterns: &["/dev/tty[0-7]"] },
    Category { name: "ttyUSB", patterns: &["/dev/ttyUSB#"] },
    Category { name: "dvb", patterns: &["/dev/dvb/**"] },
    Category { name: "radio", patterns: &["/dev/radio#"] },
];

impl Category {
    /// The category of that name.
    pub fn named(name: &str) -> Option<&'static Category> {
        CATEGORIES.iter().find(|category| category.name == name)
    }

    /// Whether the device is in the category. All of today's are character devices.
    pub fn contains(&self, device: &Device) -> bool {
        device.number.kind == Kind::Char && self.contains_node(&device.node)
    }

    /// Whether a node of that path would be in the category.
    pub fn contains_node(&self, node: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern_matches(pattern, node))
    }

    /// The directories, and whether to look below them, that hold every node of the category.
    pub fn places(&self) -> impl Iterator<Item = (&'static str, bool)> {
        self.patterns.iter().map(|pattern| match pattern.strip_suffix("/**") {
            Some(directory) => (directory, true),
            None => (&pattern[..pattern.rfind('/').unwrap_or(0)], false),
        })
    }
}

/// Matches a path against a pattern that may end in `#` (one or more digits), `[a-b]` (one character of that range)
/// or `/**` (everything below). A number is matched whole: `ttyUSB1` is never `ttyUSB10`.
fn pattern_matches(pattern: &str, path: &str) -> bool {
    if path.split('/').any(|part| matches!(part, "." | "..")) {
        return false;
    }
    if let Some(directory) = pattern.strip_suffix("/**") {
        return path.strip_prefix(directory).is_some_and(|rest| rest.len() > 1 && rest.starts_with('/'));
    }
    if let Some(stem) = pattern.strip_suffix('#') {
        return path
            .strip_prefix(stem)
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
    }
    if let Some((stem, range)) = pattern.strip_suffix(']').and_then(|p| p.rsplit_once('[')) {
        let mut ends = range.bytes();
        if let (Some(low), Some(b'-'), Some(high)) = (ends.next(), ends.next(), ends.next()) {
            return path.strip_prefix(stem).is_some_and(|rest| match rest.as_bytes() {
                [byte] => (low..=high).contains(byte),
                _ => false,
            });
        }
    }
    pattern == path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn categories_of(node: &str) -> Vec<&'static str> {
        CATEGORIES.iter().filter(|c| c.contains_node(node)).map(|c| c.name).collect()
    }

    #[test]
    fn each_node_is_in_the_category_its_users_expect() {
        for (node, expected) in [
            ("/dev/snd/pcmC0D0p", "audio"),
            ("/dev/snd/deep/er", "audio"),
            ("/dev/video0", "video"),
            ("/dev/video12", "video"),
            ("/dev/media0", "video"),
            ("/dev/input/event3", "input"),
            ("/dev/input/mice", "input"),
            ("/dev/tty0", "ttys"),
            ("/dev/tty7", "ttys"),
            ("/dev/ttyUSB0", "ttyUSB"),
            ("/dev/ttyUSB10", "ttyUSB"),
            ("/dev/dvb/adapter0/frontend0", "dvb"),
            ("/dev/radio0", "radio"),
        ] {
            assert_eq!(categories_of(node), [expected], "{node}");
        }
    }

    #[test]
    fn near_misses_are_in_none() {
        for node in [
            "/dev/tty",
            "/dev/tty8",
            "/dev/tty10",
            "/dev/ttyUSB",
            "/dev/ttyUSB0x",
            "/dev/ttyS0",
            "/dev/video",
            "/dev/videotape",
            "/dev/snd",
            "/dev/snd/",
            "/dev/sndx/a",
            "/dev/v4l/video0",
            "dev/video0",
            "/dev/vcs1",
            "/dev/../video0",
            "/dev/snd/../mem",
            "/dev/input/./x",
            "",
        ] {
            assert_eq!(categories_of(node), [""; 0], "{node}");
        }
    }

    #[test]
    fn places_cover_the_patterns() {
        let places: Vec<_> = CATEGORIES.iter().flat_map(Category::places).collect();
        assert!(places.contains(&("/dev/snd", true)) && places.contains(&("/dev", false)));
    }
}
