//! From a device to a selector that means it, and no other one.

use crate::core::annotation::{DEVICE_PREFIX, HOTPLUG_PREFIX};
use crate::core::category::{Categories, Category};
use crate::core::facts::Facts;
use crate::core::grammar::{Author, selection};
use crate::core::selector::quoted;

/// A selector that means this device and none of the others, and goes on meaning it when it is plugged in again and has
/// another number. Only where the device has nothing of its own (no serial number, no place) it goes by the node's name.
/// The error says in words why containers cannot ask for it. Its terms are separated by `;`: podman before 4.4 cuts the
/// value of `--annotation` at commas.
pub fn selector_for(device: &Facts<'_>, others: &[Facts<'_>], categories: &Categories) -> Result<String, String> {
    let category = narrowest(device, categories);
    let mut text = category.map_or_else(|| term("subsystem", &device.device.subsystem), |it| it.name.clone());
    let rule = |text: &str| selection("", text, categories, Author::Container).map_err(|error| error.to_string());
    if let Some(reason) = rule(&text)?.selector.failing(device) {
        return Err(reason);
    }
    let is_unique = |text: &str| -> Result<bool, String> {
        let rule = rule(text)?;
        let is_other = |other: &&Facts<'_>| other.device.identity != device.device.identity;
        Ok(!others.iter().filter(is_other).any(|other| rule.matches(other).is_some()))
    };
    let mut more = own_terms(device).into_iter();
    // What is its own comes first, needed now or not: a second one of its kind may be plugged in later.
    let mut is_own = false;
    while !is_own || !is_unique(&text)? {
        let Some((term, tells_apart)) = more.next() else { break };
        text = format!("{text};{term}");
        is_own = is_own || tells_apart;
    }
    match is_own && is_unique(&text)? {
        true => Ok(text),
        false => Ok(format!("{text};{}", term("devname", &device.device.node))),
    }
}

/// Terms that it matches, and whether each tells it from others of its kind.
fn own_terms(device: &Facts<'_>) -> Vec<(String, bool)> {
    let mut terms = Vec::new();
    if let Some(usb) = device.usb() {
        terms.push((format!("usb={}:{}", usb.vendor_id, usb.product_id), false));
        match device.usb_text("serial").filter(|serial| !serial.is_empty()) {
            Some(serial) => terms.push((term("serial", &serial), true)),
            None => terms.push((term("port", usb.port()), true)),
        }
        terms.extend(device.attribute("index").map(|index| (term("attr.index", &index), false)));
        terms.extend(usb.interface.iter().map(|number| (term("attrs.bInterfaceNumber", number), false)));
        terms.push((term("port", usb.port()), true));
    } else {
        terms.extend(device.property("ID_PATH").map(|path| (term("id_path", path), true)));
        terms.extend(device.attribute("index").map(|index| (term("attr.index", &index), false)));
        terms.extend(device.attribute("name").map(|name| (term("attr.name", &name), false)));
    }
    terms
}

/// What a shell or a terminal would take for something else (a serial number comes from whoever made the device) is any
/// character.
fn term(key: &str, value: &str) -> String {
    let is_plain = |one: char| one.is_ascii_alphanumeric() || "._:@%+/-".contains(one);
    let value: String = value.chars().map(|one| if is_plain(one) { one } else { '?' }).collect();
    format!("{key}={}", quoted(&value))
}

/// The annotation, with its value, that asks for the device: the narrowest category that has it, else a selector. `None`
/// where containers of this host cannot ask for it.
pub fn suggestion(device: &Facts<'_>, categories: &Categories) -> Option<String> {
    match narrowest(device, categories) {
        Some(category) => Some(format!("{DEVICE_PREFIX}{}=true", category.name)),
        None => {
            let name = name_of(&device.device.node);
            selector_for(device, &[], categories).ok().map(|selector| format!("{HOTPLUG_PREFIX}{name}={selector}"))
        }
    }
}

