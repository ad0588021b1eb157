//! What a container should have: its rules against the devices of the host.

use crate::core::annotation::Rule;
use crate::core::device::{Access, Device, Number};
use crate::core::ledger::{Grant, Granted, Holder, Node, Origin};

/// The grants that the rules ask for. Where two rules match one device, the first one counts. `named` are the devices
/// that the container's specification names.
pub fn desired<'a>(
    holder: &Holder,
    named: &[(Number, String)],
    rules: &[Rule],
    devices: impl IntoIterator<Item = &'a Device>,
) -> Vec<Grant> {
    devices
        .into_iter()
        .filter_map(|device| {
            let rule = rules.iter().find(|rule| rule.matches(device))?;
            Some(Grant {
                holder: holder.clone(),
                device: Granted::from(device),
                access: Access::ALL,
                node: Node { path: device.node.clone(), uid: device.uid, gid: device.gid, mode: device.mode },
                origin: Origin::Rule(rule.to_string()),
                at_start: named.iter().any(|(number, _)| *number == device.number),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::annotation::rules;
    use crate::core::category::Categories;
    use crate::core::plan::tests::{device, holder};

    #[test]
    fn each_device_once_with_the_hosts_owner_and_mode() {
        let asked = [("org.containers.qm.device.ttyUSB", "true"), ("org.containers.qm.device.input", "1")];
        let (rules, _) = rules(asked, &Categories::default());
        let devices = [device("/dev/ttyUSB0", 188, 0), device("/dev/ttyUSB10", 188, 10), device("/dev/video0", 81, 0)];
        let grants = desired(&holder(1), &[(devices[0].number, String::new())], &rules, &devices);
        let paths: Vec<_> = grants.iter().map(|grant| grant.node.path.as_str()).collect();
        assert_eq!(paths, ["/dev/ttyUSB0", "/dev/ttyUSB10"]);
        assert_eq!((grants[0].node.gid, grants[0].node.mode), (20, 0o660));
        assert_eq!(grants[0].origin, Origin::Rule("ttyUSB".into()));
        assert_eq!(grants.iter().map(|grant| grant.at_start).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_block_device_is_in_no_category() {
        let (rules, _) = rules([("org.containers.qm.device.video", "true")], &Categories::default());
        let mut device = device("/dev/video0", 81, 0);
        device.number.kind = crate::core::device::Kind::Block;
        assert!(desired(&holder(1), &[], &rules, [&device]).is_empty());
    }
}
