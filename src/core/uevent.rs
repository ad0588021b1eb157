//! The kernel's uevents, as they come from netlink group 1 (lib/kobject_uevent.c):
//! `ACTION@DEVPATH`, NUL, then `KEY=VALUE` pairs, each ended by NUL.

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
    let mut parts = message.split(|byte| *byte == 0).map(|part| std::str::from_utf8(part).ok());
    parts.next()??.split_once('@')?;
    let (mut action, mut devpath, mut subsystem, mut devname, mut major, mut minor) =
        (None, None, None, None, None, None);
    for (key, value) in parts.flatten().filter_map(|part| part.split_once('=')) {
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
    let (devpath, devname, subsystem) = (devpath?, devname?, subsystem?);
    let plain = devpath.starts_with('/') && !devname.is_empty() && !devname.starts_with('/');
    if !plain || devname.split('/').chain(devpath.split('/')).any(|part| part == "..") {
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

    proptest! {
        #[test]
        fn no_message_panics(message in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&message);
        }

        #[test]
        fn no_cut_or_changed_message_panics(cut in 0..ADD.len(), at in 0..ADD.len(), byte in any::<u8>()) {
            let mut message = ADD.to_vec();
            message[at] = byte;
            let _ = parse(&message[..cut]);
        }
    }
}
