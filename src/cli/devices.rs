//! `qm-hotplug devices`.

use clap_complete::ArgValueCompleter;

use crate::cli::complete::{devices, selector};
use crate::cli::output;
use crate::config;
use crate::core::annotation::HOTPLUG_PREFIX;
use crate::core::facts::Facts;
use crate::core::naming::{name_of, selector_for};
use crate::error::{Error, Result};
use crate::ops;
use crate::ops::devices::sorted;
use crate::sys::sysfs::KernelSysfs;
use crate::sys::udev;

/// Arguments of `devices`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only those that it means, such as ttyUSB or usb=10c4:ea60 [default: all that have a node]
    #[arg(value_name = "SELECTOR", conflicts_with = "annotation", add = ArgValueCompleter::new(selector))]
    selector: Option<String>,
    /// Print an annotation with which a container asks for just this device
    #[arg(long, value_name = "DEV", add = ArgValueCompleter::new(devices))]
    annotation: Option<String>,
    /// Print an array of devices as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    if let Some(path) = &args.annotation {
        return annotation(path, args.json);
    }
    let infos = ops::devices::devices(&config::settings_or_warn(), args.selector.as_deref())?;
    if args.json {
        return output::json(&infos);
    }
    let rows = infos.iter().map(|info| {
        let or_dash = |text: Option<&String>| text.filter(|text| !text.is_empty()).map_or("-".into(), String::clone);
        vec![
            info.device.clone(),
            format!("{} {}:{}", info.kind.letter(), info.major, info.minor),
            or_dash(Some(&info.subsystem)),
            or_dash(info.driver.first()),
            or_dash(info.usb.as_ref()),
            or_dash(info.serial.as_ref()),
            or_dash(info.port.as_ref()),
            or_dash(info.model.as_ref()),
            or_dash(Some(&info.categories.join(","))),
        ]
    });
    output::table(&["DEVICE", "NUMBER", "SUBSYSTEM", "DRIVER", "USB", "SERIAL", "PORT", "MODEL", "CATEGORIES"], rows)
}

/// `--annotation DEV`.
fn annotation(path: &str, as_json: bool) -> Result<()> {
    let (categories, sysfs) = (config::settings_or_warn().categories, KernelSysfs::default());
    let devices = sorted()?;
    let all: Vec<Facts<'_>> = devices.iter().map(|device| Facts::new(device, &sysfs)).collect();
    let device = udev::by_path(path)?;
    let selector = selector_for(&Facts::new(&device, &sysfs), &all, &categories);
    let selector = selector.map_err(|reason| Error::NoAnnotation { device: path.to_owned(), reason })?;
    let name = name_of(&device.node);
    match as_json {
        true => output::json(&serde_json::json!({ "key": format!("{HOTPLUG_PREFIX}{name}"), "value": selector })),
        false => output::line(&format!("{HOTPLUG_PREFIX}{name}={selector}")),
    }
}
