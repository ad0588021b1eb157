//! Which annotation would give a container a device.

use crate::core::annotation::DEVICE_PREFIX;
use crate::core::category::Categories;
use crate::core::device::Device;

/// The annotation, with its value, that asks for the fewest other devices beside this one; `None` where no category that
/// this host lets containers have contains it.
pub fn suggestion(device: &Device, categories: &Categories) -> Option<String> {
    let containing = categories.iter().filter(|category| category.enabled && category.contains(device));
    let narrowest = containing.min_by_key(|category| category.patterns.len())?;
    Some(format!("{DEVICE_PREFIX}{}=true", narrowest.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config::ConfigFile;
    use crate::core::plan::tests::device;

    #[test]
    fn the_narrowest_category_that_is_enabled() {
        let mut categories = Categories::default();
        let suggested = |categories: &Categories, node: &str| suggestion(&device(node, 240, 0), categories);
        for (node, name) in [
            ("/dev/ttyUSB0", "ttyUSB"),
            ("/dev/ttyAMA0", "serial"),
            ("/dev/video0", "video"),
            ("/dev/v4l-subdev0", "camera"),
        ] {
            assert_eq!(suggested(&categories, node), Some(format!("org.containers.qm.device.{name}=true")), "{node}");
        }
        for node in ["/dev/bus/usb/001/002", "/dev/robot1", "/dev/null"] {
            assert_eq!(suggested(&categories, node), None, "{node}");
        }
        let text = "enable = ['usb']\n[category.robot]\nnodes = ['/dev/robot#']";
        categories.apply(&ConfigFile::parse(text).unwrap()).unwrap();
        for (node, name) in [("/dev/bus/usb/001/002", "usb"), ("/dev/robot1", "robot")] {
            assert_eq!(suggested(&categories, node), Some(format!("org.containers.qm.device.{name}=true")), "{node}");
        }
    }
}
