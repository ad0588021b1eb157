//! Uevents, as they come from netlink. The kernel's (group 1, lib/kobject_uevent.c): `ACTION@DEVPATH`, NUL, then
//! `KEY=VALUE` pairs, each ended by NUL. udev's (group 2, libudev-monitor.c): a header that says where the pairs are.

use crate::core::device::{Kind, Number};

/// What happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is there.
    Add,
    /// It is gone.
    Remove,
    /// Anything else: change, bind, unbind, move, online, offline.
    Other,
}

impl Action {
    /// From the value of `ACTION`.
    pub fn named(name: &str) -> Action {
        match name {
            "add" => Action::Add,
            "remove" => Action::Remove,
            _ => Action::Other,
        }
    }
}

/// A uevent about a device that has a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent {
    /// What happened.
    pub action: Action,
    /// The device's directory below `/sys`, from `DEVPATH`.
    pub devpath: String,
    /// Kind and numbers. The kind is block for subsystem `block`, else char, as udev has it.
    pub number: Number,
    /// The node's path, `/dev/` and `DEVNAME`.
    pub node: String,
    /// `SUBSYSTEM`.
    pub subsystem: String,
}

/// Reads a message of the kernel. `None` for events of devices without a node, for udev's own messages (they start
/// with `libudev`) and for anything malformed: an event only triggers a look, so one that cannot be read may be dropped.
pub fn parse(message: &[u8]) -> Option<Uevent> {
    let end = message.iter().position(|byte| *byte == 0)?;
    let (first, rest) = message.split_at(end);
    std::str::from_utf8(first).ok()?.split_once('@')?;
    let (mut action, mut devpath, mut subsystem, mut devname, mut major, mut minor) =
        (None, None, None, None, None, None);
    for (key, value) in properties(rest) {
        match key {
            "ACTION" => action = Some(Action::named(value)),
            "DEVPATH" => devpath = Some(value),
            "SUBSYSTEM" => subsystem = Some(value),
            "DEVNAME" => devname = Some(value),
            "MAJOR" => major = value.parse().ok(),
            "MINOR" => minor = value.parse().ok(),
            _ => {}
        }
    }
    let (devpath, devname, subsystem) = (plain(devpath?)?, devname?, subsystem?);
    if devname.is_empty() || devname.starts_with('/') || climbs(devname) {
        return None;
    }
    let kind = if subsystem == "block" { Kind::Block } else { Kind::Char };
    Some(Uevent {
        action: action?,
        devpath: devpath.to_owned(),
        number: Number { kind, major: major?, minor: minor? },
        node: format!("/dev/{devname}"),
        subsystem: subsystem.to_owned(),
    })
}

/// Size of the header: the name, a magic number, its own size, where the properties begin and how long they are, and
/// four numbers that filters look at.
const UDEV_HEADER: usize = 40;
const UDEV_MAGIC: u32 = 0xfeed_cafe;

/// A message of udev's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdevMessage<'a> {
    /// What happened.
    pub action: &'a str,
    /// The device's directory below `/sys`.
    pub devpath: &'a str,
    /// The number of the event; 0 where there is none.
    pub sequence: u64,
}

