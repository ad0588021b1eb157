//! The devices of this host, with what selectors can ask of them.

use crate::core::category::Categories;
use crate::core::device::Device;
use crate::core::facts::Facts;
use crate::core::grammar::{Author, selection};
use crate::core::info::DeviceInfo;
use crate::core::seat;
use crate::core::settings::Settings;
use crate::error::{Error, Result};
use crate::sys::sysfs::KernelSysfs;
use crate::sys::udev;

/// Those that have a node, in the order of their names: all, or those that a selector means in this configuration.
pub fn devices(settings: &Settings, selector: Option<&str>) -> Result<Vec<DeviceInfo>> {
    let (categories, sysfs) = (&settings.categories, KernelSysfs::default());
    let wanted = selector.map(|text| {
        let bad = |error| Error::Usage(format!("selector '{text}': {error}"));
        selection("", text, categories, Author::Root).map_err(bad)
    });
    let wanted = wanted.transpose()?;
    let devices = sorted()?;
    let facts = devices.iter().map(|device| Facts::new(device, &sysfs));
    let is_wanted = |facts: &Facts<'_>| wanted.as_ref().is_none_or(|wanted| wanted.matches(facts).is_some());
    Ok(facts.filter(is_wanted).map(|facts| info(&facts, categories)).collect())
}

/// Those that have a node, in the order of their names.
pub fn sorted() -> Result<Vec<Device>> {
    let mut devices = udev::scan().map_err(Error::host("list the devices of this host"))?;
    devices.sort_by(|a, b| natural(&a.node).cmp(&natural(&b.node)));
    Ok(devices)
}

fn info(facts: &Facts<'_>, categories: &Categories) -> DeviceInfo {
    let Device { node, subsystem, number, uid, gid, mode, .. } = facts.device;
    let usb = facts.usb();
    let text = |property: &str, own: &str| facts.property(property).map(str::to_owned).or_else(|| facts.usb_text(own));
    let links = facts.property("DEVLINKS").unwrap_or_default().split_whitespace();
    DeviceInfo {
        device: node.clone(),
        kind: number.kind,
        major: number.major,
        minor: number.minor,
        uid: *uid,
        gid: *gid,
        mode: *mode,
        subsystem: subsystem.clone(),
        driver: facts.drivers().to_vec(),
        usb: usb.map(|usb| format!("{}:{}", usb.vendor_id, usb.product_id)),
        serial: text("ID_SERIAL_SHORT", "serial"),
        model: text("ID_MODEL", "product"),
        vendor: text("ID_VENDOR", "manufacturer"),
        id_path: facts.id_path().map(str::to_owned),
        port: usb.map(|usb| usb.port().to_owned()),
        pci: facts.pci().to_vec(),
        seat: seat::of(facts.device).map(str::to_owned),
        tags: seat::tags(facts.device).map(str::to_owned).collect(),
        links: links.map(str::to_owned).collect(),
        categories: categories
            .iter()
            .filter(|category| category.contains(facts.device))
            .map(|category| category.name.clone())
            .collect(),
    }
}

/// Sorts `ttyUSB10` behind `ttyUSB9`.
pub(crate) fn natural(node: &str) -> (&str, usize, &str) {
    let stem = node.trim_end_matches(|one: char| one.is_ascii_digit());
    (stem, node.len(), node)
}
