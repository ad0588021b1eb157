//! Messages about devices as udevd sends them (group 2, systemd's sd-device/device-monitor.c) and as the kernel does
//! (group 1, lib/kobject_uevent.c), for those in a container who listen.

/// What precedes the properties in a message of udev's. Numbers are in the machine's order but for those that filters
/// compare: they are in network order.
const PREFIX: &[u8; 8] = b"libudev\0";
const MAGIC: u32 = 0xfeed_cafe;
const HEADER: u32 = 40;

/// A message of udev's with these properties, in their order. The header has what clients' filters look at: hashes of
/// `SUBSYSTEM` and `DEVTYPE`, and a Bloom filter of the tags in `TAGS`.
pub fn of_udev<'a>(properties: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Vec<u8> {
    let value = |wanted: &str| properties.clone().find(|(key, _)| *key == wanted).map(|(_, value)| value);
    let hashed = |key: &str| value(key).map_or(0, |value| murmur2(value.as_bytes()));
    let tags = value("TAGS").unwrap_or_default().split(':').filter(|tag| !tag.is_empty());
    let bloom = tags.fold(0, |bits, tag| bits | bloom(tag));
    let text = joined(properties.clone());
    let mut message = Vec::with_capacity(HEADER as usize + text.len());
    message.extend(PREFIX);
    message.extend(MAGIC.to_be_bytes());
    [HEADER, HEADER, text.len() as u32].into_iter().for_each(|number| message.extend(number.to_ne_bytes()));
    let filters = [hashed("SUBSYSTEM"), hashed("DEVTYPE"), (bloom >> 32) as u32, bloom as u32];
    filters.into_iter().for_each(|number| message.extend(number.to_be_bytes()));
    message.extend(text);
    message
}

/// A message of the kernel's, but for `SEQNUM`, which the kernel itself adds to what it is asked to spread.
pub fn of_kernel<'a>(
    action: &'a str,
    devpath: &'a str,
    rest: impl Iterator<Item = (&'a str, &'a str)> + Clone,
) -> Vec<u8> {
    let mut message = format!("{action}@{devpath}\0").into_bytes();
    let first = [("ACTION", action), ("DEVPATH", devpath)];
    message.extend(joined(first.into_iter().chain(rest)));
    message
}

/// Each pair ended by NUL. A NUL within one would begin another: such a pair is left out.
fn joined<'a>(properties: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let plain = properties.filter(|(key, value)| !key.contains('\0') && !value.contains('\0'));
    plain.flat_map(|(key, value)| format!("{key}={value}\0").into_bytes()).collect()
}

/// Four bits of the hash of a tag, out of 64.
fn bloom(tag: &str) -> u64 {
    let hash = murmur2(tag.as_bytes());
    [0, 6, 12, 18].into_iter().fold(0, |bits, shift| bits | 1 << ((hash >> shift) & 63))
}

/// MurmurHash2 by Austin Appleby, in the public domain, with seed 0.
fn murmur2(bytes: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = bytes.len() as u32;
    let mut blocks = bytes.chunks_exact(4);
    for block in &mut blocks {
        let mut k = u32::from_le_bytes(block.try_into().expect("four bytes")).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    let rest = blocks.remainder();
    if !rest.is_empty() {
        let tail = rest.iter().rev().fold(0, |tail, byte| tail << 8 | u32::from(*byte));
        hash = (hash ^ tail).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::uevent::{Action, UdevMessage, parse, parse_udev};
    use proptest::prelude::*;

    #[test]
    fn the_hash_is_the_known_one() {
        for (text, hash) in
            [("", 0), ("tty", 0x8afa_90c8), ("block", 0xf003_1db7), ("input", 0xc1a2_8470), ("usb_device", 0x27f8_f50c)]
        {
            assert_eq!(murmur2(text.as_bytes()), hash, "{text}");
        }
    }

    #[test]
    fn our_own_readers_understand_them() {
        let pairs = [("ACTION", "add"), ("DEVPATH", "/devices/x/tty/ttyUSB0"), ("SUBSYSTEM", "tty"), ("SEQNUM", "7")];
        let message = of_udev(pairs.into_iter());
        let expected = UdevMessage { action: "add", devpath: "/devices/x/tty/ttyUSB0", sequence: 7 };
        assert_eq!(parse_udev(&message), Some(expected));
        let rest = [("SUBSYSTEM", "tty"), ("MAJOR", "188"), ("MINOR", "0"), ("DEVNAME", "ttyUSB0")];
        let event = parse(&of_kernel("remove", "/devices/x", rest.into_iter())).unwrap();
        assert_eq!((event.action, &*event.node, event.number.major), (Action::Remove, "/dev/ttyUSB0", 188));
    }

    proptest! {
        #[test]
        fn no_value_makes_another_property(value in "\\PC*|[A-Z=\0]{0,20}") {
            let pairs = [("ACTION", "add"), ("X", value.as_str()), ("DEVPATH", "/devices/x")];
            let message = of_udev(pairs.into_iter());
            let expected = UdevMessage { action: "add", devpath: "/devices/x", sequence: 0 };
            prop_assert_eq!(parse_udev(&message), Some(expected));
            let text = &message[40..];
            prop_assert!(text.split(|byte| *byte == 0).filter(|part| part.starts_with(b"ACTION=")).count() == 1);
        }
    }
}
