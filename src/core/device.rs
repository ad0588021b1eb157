//! A device: what the kernel knows it by, and where its node belongs.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Character or block: the two kinds of device nodes that the device filter tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A block device (`b`).
    Block,
    /// A character device (`c`).
    Char,
}

impl Kind {
    /// The letter that `ls`, the OCI specification and cgroup rules use.
    pub fn letter(self) -> char {
        match self {
            Kind::Block => 'b',
            Kind::Char => 'c',
        }
    }

    /// `BPF_DEVCG_DEV_BLOCK` or `BPF_DEVCG_DEV_CHAR` (linux/bpf.h).
    pub fn bpf_code(self) -> u32 {
        match self {
            Kind::Block => 1,
            Kind::Char => 2,
        }
    }

    /// The inverse of [`Kind::bpf_code`].
    pub fn from_bpf_code(code: u32) -> Option<Kind> {
        match code {
            1 => Some(Kind::Block),
            2 => Some(Kind::Char),
            _ => None,
        }
    }
}

/// Kind, major and minor: what the device filter decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Number {
    /// Character or block.
    pub kind: Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}:{}", self.kind.letter(), self.major, self.minor)
    }
}

/// Which rights on a device: a subset of read, write and mknod. The bits are those of `BPF_DEVCG_ACC_*` (linux/bpf.h).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Access(u8);

impl Access {
    /// No right at all.
    pub const NONE: Access = Access(0);
    /// Making a device node.
    pub const MKNOD: Access = Access(1);
    /// Opening for reading.
    pub const READ: Access = Access(2);
    /// Opening for writing.
    pub const WRITE: Access = Access(4);
    /// `rwm`.
    pub const ALL: Access = Access(7);

    /// The bits as `BPF_DEVCG_ACC_*`.
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// From `BPF_DEVCG_ACC_*` bits; others are dropped.
    pub fn from_bits(bits: u32) -> Access {
        Access((bits & 7) as u8)
    }

    /// The rights of both.
    pub const fn union(self, other: Access) -> Access {
        Access(self.0 | other.0)
    }

    /// Whether there is no right.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [(Access::READ, 'r'), (Access::WRITE, 'w'), (Access::MKNOD, 'm')] {
            if self.0 & bit.0 != 0 {
                write!(f, "{letter}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Access({self})")
    }
}

impl From<Access> for String {
    fn from(access: Access) -> String {
        access.to_string()
    }
}

impl TryFrom<String> for Access {
    type Error = String;

    fn try_from(text: String) -> Result<Access, String> {
        text.parse()
    }
}

impl FromStr for Access {
    type Err = String;

    fn from_str(text: &str) -> Result<Access, String> {
        let mut bits = 0;
        for letter in text.chars() {
            bits |= match letter {
                'r' => Access::READ.0,
                'w' => Access::WRITE.0,
                'm' => Access::MKNOD.0,
                _ => return Err(format!("'{text}' is no access: give a subset of r, w and m, such as rw")),
            };
        }
        if bits == 0 {
            return Err("an access needs at least one of r, w and m".into());
        }
        Ok(Access(bits))
    }
}

/// What tells one plugged-in device from the next one that gets the same number: the sysfs directory and its inode,
/// and for block devices the sequence number of the disk (`diskseq`, Linux 5.15).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    /// The directory below `/sys`, as uevents name it (`DEVPATH`), such as `/devices/virtual/block/loop0`.
    pub devpath: String,
    /// Inode of that directory; 0 where it could not be read any more.
    pub inode: u64,
    /// `diskseq` of a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diskseq: Option<u64>,
}

/// A device that the host has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Kind and numbers.
    pub number: Number,
    /// Tells it from a later device with the same numbers.
    pub identity: Identity,
    /// The node's path on the host, `/dev/ttyUSB0`.
    pub node: String,
    /// Kernel subsystem (`tty`, `sound`); empty where unknown.
    pub subsystem: String,
    /// Owner of the host's node.
    pub uid: u32,
    /// Group of the host's node.
    pub gid: u32,
    /// Permission bits of the host's node, at most 0o777.
    pub mode: u32,
    /// udev properties, empty where no udevd runs.
    pub properties: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn access_is_printed_in_one_order_and_read_in_any() {
        assert_eq!("mwr".parse::<Access>().unwrap().to_string(), "rwm");
        assert_eq!("r".parse::<Access>().unwrap(), Access::READ);
        assert!("".parse::<Access>().unwrap_err().contains("at least one"));
        assert!("rx".parse::<Access>().unwrap_err().contains("'rx'"));
    }

    proptest! {
        #[test]
        fn access_survives_print_and_parse(bits in 1u32..8) {
            let access = Access::from_bits(bits);
            prop_assert_eq!(access.to_string().parse::<Access>().unwrap(), access);
        }
    }
}
