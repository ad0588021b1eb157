//! Categories: what `org.containers.qm.device.NAME` stands for. One table for the hook and the agent; a host's
//! configuration adds to it.

use std::sync::Arc;

use toml::Spanned;

use crate::core::config::{ConfigFile, Wrong};
use crate::core::device::{Device, Kind, Number};
use crate::core::pattern::Pattern;

/// A named set of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Category {
    /// The last part of the annotation, `ttyUSB`.
    pub name: String,
    /// The nodes' paths on the host.
    pub patterns: Vec<Pattern>,
    /// Character or block devices.
    pub kind: Kind,
    /// Whether a host has to enable it before containers can have it.
    pub sensitive: bool,
    /// Whether this host lets containers have it.
    pub enabled: bool,
}

impl Category {
    /// Whether the device is in the category.
    pub fn contains(&self, device: &Device) -> bool {
        device.number.kind == self.kind && !is_forbidden(device.number) && self.contains_node(&device.node)
    }

    /// Whether the device is in the category or another way to what is in it, as a disk's device for raw commands is.
    pub fn reaches(&self, device: &Device) -> bool {
        let by = |category: &str, subsystems: &[&str]| {
            self.name == category && subsystems.contains(&device.subsystem.as_str())
        };
        self.contains(device)
            || self.kind == Kind::Block && device.number.kind == Kind::Block
            || by("block", &["scsi_generic", "bsg", "nvme", "nvme-generic", "mtd", "ubi"])
            || by("usb", &["usbmon"])
            || self.name == "uinput" && device.node == "/dev/uhid"
    }

    /// Whether a node of that path would be in the category.
    pub fn contains_node(&self, node: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(node))
    }
}

/// `/dev/mem`, `/dev/kmem`, `/dev/port`, `/dev/kmsg`, `/dev/snapshot` and `/dev/cpu/*/msr`
/// (Documentation/admin-guide/devices.txt): these are the host itself, and no rule grants them, whatever its patterns say.
pub fn is_forbidden(number: Number) -> bool {
    number.kind == Kind::Char && matches!((number.major, number.minor), (1, 1 | 2 | 4 | 11) | (10, 231) | (202, _))
}

