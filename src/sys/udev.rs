//! Devices as udev and sysfs know them, turned into owned values at once.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, lstat, open, openat2, stat};
use udev::Enumerator;

use crate::core::device::{Device, Identity, Kind, Number};
use crate::core::ledger::Granted;
use crate::core::mirror::{ACTIONS, Description, Profile, RUN_UDEV, Told, record_name};
use crate::core::uevent::{Uevent, parse_udev};
use crate::error::{Error, Result};
use crate::sys::node::{number_of, what_is};

/// udevd makes this socket; where it is missing nobody applies rules and nobody sends udev's events.
const UDEVD_CONTROL: &str = "/run/udev/control";

/// Whether udevd runs.
pub fn is_running() -> bool {
    Path::new(UDEVD_CONTROL).exists()
}

/// Every device of this host that has a node. While udevd runs, those whose rules it has not applied yet are left out:
/// their owner and mode are not final, and their event is still to come.
pub fn scan() -> io::Result<Vec<Device>> {
    list(|_| Ok(()))
}

/// Those of [`scan`] that can belong to a seat, sorted by path: a tenth of the time, for the hook.
pub fn scan_seats() -> io::Result<Vec<Device>> {
    let mut devices = list(|all| all.match_tag("seat"))?;
    devices.extend(list(|all| all.match_tag("uaccess"))?);
    devices.extend(list(|all| ["input", "drm"].into_iter().try_for_each(|subsystem| all.match_subsystem(subsystem)))?);
    devices.sort_by(|a, b| a.node.cmp(&b.node));
    devices.dedup_by(|a, b| a.node == b.node);
    Ok(devices)
}

/// Those of [`scan`] of one subsystem.
pub fn scan_subsystem(subsystem: &str) -> io::Result<Vec<Device>> {
    list(|all| all.match_subsystem(subsystem))
}

fn list(narrow: impl Fn(&mut Enumerator) -> io::Result<()>) -> io::Result<Vec<Device>> {
    let mut enumerator = Enumerator::new()?;
    narrow(&mut enumerator)?;
    let all = enumerator.scan_devices()?;
    let has_udevd = is_running();
    Ok(all.filter(|device| !has_udevd || device.is_initialized()).filter_map(|device| owned(&device)).collect())
}

/// The device behind a path, links followed.
pub fn by_path(path: &str) -> Result<Device> {
    let stat = match stat(path) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Err(Error::NoSuchDevice(path.into())),
        Err(errno) => return Err(Error::host(format!("look at {path}"))(errno)),
    };
    let number = number_of(&stat).ok_or_else(|| Error::NotADevice { path: path.into(), what: what_is(&stat) })?;
    let unknown = |_| Error::NotADevice { path: path.into(), what: "a node that /sys knows no device for" };
    let known = known(number).map_err(unknown)?;
    // The node that was named has the owner and mode that count, even if it is a second one for the same device.
    let mut device = owned(&known).ok_or_else(|| Error::NoSuchDevice(path.into()))?;
    (device.uid, device.gid, device.mode) = (stat.st_uid, stat.st_gid, stat.st_mode & 0o777);
    Ok(device)
}

/// Whether root alone decides what is at that path, or that nothing is: it is below `/dev` and leads out of it nowhere,
/// nor into what is mounted there.
pub fn is_roots(path: &str) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let Some(below) = path.strip_prefix("/dev/") else { return false };
    let opened = open("/dev", flags, Mode::empty()).and_then(|dev| openat2(dev, below, flags, Mode::empty(), how));
    matches!(opened, Ok(_) | Err(rustix::io::Errno::NOENT))
}

/// The device that has this number now.
pub fn by_number(number: Number) -> Option<Device> {
    owned(&known(number).ok()?)
}

fn known(number: Number) -> io::Result<udev::Device> {
    let kind = match number.kind {
        Kind::Char => udev::DeviceType::Character,
        Kind::Block => udev::DeviceType::Block,
    };
    udev::Device::from_devnum(kind, rustix::fs::makedev(number.major, number.minor))
}

