//! Rights that a container's runtime granted at its start, and when they do not hold.
//!
//! The runtime's filter keeps allowing every device that the container's specification names, also when the hook put
//! it there for a rule and the device is long unplugged. Another device may get its number then.

use crate::core::device::Number;
use crate::core::rule::Rule;

/// What the host has of a number.
#[derive(Debug, Clone, Copy)]
pub enum Presence<'a> {
    /// No device.
    Gone,
    /// A device that is not known well: udev has not spoken of it, or its driver is loaded when it is opened.
    Unclear,
    /// A device with this node, and whether the container's rules ask for it and may.
    Here {
        /// Path of its node on the host.
        node: &'a str,
        /// Whether it is to have it.
        wanted: bool,
    },
}

/// Whether the right on a number that the specification names, with nodes at these paths, is to be withdrawn; `None`
/// to leave it as it is. `at_start` are the paths of the nodes that the hook has made for selectors. What is not `known`
/// to be by a rule (it was granted or is withdrawn already) and what no rule stands for is somebody else's wish
/// (`--device`), and holds.
pub fn is_due<'a>(
    rules: &[Rule],
    at_start: &[String],
    number: Number,
    paths: &[&str],
    known: bool,
    presence: impl FnOnce() -> Presence<'a>,
) -> Option<bool> {
    let by_hook = |path: &&str| at_start.iter().any(|its| its == path);
    let by_rule = |path: &&str| by_hook(path) || rules.iter().any(|rule| rule.may_stand_for(number, path));
    if paths.is_empty() || !known && !paths.iter().all(by_rule) {
        return Some(false);
    }
    match presence() {
        Presence::Gone => Some(true),
        Presence::Unclear => None,
        // A device that the rules do not ask for has it now. Under another name the hook has not given it, but a person.
        Presence::Here { node, wanted } => Some(!wanted && (paths.contains(&node) || paths.iter().all(by_hook))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::annotation::rules;
    use crate::core::category::Categories;
    use crate::core::device::Device;
    use crate::core::plan::tests::device;

    #[test]
    fn what_a_rule_brought_is_withdrawn_while_no_device_that_it_asks_for_has_the_number() {
        let asked = [("org.containers.qm.device.ttyUSB", "true"), ("org.containers.qm.wayland.seat", "seat0")];
        let (rules, _) = rules(asked, &Categories::default());
        let (stick, modem) = (device("/dev/ttyUSB0", 188, 0), device("/dev/ttyACM0", 166, 0));
        let keyboard = device("/dev/input/event3", 13, 67);
        let is_due = |device: &Device, paths: &[&str], presence| {
            super::is_due(&rules, &[], device.number, paths, false, || presence)
        };
        let here = |device: &'static str, wanted| Presence::Here { node: device, wanted };

        assert_eq!(is_due(&stick, &["/dev/ttyUSB0"], Presence::Gone), Some(true));
        assert_eq!(is_due(&stick, &["/dev/ttyUSB0"], Presence::Unclear), None);
        assert_eq!(is_due(&stick, &["/dev/ttyUSB0"], here("/dev/ttyUSB0", true)), Some(false));
        // Given by a person too, or only.
        assert_eq!(is_due(&stick, &["/dev/ttyUSB0", "/dev/zigbee"], Presence::Gone), Some(false));
        assert_eq!(is_due(&modem, &["/dev/ttyACM0"], Presence::Gone), Some(false));
        let renamed = here("/dev/ttyACM0", false);
        assert_eq!(is_due(&modem, &["/dev/ttyUSB0"], renamed), Some(false), "--device=/dev/ttyACM0:/dev/ttyUSB0");
        assert_eq!(is_due(&stick, &[], Presence::Gone), Some(false));
        // What was a rule's stays so when the rule is gone, as by a changed configuration.
        for (presence, due) in
            [(Presence::Gone, Some(true)), (here("/dev/ttyUSB0", false), Some(true)), (renamed, Some(false))]
        {
            assert_eq!(super::is_due(&[], &[], stick.number, &["/dev/ttyUSB0"], true, || presence), due);
        }
        // It has moved to another seat.
        assert_eq!(is_due(&keyboard, &["/dev/input/event3"], here("/dev/input/event3", false)), Some(true));
    }

    #[test]
    fn what_the_hook_named_itself_is_withdrawn_whatever_the_path() {
        let stick = device("/dev/ttyUSB0", 188, 0);
        let by_hook = ["/dev/zigbee".to_owned(), "/dev/serial/x".to_owned()];
        let is_due = |paths: &[&str], presence| super::is_due(&[], &by_hook, stick.number, paths, false, || presence);
        let other = Presence::Here { node: "/dev/ttyUSB0", wanted: false };
        assert_eq!(is_due(&["/dev/zigbee", "/dev/serial/x"], Presence::Gone), Some(true));
        assert_eq!(is_due(&["/dev/zigbee"], other), Some(true));
        assert_eq!(is_due(&["/dev/zigbee"], Presence::Here { node: "/dev/ttyUSB0", wanted: true }), Some(false));
        assert_eq!(is_due(&["/dev/zigbee", "/dev/ttyUSB0"], other), Some(false), "--device=/dev/ttyUSB0, too");
        assert_eq!(is_due(&["/dev/ttyUSB0"], Presence::Gone), Some(false));
    }
}
