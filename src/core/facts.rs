//! What selectors ask of a device: its udev properties, and the directories of `/sys` that it and all above it have.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::core::device::Device;

/// `/sys`, and udev's database beside it. Paths are like `DEVPATH`: they begin with `/devices/`.
pub trait Sysfs {
    /// The contents of an attribute, without white space at its end.
    fn read(&self, path: &str) -> Option<String>;
    /// The last part of what a symbolic link points to.
    fn link(&self, path: &str) -> Option<String>;
    /// The names of the directories in a directory.
    fn directories(&self, path: &str) -> Vec<String>;
    /// A property in udev's database of the device whose directory this is.
    fn property(&self, path: &str, name: &str) -> Option<String>;
    /// The device whose directory this is, if it has a node.
    fn device(&self, path: &str) -> Option<Device>;
}

/// A device, with what is above it.
pub struct Facts<'a> {
    /// The device.
    pub device: &'a Device,
    sysfs: &'a dyn Sysfs,
    own: Found,
    known: Option<&'a Found>,
}

/// What was found out about a device: a thousand rules may ask, and it is looked for once.
#[derive(Default)]
struct Found {
    usb: OnceCell<Option<Usb>>,
    drivers: OnceCell<Vec<String>>,
    pci: OnceCell<Vec<String>>,
    id_path: OnceCell<Option<String>>,
    attributes: RefCell<HashMap<String, Rc<[String]>>>,
    hubs: OnceCell<Vec<Vec<Other>>>,
    family: OnceCell<Vec<Other>>,
}

/// Another device, that what is asked of a device depends on.
pub struct Other {
    /// The device.
    pub device: Device,
    found: Found,
}

impl From<Device> for Other {
    fn from(device: Device) -> Other {
        Other { device, found: Found::default() }
    }
}

/// The USB device that a device is, or belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usb {
    /// Its directory.
    pub path: String,
    /// `idVendor`, four hexadecimal digits.
    pub vendor_id: String,
    /// `idProduct`, four hexadecimal digits.
    pub product_id: String,
    /// `bInterfaceNumber` of the interface that the device belongs to.
    pub interface: Option<String>,
}

impl Usb {
    /// Where it is plugged in: bus, `-`, and the ports from the root hub on, `1-1.2`; the kernel's name of it.
    pub fn port(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
}

/// `bDeviceClass` of a hub (USB 2.0, 11.23.1).
const HUB: &str = "09";
/// How deep below a USB device its nodes are looked for: interface, HID, input, event are four.
const DEPTH: usize = 8;

impl<'a> Facts<'a> {
    /// Looks at nothing yet.
    pub fn new(device: &'a Device, sysfs: &'a dyn Sysfs) -> Facts<'a> {
        Facts { device, sysfs, own: Found::default(), known: None }
    }

    fn found(&self) -> &Found {
        self.known.unwrap_or(&self.own)
    }

    /// A property of udev's.
    pub fn property(&self, name: &str) -> Option<&str> {
        self.device.properties.get(name).map(String::as_str)
    }

    /// udev's `ID_PATH`, of the device or else of the nearest one above that has it: not every node's rules set it.
    pub fn id_path(&self) -> Option<&str> {
        let above = || self.ancestry().skip(1).find_map(|path| self.sysfs.property(path, "ID_PATH"));
        self.property("ID_PATH").or_else(|| self.found().id_path.get_or_init(above).as_deref())
    }

    /// The USB device that this is or belongs to: the nearest one, not the hub that it is plugged into.
    pub fn usb(&self) -> Option<&Usb> {
        self.found().usb.get_or_init(|| self.find_usb()).as_ref()
    }

    fn find_usb(&self) -> Option<Usb> {
        let read = |path: &str, name: &str| self.sysfs.read(&format!("{path}/{name}"));
        let mut interface = None;
        for path in self.ancestry() {
            if let Some(product_id) = read(path, "idProduct") {
                return Some(Usb {
                    vendor_id: read(path, "idVendor")?.to_ascii_lowercase(),
                    product_id: product_id.to_ascii_lowercase(),
                    interface,
                    path: path.to_owned(),
                });
            }
            interface = interface.or_else(|| read(path, "bInterfaceNumber"));
        }
        None
    }

