//! Seats: which devices logind counts to one, by udev's properties (sd-login(3), systemd's 71-seat.rules and
//! 73-seat-late.rules; a device inherits `ID_SEAT` from its parent).

use std::sync::Arc;

use crate::core::category::{Category, is_forbidden};
use crate::core::device::{Device, Kind};
use crate::core::pattern::Pattern;

/// The seat of all devices that are assigned to none.
const SEAT0: &str = "seat0";

/// Nodes that belong to a seat though logind does not list them. Not `mice`: it mixes the mice of all seats.
const UNLISTED: [&str; 3] = ["/dev/input/event#", "/dev/input/mouse#", "/dev/dri/render*"];

/// Whether logind would take this for a seat's name (`seat_name_is_valid` in systemd's login-util.c).
pub fn is_valid_name(name: &str) -> bool {
    name.starts_with("seat")
        && name.len() <= 255
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// A seat that a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Its name.
    pub name: String,
    /// Categories that have to be enabled: a seat does not bring their devices, enabled or not.
    pub withheld: Vec<Arc<Category>>,
}

impl Seat {
    /// Whether the device is one of this seat's.
    pub fn has(&self, device: &Device) -> bool {
        of(device) == Some(&self.name)
            && !is_forbidden(device.number)
            && !self.withheld.iter().any(|category| category.contains(device))
    }
}

/// Whether a node of that path is of a kind that most seats have.
pub fn may_have(node: &str) -> bool {
    let directories = ["/dev/input/", "/dev/snd/", "/dev/dri/", "/dev/fb", "/dev/video", "/dev/media", "/dev/hidraw"];
    directories.iter().any(|beginning| node.starts_with(beginning))
}

/// The seat that the device belongs to, by logind's assignment or by what every seat has.
pub fn of(device: &Device) -> Option<&str> {
    let is_listed = || tags(device).any(|tag| matches!(tag, "seat" | "uaccess"));
    let is_unlisted = || UNLISTED.iter().any(|text| Pattern::parse(text).is_ok_and(|it| it.matches(&device.node)));
    let belongs = device.number.kind == Kind::Char && (is_listed() || is_unlisted());
    let assigned = device.properties.get("ID_SEAT").map(String::as_str).filter(|value| !value.is_empty());
    belongs.then_some(assigned.unwrap_or(SEAT0))
}

/// udev's tags that the device has now; `TAGS` also holds those that it no longer has.
pub fn tags(device: &Device) -> impl Iterator<Item = &str> {
    let tags = device.properties.get("CURRENT_TAGS").map(String::as_str).unwrap_or_default();
    tags.split(':').filter(|tag| !tag.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::category::Categories;
    use crate::core::plan::tests::device;

    fn tagged(node: &str, properties: &[(&str, &str)]) -> Device {
        let mut device = device(node, 116, 3);
        device.properties = properties.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        device
    }

    #[test]
    fn names() {
        for good in ["seat0", "seat-kiosk_2", "seat"] {
            assert!(is_valid_name(good), "{good}");
        }
        for bad in [
            "",
            "true",
            "--host=evil",
            "../x",
            "seat/0",
            "seat0\n",
            "seat 0",
            "Seat0",
            &format!("seat{}", "0".repeat(252)),
        ] {
            assert!(!is_valid_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_device_is_in_one_seat() {
        let sound = [("ID_SEAT", "seat1"), ("CURRENT_TAGS", ":uaccess:seat1:")];
        for (device, seats) in [
            (tagged("/dev/snd/pcmC1D0p", &sound), &["seat1"][..]),
            (tagged("/dev/snd/pcmC0D0p", &[("CURRENT_TAGS", ":uaccess:")]), &["seat0"]),
            (tagged("/dev/dri/card0", &[("CURRENT_TAGS", ":master-of-seat:seat:uaccess:")]), &["seat0"]),
            (tagged("/dev/input/event3", &[("ID_SEAT", "seat1")]), &["seat1"]),
            (tagged("/dev/input/mouse0", &[("ID_SEAT", "")]), &["seat0"]),
            (tagged("/dev/dri/renderD128", &[("ID_SEAT", "seat1")]), &["seat1"]),
            (tagged("/dev/input/mice", &[]), &[]),
            (tagged("/dev/ttyUSB0", &[("CURRENT_TAGS", ":systemd:")]), &[]),
            (tagged("/dev/video0", &[("TAGS", ":uaccess:"), ("CURRENT_TAGS", ":systemd:")]), &[]),
            (tagged("/dev/video0", &[("TAGS", ":uaccess:")]), &[]),
            (tagged("/dev/null", &[("CURRENT_TAGS", ":seats:useat:")]), &[]),
        ] {
            assert_eq!(of(&device), seats.first().copied(), "{}", device.node);
        }
        let mut disc = tagged("/dev/sr0", &[("CURRENT_TAGS", ":uaccess:")]);
        disc.number.kind = Kind::Block;
        assert_eq!(of(&disc), None, "not what a seat's user mounts");
    }

    #[test]
    fn a_seat_brings_nothing_that_the_host_withholds() {
        let reader = tagged("/dev/bus/usb/001/004", &[("CURRENT_TAGS", ":uaccess:")]);
        let seat = |withheld| Seat { name: "seat0".into(), withheld };
        assert!(seat(vec![]).has(&reader));
        assert!(!seat(Categories::default().sensitive()).has(&reader));
        let mut memory = tagged("/dev/mem", &[("CURRENT_TAGS", ":uaccess:")]);
        (memory.number.major, memory.number.minor) = (1, 1);
        assert!(!seat(vec![]).has(&memory));
    }
}