/// The device at that path, once udev has spoken of it: where udevd runs, owner and mode are not final before.
pub fn by_settled_path(path: &str) -> Result<Device> {
    let device = by_path(path)?;
    let known = udev::Device::from_syspath(Path::new(&format!("/sys{}", device.identity.devpath)));
    match !is_running() || known.is_ok_and(|known| known.is_initialized()) {
        true => Ok(device),
        false => Err(Error::NoSuchDevice(path.into())),
    }
}

/// The device that a kernel event told of, if it is still there.
pub fn by_event(event: &Uevent) -> Option<Device> {
    by_directory(&PathBuf::from(format!("/sys{}", event.devpath))).filter(|device| device.number == event.number)
}

/// The device that a message of udev's says is there or has changed, and what happened. For one without a node, those of
/// its parts that have one. What they are, sysfs and udev's database tell, not the message.
pub fn by_message(message: &[u8]) -> Vec<(Device, Told)> {
    let Some(message) = parse_udev(message) else { return Vec::new() };
    let Some(action) = ACTIONS.into_iter().find(|action| *action == message.action) else { return Vec::new() };
    let Ok(device) = udev::Device::from_syspath(Path::new(&format!("/sys{}", message.devpath))) else {
        return Vec::new();
    };
    let of_whole = !has_node(&device);
    let all = if of_whole { parts(&device) } else { vec![device] };
    if all.is_empty() {
        return Vec::new();
    }
    // The kernel has counted no further, whatever somebody says.
    let told = Told { action, sequence: message.sequence.min(sequence()), of_whole };
    let has_udevd = is_running();
    // udevd writes its database before it tells; somebody else may have told.
    let settled = all.iter().filter(|device| !has_udevd || device.is_initialized());
    settled.filter_map(owned).map(|device| (device, told)).collect()
}

fn has_node(device: &udev::Device) -> bool {
    device.devnum().is_some_and(|devnum| devnum != 0)
}

/// What has a node and lies in the directory of a device without one, and belongs to the same subsystem.
fn parts(whole: &udev::Device) -> Vec<udev::Device> {
    let names = std::fs::read_dir(whole.syspath()).into_iter().flatten().flatten();
    let directories = names.map(|entry| entry.path()).filter(|path| path.join("dev").exists());
    let devices = directories.filter_map(|path| udev::Device::from_syspath(&path).ok());
    devices.filter(|device| is_part_of(device, whole)).collect()
}

fn is_part_of(device: &udev::Device, whole: &udev::Device) -> bool {
    let is_same = device.subsystem().is_some() && device.subsystem() == whole.subsystem();
    is_same && has_node(device) && !has_node(whole)
}

/// The device without a node that this one is a part of.
fn whole_of(device: &udev::Device) -> Option<udev::Device> {
    device.parent().filter(|parent| is_part_of(device, parent))
}

/// The device whose directory this is, below `/sys`, if it has a node.
pub fn by_directory(path: &Path) -> Option<Device> {
    owned(&udev::Device::from_syspath(path).ok()?)
}

/// A property in udev's database of the device whose directory this is.
pub fn property(path: &Path, name: &str) -> Option<String> {
    let device = udev::Device::from_syspath(path).ok()?;
    Some(device.property_value(name)?.to_string_lossy().into_owned())
}

/// The longest entry of udev's database that is read, in bytes.
const LONGEST_RECORD: u64 = 256 << 10;

/// What the host knows of a device, for those in containers who ask libudev. `None` where it is not this very one any
/// more.
pub fn describe(device: &Granted) -> Option<Description> {
    let known = udev::Device::from_syspath(Path::new(&format!("/sys{}", device.identity.devpath))).ok()?;
    let profile = profile(&known)?;
    // Several devices may claim a link; one has it.
    let links = profile.properties.get("DEVLINKS").map(|all| all.split_whitespace()).into_iter().flatten();
    let is_its = |link: &&str| std::fs::canonicalize(link).is_ok_and(|node| node == Path::new(&device.node));
    let links = links.filter(|link| link.starts_with("/dev/")).filter(is_its).map(str::to_owned).collect();
    let whole = whole_of(&known).and_then(|whole| self::profile(&whole));
    is_present(&device.identity).then_some(Description { profile, links, whole })
}

