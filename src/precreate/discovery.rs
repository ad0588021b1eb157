//! The devices that a rule stands for when a container starts.

use std::fs;
use std::io;

use rustix::fs::{Access, access};

use crate::core::annotation::Rule;
use crate::core::device::Kind;
use crate::core::spec::SpecDevice;
use crate::sys::{block, devfs, udev};

/// What was found for a rule.
#[derive(Debug, Default)]
pub struct Found {
    /// To be granted, sorted by path.
    pub devices: Vec<SpecDevice>,
    /// Paths of those that are withheld, each with the reason in words.
    pub withheld: Vec<(String, String)>,
}

/// Where devices are looked for: on the host, or in a test's environment.
pub trait Discovery {
    /// The devices that the rule stands for now.
    fn devices(&self, rule: &Rule) -> io::Result<Found>;
}

/// The host's `/dev` for categories, and udev's database for seats.
#[derive(Debug)]
pub struct Host;

impl Discovery for Host {
    fn devices(&self, rule: &Rule) -> io::Result<Found> {
        let devices = match rule {
            Rule::Category(category) => devfs::nodes(category),
            Rule::Seat(seat) => {
                udev::scan_seats()?.iter().filter(|device| seat.has(device)).map(SpecDevice::from).collect()
            }
        };
        let mut found = Found::default();
        for device in devices {
            match reason_to_withhold(&device) {
                None => found.devices.push(device),
                Some(reason) => found.withheld.push((device.path, reason)),
            }
        }
        Ok(found)
    }
}

fn reason_to_withhold(device: &SpecDevice) -> Option<String> {
    if !devfs::is_where_it_belongs(device) {
        return Some("the kernel gives its numbers another name".into());
    }
    // For an ordinary user's container, in a user namespace where the hook seems to be root, that user's rights on the
    // node are all that counts. Root has them.
    if access(&device.path, Access::READ_OK | Access::WRITE_OK).is_err() {
        return Some("this user may not open it".into());
    }
    match device.number.kind {
        Kind::Char => None,
        Kind::Block => block::in_use(&device.path, device.number),
    }
}

/// The name of the container with that id, from the file that containers/storage keeps beside the containers'
/// directories. `directories` are places in which one of these directories may be.
pub fn container_name(id: &str, directories: &[String]) -> Option<String> {
    let files = directories.iter().flat_map(|place| {
        ["containers.json", "volatile-containers.json"].map(|file| format!("{}/{file}", place.trim_end_matches('/')))
    });
    files.filter_map(|path| fs::read_to_string(path).ok()).find_map(|text| {
        let all: serde_json::Value = serde_json::from_str(&text).ok()?;
        let one = all.as_array()?.iter().find(|one| one["id"] == id)?;
        Some(one["names"].as_array()?.first()?.as_str()?.to_owned())
    })
}