/// Reads a message of udev's: what happened, and to which device. The rest is not read, since whoever may send to that
/// group can write what he likes: what a device is, sysfs tells.
pub fn parse_udev(message: &[u8]) -> Option<UdevMessage<'_>> {
    let field = |at: usize| Some(<[u8; 4]>::try_from(message.get(at..at + 4)?).expect("four bytes"));
    let is_header = message.len() >= UDEV_HEADER && message.starts_with(b"libudev\0");
    if !is_header || u32::from_be_bytes(field(8)?) != UDEV_MAGIC {
        return None;
    }
    let (start, length) = (u32::from_ne_bytes(field(16)?) as usize, u32::from_ne_bytes(field(20)?) as usize);
    let text = message.get(start..start.checked_add(length)?)?;
    let (mut action, mut devpath, mut sequence) = (None, None, 0);
    for (key, value) in properties(text) {
        match key {
            "ACTION" => action = Some(value),
            "DEVPATH" => devpath = Some(value),
            "SEQNUM" => sequence = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    Some(UdevMessage { action: action?, devpath: plain(devpath?)?, sequence })
}

/// The pairs, each ended by NUL. What is not UTF-8 is passed over.
fn properties(text: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    text.split(|byte| *byte == 0).filter_map(|part| std::str::from_utf8(part).ok()?.split_once('='))
}

/// A `DEVPATH` that stays below `/sys`.
fn plain(devpath: &str) -> Option<&str> {
    (devpath.starts_with('/') && !climbs(devpath)).then_some(devpath)
}

fn climbs(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ADD: &[u8] =
        b"add@/devices/virtual/block/loop9\0ACTION=add\0DEVPATH=/devices/virtual/block/loop9\0SUBSYSTEM=block\0\
                         MAJOR=7\0MINOR=9\0DEVNAME=loop9\0DEVTYPE=disk\0DISKSEQ=12\0SEQNUM=1234\0";

    #[test]
    fn a_real_message_is_read() {
        let event = parse(ADD).unwrap();
        assert_eq!(event.action, Action::Add);
        assert_eq!(event.node, "/dev/loop9");
        assert_eq!(event.number, Number { kind: Kind::Block, major: 7, minor: 9 });
        assert_eq!(event.devpath, "/devices/virtual/block/loop9");
    }

    #[test]
    fn devices_without_a_node_and_udevs_messages_are_passed_over() {
        assert_eq!(parse(b"add@/module/loop\0ACTION=add\0DEVPATH=/module/loop\0SUBSYSTEM=module\0SEQNUM=1\0"), None);
        assert_eq!(parse(b"libudev\0\xfe\xed\xca\xfe"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn a_path_that_climbs_is_no_event() {
        let message = b"add@/x\0ACTION=add\0DEVPATH=/x\0SUBSYSTEM=tty\0MAJOR=1\0MINOR=1\0DEVNAME=../etc/x\0";
        assert_eq!(parse(message), None);
    }

    /// As udevd sends it.
    fn of_udev(text: &[u8]) -> Vec<u8> {
        let mut message = b"libudev\0\xfe\xed\xca\xfe".to_vec();
        [40, 40, text.len() as u32, 0, 0, 0, 0].iter().for_each(|field: &u32| message.extend(field.to_ne_bytes()));
        message.extend(text);
        message
    }

    #[test]
    fn udevs_messages_name_a_device() {
        let message = of_udev(b"ACTION=add\0DEVPATH=/devices/x/tty/ttyUSB0\0SEQNUM=7\0MAJOR=1\0ID_MODEL=\xff\0");
        let expected = UdevMessage { action: "add", devpath: "/devices/x/tty/ttyUSB0", sequence: 7 };
        assert_eq!(parse_udev(&message), Some(expected));
        let long = [&b"DEVPATH=/devices/x\0"[..], &b"A=b\0".repeat(5000), b"ACTION=remove\0"].concat();
        let expected = UdevMessage { action: "remove", devpath: "/devices/x", sequence: 0 };
        assert_eq!(parse_udev(&of_udev(&long)), Some(expected), "{} bytes", long.len());
        assert_eq!(parse_udev(&message[..message.len() - 1]), None, "cut");
        for bad in [&b"ACTION=add\0"[..], b"ACTION=add\0DEVPATH=x\0", b"ACTION=add\0DEVPATH=/a/../../etc\0"] {
            assert_eq!(parse_udev(&of_udev(bad)), None);
        }
        assert_eq!(parse_udev(ADD), None);
    }

    proptest! {
        #[test]
        fn no_message_panics(message in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = (parse(&message), parse_udev(&message));
        }

        #[test]
        fn no_header_of_udevs_panics(start in any::<u32>(), length in any::<u32>(), text in "[A-Z=/\0]{0,60}") {
            let mut message = of_udev(text.as_bytes());
            message[16..20].copy_from_slice(&start.to_ne_bytes());
            message[20..24].copy_from_slice(&length.to_ne_bytes());
            let _ = parse_udev(&message);
        }

        #[test]
        fn no_cut_or_changed_message_panics(cut in 0..ADD.len(), at in 0..ADD.len(), byte in any::<u8>()) {
            let mut message = ADD.to_vec();
            message[at] = byte;
            let _ = parse(&message[..cut]);
        }
    }
}