    /// What its USB device calls itself: `serial`, `product` or `manufacturer`. Looked at last: the kernel has a reader
    /// wait while the device is being set up.
    pub fn usb_text(&self, name: &str) -> Option<String> {
        self.sysfs.read(&format!("{}/{name}", self.usb()?.path))
    }

    /// The drivers of the device and of all above it.
    pub fn drivers(&self) -> &[String] {
        self.found()
            .drivers
            .get_or_init(|| self.ancestry().filter_map(|path| self.sysfs.link(&format!("{path}/driver"))).collect())
    }

    /// Where the PCI devices above are: each by its address (`0000:00:1d.0`), the same without the domain, and by its
    /// path of `device.function` below the root bus (`02.0/03.0`).
    pub fn pci(&self) -> &[String] {
        self.found().pci.get_or_init(|| {
            let (mut found, mut below) = (Vec::new(), String::new());
            for part in self.device.identity.devpath.split('/').filter(|part| is_pci_address(part)) {
                below = if below.is_empty() { part[8..].to_owned() } else { format!("{below}/{}", &part[8..]) };
                found.extend([part.to_owned(), part[5..].to_owned(), below.clone()]);
            }
            found
        })
    }

    /// An attribute of the device itself.
    pub fn attribute(&self, name: &str) -> Option<String> {
        self.sysfs.read(&format!("{}/{name}", self.device.identity.devpath))
    }

    /// An attribute of the device and of all above it.
    pub fn attributes(&self, name: &str) -> Rc<[String]> {
        if let Some(known) = self.found().attributes.borrow().get(name) {
            return known.clone();
        }
        let all: Rc<[String]> = self.ancestry().filter_map(|path| self.sysfs.read(&format!("{path}/{name}"))).collect();
        self.found().attributes.borrow_mut().insert(name.to_owned(), all.clone());
        all
    }

    /// The USB hubs above the device, each with what is plugged into it, but for other hubs; the hub comes first.
    pub fn hubs(&self) -> &[Vec<Other>] {
        self.found().hubs.get_or_init(|| {
            let class = |path: &str| self.sysfs.read(&format!("{path}/bDeviceClass"));
            let hubs = self.ancestry().skip(1).filter(|path| class(path).as_deref() == Some(HUB));
            let with_plugged = |hub: &str| {
                let below = self.sysfs.directories(hub).into_iter().map(|name| format!("{hub}/{name}"));
                let plugged = below.filter(|path| class(path).is_some_and(|class| class != HUB));
                let all = std::iter::once(hub.to_owned()).chain(plugged);
                all.filter_map(|path| self.sysfs.device(&path)).map(Other::from).collect()
            };
            hubs.map(with_plugged).collect()
        })
    }

    /// All devices with a node of the USB device that this one belongs to, itself among them, without those that are
    /// plugged into it.
    pub fn family(&self) -> &[Other] {
        self.found().family.get_or_init(|| {
            let mut found = Vec::new();
            if let Some(usb) = self.usb() {
                self.visit(&usb.path, DEPTH, &mut found);
            }
            found
        })
    }

    fn visit(&self, path: &str, depth: usize, found: &mut Vec<Other>) {
        if self.sysfs.read(&format!("{path}/dev")).is_some() {
            found.extend(self.sysfs.device(path).map(Other::from));
        }
        for name in self.sysfs.directories(path).iter().filter(|_| depth > 0) {
            let below = format!("{path}/{name}");
            if self.sysfs.read(&format!("{below}/idProduct")).is_none() {
                self.visit(&below, depth - 1, found);
            }
        }
    }

    /// The same for another device.
    pub fn of<'b>(&'b self, other: &'b Other) -> Facts<'b> {
        Facts { known: Some(&other.found), ..Facts::new(&other.device, self.sysfs) }
    }

    /// The device's directory and those above it, up to `/devices`.
    fn ancestry(&self) -> impl Iterator<Item = &str> {
        let devpath = self.device.identity.devpath.as_str();
        let above = |path: &&'_ str| Some(&devpath[..devpath[..path.len()].rfind('/')?]);
        std::iter::successors(Some(devpath), above).take_while(|path| path.len() > "/devices".len())
    }
}

