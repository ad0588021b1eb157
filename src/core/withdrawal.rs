//! Rights that a container's runtime granted at its start, and when they do not hold.
//!
//! The runtime's filter keeps allowing every device that the container's specification names, also when the hook put
//! it there for a rule and the device is long unplugged. Another device may get its number then.

use crate::core::annotation::Rule;
use crate::core::device::{Device, Number};

/// What the host has of a number.
#[derive(Debug, Clone, Copy)]
pub enum Presence<'a> {
    /// No device.
    Gone,
    /// A device that is not known well: udev has not spoken of it, or its driver is loaded when it is opened.
    Unclear,
    /// This device.
    Here(&'a Device),
}

/// Whether the right on a number that the specification names, with nodes at these paths, is to be withdrawn; `None`
/// to leave it as it is. What is not `known` to be by a rule (it was granted or is withdrawn already) and what no rule
/// stands for is somebody else's wish (`--device`), and holds.
pub fn is_due<'a>(
    rules: &[Rule],
    number: Number,
    paths: &[&str],
    known: bool,
    presence: impl FnOnce() -> Presence<'a>,
) -> Option<bool> {
    let by_rule = |path: &&str| rules.iter().any(|rule| rule.may_stand_for(number, path));
    if paths.is_empty() || !known && !paths.iter().all(by_rule) {
        return Some(false);
    }
    match presence() {
        Presence::Gone => Some(true),
        Presence::Unclear => None,
        // A device that the rules do not ask for has it now. Under another name the hook has not given it, but a person.
        Presence::Here(device) => {
            Some(paths.contains(&device.node.as_str()) && !rules.iter().any(|rule| rule.matches(device)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::annotation::rules;
    use crate::core::category::Categories;
    use crate::core::plan::tests::device;

    #[test]
    fn what_a_rule_brought_is_withdrawn_while_no_device_that_it_asks_for_has_the_number() {
        let asked = [("org.containers.qm.device.ttyUSB", "true"), ("org.containers.qm.wayland.seat", "seat0")];
        let (rules, _) = rules(asked, &Categories::default());
        let (stick, modem) = (device("/dev/ttyUSB0", 188, 0), device("/dev/ttyACM0", 166, 0));
        let keyboard = device("/dev/input/event3", 13, 67);
        let is_due =
            |device: &Device, paths: &[&str], presence| super::is_due(&rules, device.number, paths, false, || presence);
        let here = Presence::Here;

        assert_eq!(is_due(&stick, &["/dev/ttyUSB0"], Presence::Gone), Some(true));
        assert_eq!(is_due(&stick, &["/dev/ttyUSB0"], Presence::Unclear), None);
        assert_eq!(is_due(&stick, &["/dev/ttyUSB0"], here(&stick)), Some(false));
        // Given by a person too, or only.
        assert_eq!(is_due(&stick, &["/dev/ttyUSB0", "/dev/zigbee"], Presence::Gone), Some(false));
        assert_eq!(is_due(&modem, &["/dev/ttyACM0"], Presence::Gone), Some(false));
        assert_eq!(is_due(&modem, &["/dev/ttyUSB0"], here(&modem)), Some(false), "--device=/dev/ttyACM0:/dev/ttyUSB0");
        assert_eq!(is_due(&stick, &[], Presence::Gone), Some(false));
        // What was a rule's stays so when the rule is gone, as by a changed configuration.
        for (presence, due) in [(Presence::Gone, Some(true)), (here(&stick), Some(true)), (here(&modem), Some(false))] {
            assert_eq!(super::is_due(&[], stick.number, &["/dev/ttyUSB0"], true, || presence), due);
        }
        // It has moved to another seat.
        assert_eq!(is_due(&keyboard, &["/dev/input/event3"], here(&keyboard)), Some(false));
        let mut moved = keyboard.clone();
        moved.properties.insert("ID_SEAT".into(), "seat1".into());
        assert_eq!(is_due(&moved, &["/dev/input/event3"], here(&moved)), Some(true));
    }
}
