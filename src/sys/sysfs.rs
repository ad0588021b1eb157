//! `/sys` as the kernel has it now, for [`crate::core::facts`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::core::device::Device;
use crate::core::facts::Sysfs;
use crate::sys::udev;

/// What was looked up is remembered: one of these is for one look.
#[derive(Debug, Default)]
pub struct KernelSysfs {
    attributes: Remembered<Option<String>>,
    directories: Remembered<Vec<String>>,
    devices: Remembered<Option<Device>>,
}

/// By path.
#[derive(Debug)]
struct Remembered<T>(RefCell<HashMap<String, T>>);

impl<T> Default for Remembered<T> {
    fn default() -> Remembered<T> {
        Remembered(RefCell::default())
    }
}

impl<T: Clone> Remembered<T> {
    fn get(&self, path: &str, look: impl FnOnce() -> T) -> T {
        if let Some(known) = self.0.borrow().get(path) {
            return known.clone();
        }
        let found = look();
        self.0.borrow_mut().insert(path.to_owned(), found.clone());
        found
    }
}

/// An attribute has one page at most (Documentation/filesystems/sysfs.rst).
const LONGEST: u64 = 4096;

/// What the kernel lets root alone read (addresses, a machine's serial number) is not read: whoever may ask for a device
/// by its attributes could find out their text, one character after the other.
fn attribute(path: &str) -> Option<String> {
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.mode() & 0o004 == 0 {
        return None;
    }
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text).ok()?;
    // Descriptors and the like are no text.
    if text.contains(&0) {
        return None;
    }
    Some(String::from_utf8_lossy(&text).trim_end().to_owned())
}

impl Sysfs for KernelSysfs {
    fn read(&self, path: &str) -> Option<String> {
        self.attributes.get(path, || attribute(&format!("/sys{path}")))
    }

    fn link(&self, path: &str) -> Option<String> {
        Some(fs::read_link(format!("/sys{path}")).ok()?.file_name()?.to_str()?.to_owned())
    }

    fn directories(&self, path: &str) -> Vec<String> {
        self.directories.get(path, || {
            let entries = fs::read_dir(format!("/sys{path}")).into_iter().flatten().flatten();
            let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            let mut names: Vec<String> = directories.filter_map(|entry| entry.file_name().into_string().ok()).collect();
            names.sort();
            names
        })
    }

    fn property(&self, path: &str, name: &str) -> Option<String> {
        udev::property(&PathBuf::from(format!("/sys{path}")), name)
    }

    fn device(&self, path: &str) -> Option<Device> {
        self.devices.get(path, || udev::by_directory(&PathBuf::from(format!("/sys{path}"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_root_alone_may_read_and_what_is_no_text_is_not_read() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serial");
        fs::write(&path, "A1B2\n").unwrap();
        for (mode, expected) in [(0o444, Some("A1B2")), (0o644, Some("A1B2")), (0o400, None), (0o440, None)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(attribute(path.to_str().unwrap()).as_deref(), expected, "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, b"\x12\x01\0\x02").unwrap();
        assert_eq!(attribute(path.to_str().unwrap()), None);
        assert_eq!(attribute("/nonexistent"), None);
    }
}
