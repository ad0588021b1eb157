//! The program at the cgroup root as a build of version 0.1.0 made it, before refusals were reported: over the maps of
//! grants and of witnesses alone.

use std::os::fd::AsRawFd;

use qm_hotplug::core::filter_program::{GRANTS_MAP, Insn, KEY_SIZE, VALUE_SIZE, WITNESS_MAP, WITNESS_SIZE};
use qm_hotplug::sys::bpf::{Map, Program};

pub const NAME: &str = "qmhp_lift1_81e8";

/// Its instructions, little-endian. Where they name a map, the number of its descriptor is to be put in.
#[rustfmt::skip]
const LIFT: [u64; 77] = [
    0x00000000_000016bf, 0x00000000_fffc0a62, 0x000008ae_00001118, 0x00000000_00000000, 0x00000000_0000a2bf,
    0xfffffffc_00000207, 0x00000001_00000085, 0x00000000_00430015, 0x00000000_00000979, 0x00000000_0000007a,
    0x000000ba_00000085, 0x00000000_003f0016, 0xffffffff_000007b7, 0xffffffff_00060016, 0x00000000_000001bc,
    0x000007d0_00000104, 0x00000000_00000184, 0x0000001f_00390126, 0x00000001_00000104, 0x00000000_0000176f,
    0x0000000e_00000085, 0x00000000_000000bc, 0x00000000_000091bf, 0x00000020_00000177, 0x00000000_000010af,
    0x00000000_000001bf, 0x00000000_00000187, 0x00000000_0000104f, 0x0000003f_00000077, 0x00000001_00000017,
    0x00000000_0000095f, 0x00000000_00006161, 0x00000000_000012bc, 0x0000ffff_00000254, 0x00000000_ffe02a63,
    0x00000010_00000174, 0x00000000_ffd01a7b, 0x00000000_00046161, 0x00000000_ffe41a63, 0x00000000_00086161,
    0x00000000_ffe81a63, 0x00000000_ffec0a62, 0x00000001_000008b7, 0x0000001f_001d0826, 0x00000000_000071bf,
    0x00000000_0000817f, 0x00000001_00000157, 0x00000000_00150115, 0x00000000_000081bf, 0x0000007b_00000085,
    0x00000000_00160015, 0x00000000_ffd80a7b, 0x00000457_00001118, 0x00000000_00000000, 0x00000000_0000a2bf,
    0xffffffd8_00000207, 0x00000001_00000085, 0x00000000_000b0015, 0x00000000_00000161, 0x00000000_ffd0a279,
    0x00000000_0000215f, 0x00000000_0007215d, 0x00000000_000091bf, 0x00000000_0000817f, 0x00000001_00000157,
    0x00000000_00050155, 0x00000050_00000085, 0x00000000_ffd8a179, 0x00000000_0002101d, 0x00000001_00000807,
    0x00000000_ffe40005, 0x00000000_000001b7, 0x00000000_00010005, 0xffffffff_000001b7, 0x000000bb_00000085,
    0x00000001_000000b7, 0x00000000_00000095,
];
/// Where they do.
const OF_WITNESS: usize = 2;
const OF_GRANTS: usize = 52;

/// Loads it. Returns it with its map of grants.
pub fn load() -> (Program, Map) {
    let grants = Map::create_hash(GRANTS_MAP, KEY_SIZE, VALUE_SIZE, 65_536).unwrap();
    let witness = Map::create_percpu_array(WITNESS_MAP, WITNESS_SIZE, 1).unwrap();
    let insns: Vec<Insn> = LIFT
        .iter()
        .enumerate()
        .map(|(at, insn)| {
            let [code, registers, off_low, off_high, imm @ ..] = insn.to_le_bytes();
            let imm = match at {
                OF_WITNESS => witness.as_raw_fd(),
                OF_GRANTS => grants.as_raw_fd(),
                _ => i32::from_le_bytes(imm),
            };
            Insn::new(code, registers & 15, registers >> 4, i16::from_le_bytes([off_low, off_high]), imm)
        })
        .collect();
    (Program::load(NAME, &insns).unwrap(), grants)
}