fn profile(device: &udev::Device) -> Option<Profile> {
    let mut profile = Profile {
        devpath: device.devpath().to_str()?.to_owned(),
        inode: stat(device.syspath()).ok()?.st_ino,
        properties: properties(device),
        uevent: std::fs::read_to_string(device.syspath().join("uevent")).ok()?,
        record: None,
    };
    let devnum = device.devnum().filter(|devnum| *devnum != 0);
    let number = devnum.map(|devnum| number(device, devnum));
    profile.record = record(&number.map_or_else(|| profile.name(), record_name));
    Some(profile)
}

/// The entries of udev's database on the device that has this number now, and on the one that it is a part of, by their
/// names.
pub fn records(number: Number) -> Vec<(String, Option<String>)> {
    let whole = known(number).ok().and_then(|device| profile(&whole_of(&device)?)).map(|it| (it.name(), it.record));
    let name = record_name(number);
    let own = record(&name);
    [(name, own)].into_iter().chain(whole).collect()
}

fn record(name: &str) -> Option<String> {
    let file = std::fs::File::open(format!("{RUN_UDEV}/data/{name}")).ok()?;
    let mut text = String::new();
    file.take(LONGEST_RECORD).read_to_string(&mut text).ok().map(|_| text)
}

/// How many events the kernel has sent.
pub fn sequence() -> u64 {
    std::fs::read_to_string("/sys/kernel/uevent_seqnum").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1)
}

/// Whether this very device is still plugged in.
pub fn is_present(device: &Identity) -> bool {
    identity(&device.devpath).is_some_and(|now| now == *device)
}

/// Whether a device with that number is plugged in, or the host has a node with it at that path: some nodes stand for a
/// driver that is loaded when they are opened.
pub fn has_number(number: Number, node: &str) -> bool {
    let kind = if number.kind == Kind::Block { "block" } else { "char" };
    let listed = format!("/sys/dev/{kind}/{}:{}", number.major, number.minor);
    stat(&listed).is_ok() || lstat(node).is_ok_and(|stat| number_of(&stat) == Some(number))
}

fn identity(devpath: &str) -> Option<Identity> {
    let directory = format!("/sys{devpath}");
    let inode = stat(&directory).ok()?.st_ino;
    let diskseq =
        std::fs::read_to_string(format!("{directory}/diskseq")).ok().and_then(|text| text.trim().parse().ok());
    Some(Identity { devpath: devpath.to_owned(), inode, diskseq })
}

/// `None` for devices without a node, and for those that vanish while we look.
fn owned(device: &udev::Device) -> Option<Device> {
    let devnum = device.devnum().filter(|devnum| *devnum != 0)?;
    let node = device.devnode()?.to_str()?.to_owned();
    let subsystem = device.subsystem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let number = number(device, devnum);
    let stat = lstat(&node).ok().filter(|stat| number_of(stat) == Some(number))?;
    Some(Device {
        number,
        identity: identity(device.devpath().to_str()?)?,
        node,
        subsystem,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode & 0o777,
        properties: properties(device),
    })
}

fn number(device: &udev::Device, devnum: u64) -> Number {
    let is_block = device.subsystem().is_some_and(|name| name == "block");
    let kind = if is_block { Kind::Block } else { Kind::Char };
    Number { kind, major: rustix::fs::major(devnum), minor: rustix::fs::minor(devnum) }
}

fn properties(device: &udev::Device) -> BTreeMap<String, String> {
    let text = |value: &std::ffi::OsStr| value.to_string_lossy().into_owned();
    device.properties().map(|entry| (text(entry.name()), text(entry.value()))).collect()
}
