//! `/sys` as the kernel has it now, for [`crate::core::facts`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

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

/// Beginnings of the names of binary attributes, which may have one page as well.
const BINARY: [&str; 6] = ["config", "eeprom", "nvmem", "resource", "rom", "vpd"];

/// What is longer, in bytes, is a list of things and nobody's name for a device; globs take that times their own length.
const LONGEST: usize = 1024;

/// An attribute that is text: those have one page (Documentation/filesystems/sysfs.rst) and say so by their size. Binary
/// ones are not read: what is behind them (an EEPROM, ports of a PCI device) may be slow, or notice it. Nor is what the
/// kernel lets root alone read (addresses, a machine's serial number): whoever may ask for a device by its attributes
/// could find out their text, one character after the other.
fn attribute(path: &str) -> Option<String> {
    let page = rustix::param::page_size() as u64;
    let name = path.rsplit('/').next().unwrap_or_default();
    if BINARY.iter().any(|beginning| name.starts_with(beginning)) {
        return None;
    }
    // No link leads out of the device's directory, and there is nothing in it that minds being opened.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).ok()?;
    let stat = fstat(&file).ok()?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !is_file || stat.st_size as u64 != page || stat.st_mode & 0o004 == 0 {
        return None;
    }
    // One reading has all of it.
    let mut text = vec![0; page as usize];
    let length = rustix::io::read(&file, &mut text[..]).ok()?;
    text.truncate(length);
    Some(String::from_utf8_lossy(&text).trim_end().to_owned()).filter(|text| text.len() <= LONGEST)
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
        assert_eq!(attribute("/sys/kernel/notes"), None, "binary");
        let of_root = "/sys/kernel/slab/kmalloc-64/objects";
        assert_eq!(attribute(of_root), None, "root alone may read it");
        for none in [
            "/devices/virtual/mem/null/subsystem/zero/uevent",
            "/devices/virtual/mem/null/subsystem",
            "/devices/virtual/mem",
            "/devices/none",
        ] {
            assert_eq!(sysfs.read(none), None, "{none}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        for (length, is_read) in [(LONGEST, true), (LONGEST + 1, false)] {
            let text = format!("{}{}", "a".repeat(length), "\n".repeat(rustix::param::page_size() - length));
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
            assert_eq!(attribute(file.path().to_str().unwrap()).is_some(), is_read, "{length}");
        }
    }
}
