//! `qm-hotplug devices`.

use serde::Serialize;

use crate::cli::output;
use crate::config;
use crate::core::annotation::HOTPLUG_PREFIX;
use crate::core::category::Categories;
use crate::core::device::{Device, Kind};
use crate::core::facts::Facts;
use crate::core::grammar::{Author, selection};
use crate::core::naming::{name_of, selector_for};
use crate::core::seat;
use crate::error::{Error, Result};
use crate::sys::sysfs::KernelSysfs;
use crate::sys::udev;

/// Arguments of `devices`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only those that it means, such as ttyUSB or usb=10c4:ea60 [default: all that have a node]
    #[arg(value_name = "SELECTOR", conflicts_with = "annotation")]
    selector: Option<String>,
    /// Print an annotation with which a container asks for just this device
    #[arg(long, value_name = "DEV")]
    annotation: Option<String>,
    /// Print an array of devices as JSON
    #[arg(long)]
    json: bool,
}

/// A device as it is told to people and programs, with what selectors can ask of it. The field names are stable.
#[derive(Debug, Serialize)]
struct DeviceInfo<'a> {
    device: &'a str,
    kind: Kind,
    major: u32,
    minor: u32,
    uid: u32,
    gid: u32,
    /// Permission bits, as a number.
    mode: u32,
    subsystem: &'a str,
    /// Nearest first.
    driver: &'a [String],
    /// `VID:PID`.
    usb: Option<String>,
    serial: Option<String>,
    model: Option<String>,
    vendor: Option<String>,
    id_path: Option<&'a str>,
    port: Option<&'a str>,
    pci: &'a [String],
    seat: Option<&'a str>,
    tags: Vec<&'a str>,
    links: Vec<&'a str>,
    categories: Vec<&'a str>,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let settings = config::settings_or_warn();
    let sysfs = KernelSysfs::default();
    let mut devices = udev::scan().map_err(Error::host("list the devices of this host"))?;
    devices.sort_by(|a, b| natural(&a.node).cmp(&natural(&b.node)));
    let facts: Vec<Facts<'_>> = devices.iter().map(|device| Facts::new(device, &sysfs)).collect();
    if let Some(path) = &args.annotation {
        return annotation(path, &facts, &settings.categories, &sysfs, args.json);
    }
    let wanted = args.selector.map(|text| {
        let bad = |error| Error::Usage(format!("selector '{text}': {error}"));
        selection("", &text, &settings.categories, Author::Root).map_err(bad)
    });
    let wanted = wanted.transpose()?;
    let is_wanted = |facts: &&Facts<'_>| wanted.as_ref().is_none_or(|wanted| wanted.matches(facts).is_some());
    let infos: Vec<DeviceInfo<'_>> =
        facts.iter().filter(is_wanted).map(|facts| info(facts, &settings.categories)).collect();
    if args.json {
        return output::json(&infos);
    }
    let rows = infos.iter().map(|info| {
        let or_dash = |text: Option<&str>| text.filter(|text| !text.is_empty()).unwrap_or("-").to_owned();
        vec![
            info.device.to_owned(),
            format!("{} {}:{}", info.kind.letter(), info.major, info.minor),
            or_dash(Some(info.subsystem)),
            or_dash(info.driver.first().map(String::as_str)),
            or_dash(info.usb.as_deref()),
            or_dash(info.serial.as_deref()),
            or_dash(info.port),
            or_dash(info.model.as_deref()),
            or_dash(Some(&info.categories.join(","))),
        ]
    });
    output::table(&["DEVICE", "NUMBER", "SUBSYSTEM", "DRIVER", "USB", "SERIAL", "PORT", "MODEL", "CATEGORIES"], rows)
}

/// `--annotation DEV`.
fn annotation(
    path: &str,
    all: &[Facts<'_>],
    categories: &Categories,
    sysfs: &KernelSysfs,
    as_json: bool,
) -> Result<()> {
    let device = udev::by_path(path)?;
    let selector = selector_for(&Facts::new(&device, sysfs), all, categories);
    let selector = selector.map_err(|reason| Error::NoAnnotation { device: path.to_owned(), reason })?;
    let name = name_of(&device.node);
    match as_json {
        true => output::json(&serde_json::json!({ "key": format!("{HOTPLUG_PREFIX}{name}"), "value": selector })),
        false => output::line(&format!("{HOTPLUG_PREFIX}{name}={selector}")),
    }
}

fn info<'a>(facts: &'a Facts<'_>, categories: &'a Categories) -> DeviceInfo<'a> {
    let Device { node, subsystem, number, uid, gid, mode, .. } = facts.device;
    let usb = facts.usb();
    let text = |property: &str, own: &str| facts.property(property).map(str::to_owned).or_else(|| facts.usb_text(own));
    DeviceInfo {
        device: node,
        kind: number.kind,
        major: number.major,
        minor: number.minor,
        uid: *uid,
        gid: *gid,
        mode: *mode,
        subsystem,
        driver: facts.drivers(),
        usb: usb.map(|usb| format!("{}:{}", usb.vendor_id, usb.product_id)),
        serial: text("ID_SERIAL_SHORT", "serial"),
        model: text("ID_MODEL", "product"),
        vendor: text("ID_VENDOR", "manufacturer"),
        id_path: facts.id_path(),
        port: usb.map(|usb| usb.port()),
        pci: facts.pci(),
        seat: seat::of(facts.device),
        tags: seat::tags(facts.device).collect(),
        links: facts.property("DEVLINKS").unwrap_or_default().split_whitespace().collect(),
        categories: categories
            .iter()
            .filter(|category| category.contains(facts.device))
            .map(|category| category.name.as_str())
            .collect(),
    }
}

/// Sorts `ttyUSB10` behind `ttyUSB9`.
fn natural(node: &str) -> (&str, usize, &str) {
    let stem = node.trim_end_matches(|one: char| one.is_ascii_digit());
    (stem, node.len(), node)
}