/// The directory of the root hub that the device is or is behind. No rule looks further around.
pub fn usb_bus(devpath: &str) -> Option<&str> {
    devpath.match_indices("/usb").find_map(|(at, _)| {
        let end = devpath[at + 1..].find('/').map_or(devpath.len(), |length| at + 1 + length);
        let number = &devpath[at + "/usb".len()..end];
        (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(&devpath[..end])
    })
}

/// `DDDD:BB:dd.f`, as the kernel names PCI devices (`pci_setup_device` in drivers/pci/probe.c).
fn is_pci_address(name: &str) -> bool {
    name.len() == 12
        && name.is_ascii()
        && name.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b':',
            10 => byte == b'.',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// A place of PCI devices as [`Facts::pci`] has it: in a path, a function that is not given is 0.
pub fn pci_place(value: &str) -> String {
    if value.contains(':') {
        return value.to_ascii_lowercase();
    }
    let with_function =
        |part: &str| if part.contains(['.', '*', '?', '[']) { part.to_owned() } else { format!("{part}.0") };
    value.split('/').map(with_function).collect::<Vec<_>>().join("/").to_ascii_lowercase()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::core::plan::tests;

    /// A `/sys` of files, each with its text; a link's text is the last part of where it points to.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Tree {
        pub(crate) files: BTreeMap<String, String>,
        pub(crate) devices: BTreeMap<String, Device>,
    }

    impl Tree {
        pub(crate) fn file(mut self, path: &str, text: &str) -> Tree {
            self.files.insert(path.to_owned(), text.to_owned());
            self
        }

        /// A device in that directory.
        pub(crate) fn device(mut self, path: &str, subsystem: &str, node: &str, (major, minor): (u32, u32)) -> Tree {
            let mut device = tests::device(node, major, minor);
            device.identity.devpath = path.to_owned();
            device.subsystem = subsystem.to_owned();
            self.devices.insert(path.to_owned(), device);
            self.file(&format!("{path}/dev"), &format!("{major}:{minor}"))
        }
    }

    impl Sysfs for Tree {
        fn read(&self, path: &str) -> Option<String> {
            self.files.get(path).cloned()
        }

        fn link(&self, path: &str) -> Option<String> {
            self.files.get(path).cloned()
        }

        fn directories(&self, path: &str) -> Vec<String> {
            let below = format!("{path}/");
            let all = self.files.keys().filter_map(|file| file.strip_prefix(&below)?.split_once('/'));
            all.map(|(name, _)| name.to_owned()).collect::<BTreeSet<_>>().into_iter().collect()
        }

        fn property(&self, path: &str, name: &str) -> Option<String> {
            self.devices.get(path)?.properties.get(name).cloned()
        }

        fn device(&self, path: &str) -> Option<Device> {
            self.devices.get(path).cloned()
        }
    }

    /// A hub with two sticks of one make, and a keyboard with a stick in it, at one controller.
    pub(crate) fn bench() -> Tree {
        let root = "/devices/pci0000:00/0000:00:02.0/0000:01:03.1/usb1";
        let usb = |tree: Tree, path: &str, ids: (&str, &str), class: &str, names: [&str; 3], minor: u32| {
            let path = format!("{root}{path}");
            let mut tree = tree.file(&format!("{path}/idVendor"), ids.0).file(&format!("{path}/idProduct"), ids.1);
            tree = tree.file(&format!("{path}/bDeviceClass"), class).file(&format!("{path}/driver"), "usb");
            for (name, text) in ["manufacturer", "product", "serial"].into_iter().zip(names) {
                tree = if text.is_empty() { tree } else { tree.file(&format!("{path}/{name}"), text) };
            }
            tree.device(&path, "usb", &format!("/dev/bus/usb/001/{minor:03}"), (189, minor))
        };
        let stick = |tree: Tree, path: &str, name: &str, minor: u32| {
            let interface = format!("{root}{path}:1.0");
            let tree = tree.file(&format!("{interface}/bInterfaceNumber"), "00");
            let tree = tree.file(&format!("{interface}/{name}/driver"), "cp210x");
            tree.device(&format!("{interface}/{name}/tty/{name}"), "tty", &format!("/dev/{name}"), (188, minor))
        };
        let mut tree =
            usb(Tree::default(), "", ("1d6b", "0002"), "09", ["Linux", "xHCI Host Controller", "0000:01:03.1"], 0);
        tree = usb(tree, "/1-1", ("05e3", "8608"), "09", ["", "USB2.0 Hub", ""], 1);
        tree = usb(tree, "/1-1/1-1.1", ("10c4", "EA60"), "00", ["Silicon Labs", "CP2102, USB", "A1B2"], 2);
        tree = stick(tree, "/1-1/1-1.1/1-1.1", "ttyUSB1", 1);
        tree = usb(tree, "/1-1/1-1.2", ("10c4", "ea60"), "00", ["Silicon Labs", "CP2102, USB", "C3D4"], 3);
        tree = stick(tree, "/1-1/1-1.2/1-1.2", "ttyUSB10", 10);
        tree = usb(tree, "/1-2", ("0627", "0001"), "00", ["QEMU", "QEMU USB Keyboard", ""], 4);
        let hid = format!("{root}/1-2/1-2:1.0/0003:0627:0001.0001");
        tree = tree.file(&format!("{root}/1-2/1-2:1.0/bInterfaceNumber"), "00");
        tree = tree.file(&format!("{hid}/driver"), "hid-generic");
        tree = tree.device(&format!("{hid}/hidraw/hidraw0"), "hidraw", "/dev/hidraw0", (240, 0));
        tree = tree.file(&format!("{hid}/input/input3/name"), "QEMU QEMU USB Keyboard");
        tree.device(&format!("{hid}/input/input3/event3"), "input", "/dev/input/event3", (13, 67))
    }

    /// The device of the bench with that node.
    pub(crate) fn of_bench<'a>(tree: &'a Tree, node: &str) -> &'a Device {
        tree.devices.values().find(|device| device.node == node).unwrap()
    }

    #[test]
    fn what_is_above_a_device() {
        let tree = bench();
        let facts = |node: &str| Facts::new(of_bench(&tree, node), &tree);
        let stick = facts("/dev/ttyUSB10");
        let usb = stick.usb().unwrap();
        assert_eq!((usb.port(), usb.product_id.as_str()), ("1-1.2", "ea60"));
        assert_eq!(stick.usb_text("serial").as_deref(), Some("C3D4"));
        assert_eq!(usb.interface.as_deref(), Some("00"));
        assert_eq!(stick.drivers(), ["cp210x", "usb", "usb", "usb"]);
        assert_eq!(stick.pci(), ["0000:00:02.0", "00:02.0", "02.0", "0000:01:03.1", "01:03.1", "02.0/03.1"]);
        let keyboard = facts("/dev/input/event3");
        assert_eq!(keyboard.usb_text("serial"), None, "not the controller's");
        assert_eq!(*keyboard.attributes("name"), ["QEMU QEMU USB Keyboard"]);
        assert_eq!(keyboard.attribute("name"), None);
        assert_eq!(keyboard.attribute("dev").as_deref(), Some("13:67"));
        let family: Vec<_> = facts("/dev/hidraw0").family().iter().map(|other| other.device.node.clone()).collect();
        assert_eq!(family, ["/dev/bus/usb/001/004", "/dev/hidraw0", "/dev/input/event3"]);
        let hubs: Vec<Vec<_>> =
            stick.hubs().iter().map(|all| all.iter().map(|other| other.device.number.minor).collect()).collect();
        assert_eq!(hubs, [vec![1, 2, 3], vec![0, 4]]);
        let root = "/devices/pci0000:00/0000:00:02.0/0000:01:03.1/usb1";
        assert_eq!(usb_bus(&stick.device.identity.devpath), Some(root));
        assert_eq!(usb_bus(root), Some(root));
        assert_eq!(usb_bus("/devices/platform/usb/usbx/tty"), None);
        let virtual_one = tests::device("/dev/tun", 10, 200);
        assert_eq!(Facts::new(&virtual_one, &tree).usb(), None);
    }
}