/// A category of the program: name, patterns, kind, and whether it has to be enabled.
type BuiltIn = (&'static str, &'static [&'static str], Kind, bool);

/// The first seven are those of containers/qm's device manager, with the same meaning.
const BUILT_IN: &[BuiltIn] = &[
    ("audio", &["/dev/snd/**"], Kind::Char, false),
    ("video", &["/dev/video*", "/dev/media*"], Kind::Char, false),
    ("input", &["/dev/input/**"], Kind::Char, false),
    ("ttys", &["/dev/tty[0-7]"], Kind::Char, false),
    ("ttyUSB", &["/dev/ttyUSB*"], Kind::Char, false),
    ("dvb", &["/dev/dvb/**"], Kind::Char, false),
    ("radio", &["/dev/radio*"], Kind::Char, false),
    ("ttyACM", &["/dev/ttyACM#"], Kind::Char, false),
    (
        "serial",
        &[
            "/dev/ttyUSB#",
            "/dev/ttyACM#",
            "/dev/ttyAMA#",
            "/dev/ttymxc#",
            "/dev/ttyTHS#",
            "/dev/ttySC#",
            "/dev/rfcomm#",
        ],
        Kind::Char,
        false,
    ),
    ("tty", &["/dev/tty[A-Z]*", "/dev/ttymxc#", "/dev/rfcomm#"], Kind::Char, false),
    ("camera", &["/dev/video*", "/dev/media*", "/dev/v4l-subdev#", "/dev/dma_heap/**"], Kind::Char, false),
    ("printer", &["/dev/usb/lp#"], Kind::Char, false),
    ("hidraw", &["/dev/hidraw#"], Kind::Char, false),
    ("dri", &["/dev/dri/**"], Kind::Char, false),
    ("kvm", &["/dev/kvm"], Kind::Char, false),
    ("fuse", &["/dev/fuse"], Kind::Char, false),
    ("tun", &["/dev/net/tun"], Kind::Char, false),
    ("gpio", &["/dev/gpiochip#"], Kind::Char, false),
    ("i2c", &["/dev/i2c-#"], Kind::Char, false),
    ("spi", &["/dev/spidev#.#"], Kind::Char, false),
    ("uinput", &["/dev/uinput"], Kind::Char, true),
    ("usb", &["/dev/bus/usb/**"], Kind::Char, true),
    (
        "block",
        &[
            "/dev/sd*",
            "/dev/nvme*",
            "/dev/mmcblk*",
            "/dev/vd*",
            "/dev/xvd*",
            "/dev/sr#",
            "/dev/loop*",
            "/dev/dm-#",
            "/dev/md#",
        ],
        Kind::Block,
        true,
    ),
];

/// The categories of a host.
#[derive(Debug, Clone)]
pub struct Categories(Vec<Arc<Category>>);

impl Default for Categories {
    fn default() -> Categories {
        Categories(BUILT_IN.iter().map(|row| Arc::new(built_in(*row))).collect())
    }
}

fn built_in((name, patterns, kind, sensitive): BuiltIn) -> Category {
    let patterns = patterns.iter().map(|text| Pattern::parse(text).expect("a pattern of the table is valid"));
    Category { name: name.to_owned(), patterns: patterns.collect(), kind, sensitive, enabled: !sensitive }
}

impl Categories {
    /// The category of that name.
    pub fn named(&self, name: &str) -> Option<&Arc<Category>> {
        self.0.iter().find(|category| category.name == name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Category> {
        self.0.iter().map(|category| &**category)
    }

    /// Those that have to be enabled.
    pub fn sensitive(&self) -> Vec<Arc<Category>> {
        self.0.iter().filter(|category| category.sensitive).cloned().collect()
    }

    /// Adds what a configuration file says. Nothing is changed if it cannot be taken.
    pub fn apply(&mut self, file: &ConfigFile) -> Result<(), Wrong> {
        self.with(file).map(|changed| self.0 = changed)
    }

    fn with(&self, file: &ConfigFile) -> Result<Vec<Arc<Category>>, Wrong> {
        let mut changed = self.0.clone();
        for (key, added) in &file.category {
            let name = key.get_ref();
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
                let reason =
                    format!("the category '{name}' has other characters in its name than letters, digits, - and _");
                return Err(Wrong::of(key, reason));
            }
            if self.named(name).is_some() {
                let reason = format!("there is a category '{name}' already: give it another name");
                return Err(Wrong::of(key, reason));
            }
            let pattern = |text: &Spanned<String>| {
                let wrong = |reason| Wrong::of(text, format!("in category '{name}': {reason}"));
                Pattern::parse(text.get_ref()).map_err(wrong)
            };
            changed.push(Arc::new(Category {
                name: name.clone(),
                patterns: added.nodes.iter().map(pattern).collect::<Result<_, _>>()?,
                kind: Kind::Char,
                sensitive: false,
                enabled: true,
            }));
        }
        for name in &file.enable {
            let category = changed.iter_mut().find(|category| category.name == *name.get_ref());
            let missing = || Wrong::of(name, format!("there is no category '{}' to enable", name.get_ref()));
            Arc::make_mut(category.ok_or_else(missing)?).enabled = true;
        }
        Ok(changed)
    }
}

/// What `org.containers.qm.wayland-client.gpu` stands for.
pub fn render_nodes() -> Category {
    built_in(("wayland-client.gpu", &["/dev/dri/render*"], Kind::Char, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::plan::tests::device;

    fn categories_of(node: &str) -> Vec<String> {
        Categories::default().iter().filter(|c| c.contains_node(node)).map(|c| c.name.clone()).collect()
    }

    #[test]
    fn each_node_is_in_the_categories_its_users_expect() {
        for (node, expected) in [
            ("/dev/snd/pcmC0D0p", &["audio"][..]),
            ("/dev/snd/deep/er", &["audio"]),
            ("/dev/video0", &["video", "camera"]),
            ("/dev/video12", &["video", "camera"]),
            ("/dev/video-dec0", &["video", "camera"]),
            ("/dev/media0", &["video", "camera"]),
            ("/dev/v4l-subdev3", &["camera"]),
            ("/dev/dma_heap/system", &["camera"]),
            ("/dev/input/event3", &["input"]),
            ("/dev/input/mice", &["input"]),
            ("/dev/tty0", &["ttys"]),
            ("/dev/tty7", &["ttys"]),
            ("/dev/ttyUSB0", &["ttyUSB", "serial", "tty"]),
            ("/dev/ttyUSB10", &["ttyUSB", "serial", "tty"]),
            ("/dev/ttyACM0", &["ttyACM", "serial", "tty"]),
            ("/dev/ttyAMA0", &["serial", "tty"]),
            ("/dev/ttyS0", &["tty"]),
            ("/dev/dvb/adapter0/frontend0", &["dvb"]),
            ("/dev/radio0", &["radio"]),
            ("/dev/usb/lp0", &["printer"]),
            ("/dev/hidraw1", &["hidraw"]),
            ("/dev/dri/renderD128", &["dri"]),
            ("/dev/kvm", &["kvm"]),
            ("/dev/fuse", &["fuse"]),
            ("/dev/net/tun", &["tun"]),
            ("/dev/uinput", &["uinput"]),
            ("/dev/gpiochip0", &["gpio"]),
            ("/dev/i2c-1", &["i2c"]),
            ("/dev/spidev0.1", &["spi"]),
            ("/dev/bus/usb/001/002", &["usb"]),
            ("/dev/sda1", &["block"]),
        ] {
            assert_eq!(categories_of(node), expected, "{node}");
        }
    }

    #[test]
    fn near_misses_are_in_none() {
        for node in [
            "/dev/tty",
            "/dev/tty8",
            "/dev/tty10",
            "/dev/snd",
            "/dev/snd/",
            "/dev/v4l/video0",
            "dev/video0",
            "/dev/vcs1",
            "/dev/../video0",
            "/dev/snd/../mem",
            "/dev/input/./x",
            "/dev/mem",
            "/dev/kmsg",
            "/dev/port",
            "",
        ] {
            assert_eq!(categories_of(node), [""; 0], "{node}");
        }
    }

    fn configured(text: &str) -> Result<Categories, Wrong> {
        let mut categories = Categories::default();
        categories.apply(&ConfigFile::parse(text)?).map(|()| categories)
    }

    #[test]
    fn a_host_enables_and_adds() {
        let usual = Categories::default();
        for name in ["usb", "uinput", "block"] {
            assert!(!usual.named(name).unwrap().enabled, "{name}");
        }
        let host = configured("enable = ['block', 'robot']\n[category.robot]\nnodes = ['/dev/robot#', '/dev/arm/**']")
            .unwrap();
        assert!(host.named("block").unwrap().enabled && !host.named("usb").unwrap().enabled);
        assert!(host.named("robot").unwrap().contains(&device("/dev/arm/left", 240, 1)));
        for categories in [usual, host] {
            let names: Vec<_> = categories.sensitive().iter().map(|category| category.name.clone()).collect();
            assert_eq!(names, ["uinput", "usb", "block"]);
        }
    }

    #[test]
    fn what_is_the_host_itself_is_in_no_category() {
        let host = configured("[category.all]\nnodes = ['/dev/*']").unwrap();
        let all = host.named("all").unwrap();
        assert!(all.contains(&device("/dev/null", 1, 3)));
        for (node, minor) in [("/dev/mem", 1), ("/dev/kmem", 2), ("/dev/port", 4), ("/dev/kmsg", 11), ("/dev/alias", 1)]
        {
            assert!(!all.contains(&device(node, 1, minor)), "{node}");
        }
    }

    #[test]
    fn what_cannot_be_taken_is_said_and_changes_nothing() {
        for (text, reason) in [
            ("enable = ['tape']", "no category 'tape'"),
            ("[category.video]\nnodes = []", "already"),
            ("[category.'a b']\nnodes = []", "other characters"),
            ("[category.x]\nnodes = ['/etc/x']", "in category 'x': '/etc/x' does not begin with /dev/"),
            ("[category.x]\nnode = '/dev/x'", "unknown field `node`"),
            ("disable = []", "unknown field `disable`"),
            ("enable = 3", "invalid type"),
        ] {
            let error = configured(text).unwrap_err().reason;
            assert!(error.contains(reason) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
