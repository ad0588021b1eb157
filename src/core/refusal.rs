//! What the device filter reports of a refusal, and which of the reports are worth a line in the log.

use std::collections::HashMap;

use crate::core::device::{Access, Kind, Number};
use crate::core::filter_program::KEY_SIZE;

/// An open that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// Id of the watched cgroup, in which or below which it was tried.
    pub cgroup: u64,
    /// The device.
    pub number: Number,
    /// What was wanted.
    pub access: Access,
}

impl Refusal {
    /// Reads a report: a key of the map of grants, with the access in its last field. `None` for anything else.
    pub fn parse(report: &[u8]) -> Option<Refusal> {
        let report: &[u8; KEY_SIZE] = report.try_into().ok()?;
        let field = |at: usize| u32::from_ne_bytes(report[at..at + 4].try_into().expect("four bytes"));
        let cgroup = u64::from_ne_bytes(report[..8].try_into().expect("eight bytes"));
        let number = Number { kind: Kind::from_bpf_code(field(8))?, major: field(12), minor: field(16) };
        Some(Refusal { cgroup, number, access: Access::from_bits(field(20)) })
    }
}

/// Milliseconds in which repeats of a refusal are counted and not told again.
pub const QUIET: u64 = 10_000;
/// Devices of one cgroup that are told in that time: a container that tries all numbers fills no log.
const MANY: usize = 16;

/// Which refusals were told when.
#[derive(Debug, Default)]
pub struct Repeats(HashMap<u64, Told>);

#[derive(Debug, Default)]
struct Told {
    devices: HashMap<Number, Last>,
    /// Untold ones of devices that there was no room for.
    others: u64,
}

#[derive(Debug)]
struct Last {
    at: u64,
    untold: u64,
}

impl Repeats {
    /// Takes a refusal at a time in milliseconds. `Some` if it is to be told, with the number of those that were not
    /// told since the last time.
    pub fn tell(&mut self, cgroup: u64, number: Number, now: u64) -> Option<u64> {
        let told = self.0.entry(cgroup).or_default();
        if let Some(last) = told.devices.get_mut(&number) {
            if now.saturating_sub(last.at) < QUIET {
                last.untold += 1;
                return None;
            }
            last.at = now;
            return Some(std::mem::take(&mut last.untold));
        }
        if told.devices.len() >= MANY {
            let mut forgotten = 0;
            told.devices.retain(|_, last| {
                let stays = now.saturating_sub(last.at) < QUIET;
                forgotten += if stays { 0 } else { last.untold };
                stays
            });
            told.others += forgotten;
        }
        if told.devices.len() >= MANY {
            told.others += 1;
            return None;
        }
        told.devices.insert(number, Last { at: now, untold: 0 });
        Some(std::mem::take(&mut told.others))
    }

    /// Forgets a cgroup.
    pub fn forget(&mut self, cgroup: u64) {
        self.0.remove(&cgroup);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn number(minor: u32) -> Number {
        Number { kind: Kind::Char, major: 81, minor }
    }

    #[test]
    fn a_repeat_is_counted_and_told_with_the_next_one_after_ten_seconds() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.tell(1, number(0), 0), Some(0));
        assert_eq!(repeats.tell(1, number(0), 1), None);
        assert_eq!(repeats.tell(1, number(1), 1), Some(0), "another device");
        assert_eq!(repeats.tell(2, number(0), 1), Some(0), "another container");
        assert_eq!(repeats.tell(1, number(0), 9_999), None);
        assert_eq!(repeats.tell(1, number(0), 10_000), Some(2));
        assert_eq!(repeats.tell(1, number(0), 10_001), None);
        repeats.forget(1);
        assert_eq!(repeats.tell(1, number(0), 10_002), Some(0));
    }

    #[test]
    fn one_that_tries_all_numbers_is_told_of_a_few_times() {
        let mut repeats = Repeats::default();
        let told = (0..1000).filter(|minor| repeats.tell(1, number(*minor), u64::from(*minor)).is_some()).count();
        assert_eq!(told, MANY);
        assert_eq!(repeats.tell(2, number(0), 1000), Some(0), "others are heard");
        assert_eq!(repeats.tell(1, number(1000), 20_000), Some(984));
        assert_eq!(repeats.0[&1].devices.len(), 1);
    }

    proptest! {
        #[test]
        fn no_report_panics(report in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert!(Refusal::parse(&report).is_none() || report.len() == KEY_SIZE);
        }

        #[test]
        fn a_report_is_read_as_the_program_writes_it(cgroup in any::<u64>(), block in any::<bool>(), major in any::<u32>(), minor in any::<u32>(), bits in 0u32..8) {
            let kind = if block { Kind::Block } else { Kind::Char };
            let mut report = cgroup.to_ne_bytes().to_vec();
            report.extend([kind.bpf_code(), major, minor, bits].iter().flat_map(|field| field.to_ne_bytes()));
            let refusal = Refusal { cgroup, number: Number { kind, major, minor }, access: Access::from_bits(bits) };
            prop_assert_eq!(Refusal::parse(&report), Some(refusal));
        }
    }
}
