//! Devices that this kernel plugs in and unplugs for real, with uevents of its own: loop devices (block), macvtap on a
//! veth pair (char), consoles (char). Each is unplugged when dropped.
//!
//! None of them is in a category; for those see [`trigger`].

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions, metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::Path;

use crate::support::podman::describe;
use crate::support::{run, wait_for};

/// Where tests make links to devices, as udev does below /dev/disk and /dev/serial.
const LINKS: &str = "/dev/qmh-by-id";

const LOOP_CTL_ADD: libc::c_ulong = 0x4C80;
const LOOP_CTL_REMOVE: libc::c_ulong = 0x4C81;
const VT_DISALLOCATE: libc::c_ulong = 0x5608;

/// A device that is plugged in.
pub(crate) struct Plugged {
    /// Its node on the host.
    pub(crate) path: String,
    how: How,
}

#[derive(Clone, Copy)]
enum How {
    Loop(libc::c_ulong),
    Console(libc::c_ulong),
    Tap(&'static str),
}

/// Adds `/dev/loopN`, a block device.
pub(crate) fn block(number: u32) -> Plugged {
    let device = Plugged { path: format!("/dev/loop{number}"), how: How::Loop(number.into()) };
    device.again();
    device
}

/// Opens console N for the first time, which adds the char devices `/dev/vcsN` and `/dev/vcsaN`.
pub(crate) fn console(number: u32) -> Plugged {
    let device = Plugged { path: format!("/dev/vcsa{number}"), how: How::Console(number.into()) };
    device.again();
    device
}

/// Adds a veth pair with a macvtap on it, whose char device is `/dev/tapN`.
pub(crate) fn tap() -> Plugged {
    tap_with("02:00:00:00:00:01")
}

/// The same with this address, its `attrs.address`.
pub(crate) fn tap_with(address: &'static str) -> Plugged {
    let mut device = Plugged { path: String::new(), how: How::Tap(address) };
    device.again();
    let index = std::fs::read_to_string("/sys/class/net/qmhtap/ifindex").unwrap();
    device.path = format!("/dev/tap{}", index.trim());
    wait_for("the macvtap's node", || device.is_there());
    device
}

/// One of each kind.
pub(crate) fn one_of_each(number: u32) -> [Plugged; 3] {
    [block(number), console(number), tap()]
}

impl Plugged {
    /// Plugs it in once more: the same number, another device. (A macvtap gets a new number.)
    pub(crate) fn again(&self) {
        match self.how {
            How::Loop(number) => control("/dev/loop-control", LOOP_CTL_ADD, number).unwrap(),
            How::Console(number) => drop(open(&format!("/dev/tty{number}"))),
            How::Tap(address) => {
                run("ip", &["link", "add", "qmhveth0", "type", "veth", "peer", "name", "qmhveth1"]).ok();
                let named = ["link", "add", "link", "qmhveth0", "name", "qmhtap", "address", address];
                run("ip", &[&named[..], &["type", "macvtap"]].concat()).ok();
            }
        }
        if !self.path.is_empty() {
            wait_for("the device's node", || self.is_there());
        }
    }

    /// Unplugs it.
    pub(crate) fn unplug(&self) {
        wait_for("the device to go", || {
            self.try_unplug();
            !self.is_there()
        });
    }

    fn try_unplug(&self) {
        match self.how {
            // EBUSY while somebody has it open.
            How::Loop(number) => drop(control("/dev/loop-control", LOOP_CTL_REMOVE, number)),
            How::Console(number) => drop(control("/dev/tty0", VT_DISALLOCATE, number)),
            How::Tap(_) => drop(run("ip", &["link", "del", "qmhveth0"])),
        }
    }

    pub(crate) fn is_there(&self) -> bool {
        Path::new(&self.path).exists()
    }

    /// Gives the host's node an owner and a mode that nobody has by chance.
    pub(crate) fn owned_by(self, uid: u32, gid: u32, mode: u32) -> Plugged {
        chown(&self.path, Some(uid), Some(gid)).unwrap();
        std::fs::set_permissions(&self.path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        self
    }

    /// Kind, numbers, owner and mode of the host's node: `b 7:40 0:0 0660`.
    pub(crate) fn describe(&self) -> String {
        describe(&metadata(&self.path).unwrap())
    }

    /// `b 7 40`, as mknod wants it.
    pub(crate) fn numbers(&self) -> String {
        numbers(&self.path)
    }

    /// A link to it, as udev makes them: `/dev/qmh-by-id/NAME`.
    pub(crate) fn link(&self, name: &str) -> String {
        std::fs::create_dir_all(LINKS).unwrap();
        let link = format!("{LINKS}/{name}");
        std::os::unix::fs::symlink(format!("..{}", self.path.strip_prefix("/dev").unwrap()), &link).unwrap();
        link
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        // Somebody may have it open for a moment still.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(1);
        self.try_unplug();
        while self.is_there() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(5));
            self.try_unplug();
        }
    }
}

/// `c 4 3`, as mknod wants it.
pub(crate) fn numbers(path: &str) -> String {
    let found = metadata(path).unwrap();
    let kind = describe(&found)[..1].to_owned();
    format!("{kind} {} {}", rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()))
}

/// Removes the directory of links.
pub(crate) fn remove_links() {
    let _ = std::fs::remove_dir_all(LINKS);
}

/// Has the kernel send an `add` or `remove` uevent of a device in a category (Documentation/ABI/testing/sysfs-uevent).
/// This kernel has no driver whose devices are in one and can be plugged; the consoles `/dev/tty0` to `tty7` are, and
/// stay.
pub(crate) fn trigger(action: &str, tty: &str) {
    std::fs::write(format!("/sys/class/tty/{tty}/uevent"), action).unwrap();
}

fn open(path: &str) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
}

fn control(path: &str, request: libc::c_ulong, number: libc::c_ulong) -> std::io::Result<()> {
    let file = open(path);
    // SAFETY: these requests take a number, not a pointer.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, number) } {
        result if result >= 0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
