//! `/sys` as the kernel has it now, for [`crate::core::facts`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use crate::core::device::Device;
use crate::core::facts::Sysfs;
use crate::sys::udev;

/// Attributes are read once, and then remembered: one of these is for one look.
#[derive(Debug, Default)]
pub struct KernelSysfs {
    read: RefCell<HashMap<String, Option<String>>>,
}

impl Sysfs for KernelSysfs {
    fn read(&self, path: &str) -> Option<String> {
        if let Some(known) = self.read.borrow().get(path) {
            return known.clone();
        }
        let text = read_text(&format!("/sys{path}"));
        self.read.borrow_mut().insert(path.to_owned(), text.clone());
        text
    }

    fn link(&self, path: &str) -> Option<String> {
        Some(fs::read_link(format!("/sys{path}")).ok()?.file_name()?.to_str()?.to_owned())
    }

    fn directories(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(format!("/sys{path}")).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut names: Vec<String> = directories.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    fn property(&self, path: &str, name: &str) -> Option<String> {
        udev::property(&PathBuf::from(format!("/sys{path}")), name)
    }

    fn device(&self, path: &str) -> Option<Device> {
        udev::by_directory(&PathBuf::from(format!("/sys{path}")))
    }
}

/// An attribute that is text: those have one page (Documentation/filesystems/sysfs.rst) and say so by their size. Binary
/// ones are not read: what is behind them (an EEPROM, ports of a PCI device) may be slow, or notice it.
fn read_text(path: &str) -> Option<String> {
    let page = rustix::param::page_size() as u64;
    let metadata = fs::symlink_metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() != page {
        return None;
    }
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(page).read_to_end(&mut text)).ok()?;
    Some(String::from_utf8_lossy(&text).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_and_what_is_binary_is_not() {
        let null = "/devices/virtual/mem/null";
        let sysfs = KernelSysfs::default();
        assert_eq!(sysfs.read(&format!("{null}/dev")).as_deref(), Some("1:3"));
        assert_eq!(sysfs.link(&format!("{null}/subsystem")).as_deref(), Some("mem"));
        assert_eq!(sysfs.device(null).unwrap().node, "/dev/null");
        assert_eq!(read_text("/sys/kernel/notes"), None, "binary");
        for none in ["/devices/virtual/mem/null/subsystem", "/devices/virtual/mem", "/devices/none"] {
            assert_eq!(sysfs.read(none), None, "{none}");
        }
    }
}