/// A name for a rule that asks for the device with this node.
pub fn name_of(node: &str) -> String {
    let name = node.rsplit('/').next().unwrap_or_default();
    name.chars().map(|one| if one.is_ascii_alphanumeric() { one } else { '-' }).take(64).collect()
}

fn narrowest<'a>(device: &Facts<'_>, categories: &'a Categories) -> Option<&'a Category> {
    // In the table, those of one kind of node stand before those of several.
    categories.iter().find(|category| category.enabled && category.contains(device.device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config::ConfigFile;
    use crate::core::facts::tests::{Tree, bench, of_bench};
    use crate::core::plan::tests::device;

    fn named(tree: &Tree, node: &str) -> Result<String, String> {
        let all: Vec<Facts<'_>> = tree.devices.values().map(|device| Facts::new(device, tree)).collect();
        selector_for(&Facts::new(of_bench(tree, node), tree), &all, &Categories::default())
    }

    #[test]
    fn what_is_its_own_names_it() {
        let mut tree = bench();
        for (node, expected) in
            [("/dev/ttyUSB1", "ttyUSB;usb=10c4:ea60;serial=A1B2"), ("/dev/hidraw0", "hidraw;usb=0627:0001;port=1-2")]
        {
            assert_eq!(named(&tree, node).as_deref(), Ok(expected));
        }
        let hub = "/devices/pci0000:00/0000:00:02.0/0000:01:03.1/usb1/1-1";
        tree.files.insert(format!("{hub}/1-1.2/serial"), "A1B2".into());
        assert_eq!(
            named(&tree, "/dev/ttyUSB1").as_deref(),
            Ok("ttyUSB;usb=10c4:ea60;serial=A1B2;attrs.bInterfaceNumber=00;port=1-1.1"),
            "two of one make with one serial number"
        );
        tree = tree.device("/devices/virtual/misc/tun", "misc", "/dev/net/tun", (10, 200));
        tree = tree.device("/devices/virtual/misc/x", "misc", "/dev/x,y*", (10, 201));
        assert_eq!(named(&tree, "/dev/net/tun").as_deref(), Ok("tun;devname=/dev/net/tun"));
        assert_eq!(named(&tree, "/dev/x,y*").as_deref(), Ok("subsystem=misc;devname=/dev/x?y?"));
        assert!(named(&tree, "/dev/bus/usb/001/002").unwrap_err().contains("enabled on this host"));
        tree = tree.device("/devices/virtual/mem/kmsg", "mem", "/dev/kmsg", (1, 11));
        assert!(named(&tree, "/dev/kmsg").unwrap_err().contains("the host itself"));
    }

    #[test]
    fn the_narrowest_category_that_is_enabled_is_suggested() {
        let mut categories = Categories::default();
        let suggested = |categories: &Categories, node: &str| {
            suggestion(&Facts::new(&device(node, 240, 0), &Tree::default()), categories)
        };
        for (node, name) in [
            ("/dev/ttyUSB0", "ttyUSB"),
            ("/dev/ttyAMA0", "serial"),
            ("/dev/video0", "video"),
            ("/dev/v4l-subdev0", "camera"),
        ] {
            assert_eq!(suggested(&categories, node), Some(format!("org.containers.qm.device.{name}=true")), "{node}");
        }
        assert_eq!(suggested(&categories, "/dev/bus/usb/001/002"), None);
        assert_eq!(
            suggested(&categories, "/dev/robot1").as_deref(),
            Some("org.containers.qm.hotplug.robot1=subsystem=tty;devname=/dev/robot1")
        );
        let text = "enable = ['usb']\n[category.robot]\nnodes = ['/dev/robot#']";
        categories.apply(&ConfigFile::parse(text).unwrap()).unwrap();
        for (node, name) in [("/dev/bus/usb/001/002", "usb"), ("/dev/robot1", "robot")] {
            assert_eq!(suggested(&categories, node), Some(format!("org.containers.qm.device.{name}=true")), "{node}");
        }
    }
}
