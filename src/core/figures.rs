//! What an agent has worked through since it started, and how long that took.

use serde::{Deserialize, Serialize};

/// How many of the last grants count for [`Latency`].
const KEPT: usize = 1024;

/// The counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// Events of devices.
    pub seen: u64,
    /// How often events were lost, since they came faster than they could be read.
    pub lost: u64,
    /// How often everything was compared: at the start, after a loss, after a reload.
    pub compared: u64,
    /// Microseconds of the last grants, in no particular order.
    latencies: Vec<u64>,
    /// Which of them is the next to be written over.
    next: usize,
}

/// Microseconds from hearing of an event until a container had the device, of the last 1024 grants. The field names are
/// stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How many grants these are of.
    pub count: usize,
    /// Half of them took no longer.
    pub p50: u64,
    /// 90 of 100 took no longer.
    pub p90: u64,
    /// 99 of 100 took no longer.
    pub p99: u64,
    /// The longest.
    pub most: u64,
}

impl Figures {
    /// A grant that an event was the cause of.
    pub fn granted(&mut self, micros: u64) {
        match self.latencies.get_mut(self.next) {
            Some(oldest) => *oldest = micros,
            None => self.latencies.push(micros),
        }
        self.next = (self.next + 1) % KEPT;
    }

    /// How long the last ones took, if there were any.
    pub fn latency(&self) -> Option<Latency> {
        let mut all = self.latencies.clone();
        all.sort_unstable();
        let most = *all.last()?;
        // The smallest that so many of a hundred are not above.
        let of_hundred = |part: usize| all[(all.len() * part).div_ceil(100) - 1];
        Some(Latency { count: all.len(), p50: of_hundred(50), p90: of_hundred(90), p99: of_hundred(99), most })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_last_grants() {
        let mut figures = Figures::default();
        assert_eq!(figures.latency(), None);
        figures.granted(7);
        assert_eq!(figures.latency(), Some(Latency { count: 1, p50: 7, p90: 7, p99: 7, most: 7 }));
        (1..=100).rev().for_each(|micros| figures.granted(micros));
        let Latency { count, p50, p90, p99, most } = figures.latency().unwrap();
        assert_eq!((count, p50, p90, p99, most), (101, 50, 90, 99, 100));
        (0..2000).for_each(|_| figures.granted(5));
        assert_eq!(figures.latency(), Some(Latency { count: 1024, p50: 5, p90: 5, p99: 5, most: 5 }));
    }
}
