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

/// An attribute has one page at most (Documentation/filesystems/sysfs.rst).
const LONGEST: u64 = 4096;

impl Sysfs for KernelSysfs {
    fn read(&self, path: &str) -> Option<String> {
        if let Some(known) = self.read.borrow().get(path) {
            return known.clone();
        }
        let mut text = Vec::new();
        let found = File::open(format!("/sys{path}")).and_then(|file| file.take(LONGEST).read_to_end(&mut text));
        let text = found.is_ok().then(|| String::from_utf8_lossy(&text).trim_end().to_owned());
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
