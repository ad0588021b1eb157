//! From a device to a selector that means it, and no other one.

use crate::core::category::Categories;
use crate::core::facts::Facts;
use crate::core::glob::Glob;
use crate::core::grammar::{Author, selection};
use crate::core::selector::quoted;

/// A selector that means this device and none of the others, and goes on meaning it when it is plugged in again and has
/// another number. Only where the device has nothing of its own (no serial number, no place) it goes by the node's name.
/// The error says in words why containers cannot ask for it.
pub fn selector_for(device: &Facts<'_>, others: &[Facts<'_>], categories: &Categories) -> Result<String, String> {
    let containing = categories.iter().filter(|category| category.enabled && category.contains(device.device));
    let narrowest = containing.min_by_key(|category| category.patterns.len());
    let mut text = narrowest.map_or_else(|| term("subsystem", &device.device.subsystem), |it| it.name.clone());
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
        text = format!("{text},{term}");
        is_own = is_own || tells_apart;
    }
    match is_own && is_unique(&text)? {
        true => Ok(text),
        false => Ok(format!("{text},{}", term("devname", &device.device.node))),
    }
}

/// Terms that it matches, and whether each tells it from others of its kind.
fn own_terms(device: &Facts<'_>) -> Vec<(String, bool)> {
    let mut terms = Vec::new();
    if let Some(usb) = device.usb() {
        terms.push((format!("usb={}:{}", usb.vendor_id, usb.product_id), false));
        match usb.serial.as_deref().filter(|serial| !serial.is_empty()) {
            Some(serial) => terms.push((term("serial", serial), true)),
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

fn term(key: &str, value: &str) -> String {
    format!("{key}={}", quoted(&Glob::exactly(value).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::facts::tests::{Tree, bench, of_bench};

    fn named(tree: &Tree, node: &str) -> Result<String, String> {
        let all: Vec<Facts<'_>> = tree.devices.values().map(|device| Facts::new(device, tree)).collect();
        selector_for(&Facts::new(of_bench(tree, node), tree), &all, &Categories::default())
    }

    #[test]
    fn what_is_its_own_names_it() {
        let mut tree = bench();
        for (node, expected) in
            [("/dev/ttyUSB1", "ttyUSB,usb=10c4:ea60,serial=A1B2"), ("/dev/hidraw0", "hidraw,usb=0627:0001,port=1-2")]
        {
            assert_eq!(named(&tree, node).as_deref(), Ok(expected));
        }
        let hub = "/devices/pci0000:00/0000:00:02.0/0000:01:03.1/usb1/1-1";
        tree.files.insert(format!("{hub}/1-1.2/serial"), "A1B2".into());
        assert_eq!(
            named(&tree, "/dev/ttyUSB1").as_deref(),
            Ok("ttyUSB,usb=10c4:ea60,serial=A1B2,attrs.bInterfaceNumber=00,port=1-1.1"),
            "two of one make with one serial number"
        );
        tree = tree.device("/devices/virtual/misc/tun", "misc", "/dev/net/tun", (10, 200));
        tree = tree.device("/devices/virtual/misc/x", "misc", "/dev/x,y*", (10, 201));
        assert_eq!(named(&tree, "/dev/net/tun").as_deref(), Ok("tun,devname=/dev/net/tun"));
        assert_eq!(named(&tree, "/dev/x,y*").as_deref(), Ok("subsystem=misc,devname=\"/dev/x,y\\*\""));
        assert!(named(&tree, "/dev/bus/usb/001/002").unwrap_err().contains("have to be enabled"));
    }
}
