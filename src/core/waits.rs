//! How long each container has kept others waiting lately. Who answers slowly on purpose holds up the rest for a bounded
//! time, and then gets a small share of it.

use std::collections::BTreeMap;

/// Milliseconds that a container may take in one go. The work itself takes microseconds.
const FREE: u64 = 3_000;
/// What takes no longer than this is not counted: a busy host is slow, too, and its containers must not suffer for it.
const USUAL: u64 = 200;
/// A tenth of the time is given back.
const SHARE: u64 = 10;

/// What containers owe, by what tells them apart. Times are in milliseconds.
#[derive(Debug)]
pub struct Waits<K>(BTreeMap<K, Debt>);

#[derive(Debug, Clone, Copy)]
struct Debt {
    owed: u64,
    at: u64,
}

impl Debt {
    fn left(&self, now: u64) -> u64 {
        self.owed.saturating_sub(now.saturating_sub(self.at) / SHARE)
    }
}

/// None owes anything.
impl<K> Default for Waits<K> {
    fn default() -> Waits<K> {
        Waits(BTreeMap::new())
    }
}

impl<K: Ord> Waits<K> {
    /// Whether it is a container's turn; else in how many milliseconds it will be.
    pub fn turn(&self, container: &K, now: u64) -> Result<(), u64> {
        match self.0.get(container).map_or(0, |debt| debt.left(now)) {
            owed if owed >= FREE => Err((owed - FREE + 1) * SHARE),
            _ => Ok(()),
        }
    }

    /// A container has taken so long.
    pub fn took(&mut self, container: K, time: u64, now: u64) {
        if time <= USUAL {
            return;
        }
        self.0.retain(|_, debt| debt.left(now) > 0);
        let debt = self.0.entry(container).or_insert(Debt { owed: 0, at: now });
        *debt = Debt { owed: debt.left(now) + time, at: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_one_gets_a_tenth_of_the_time() {
        let (mut waits, mut now, mut taken) = (Waits::default(), 0, 0);
        while now < 600_000 {
            match waits.turn(&"slow", now) {
                Ok(()) => {
                    now += 1_900;
                    taken += 1_900;
                    waits.took("slow", 1_900, now);
                }
                Err(left) => {
                    assert_eq!(waits.turn(&"other", now), Ok(()));
                    now += left;
                    assert_eq!(waits.turn(&"slow", now), Ok(()), "it is told when");
                }
            }
        }
        assert!(taken <= 600_000 / 9, "{taken}");
    }

    #[test]
    fn one_that_is_as_quick_as_usual_always_has_its_turn() {
        let mut waits = Waits::default();
        (0..10_000).for_each(|now| waits.took(1, USUAL, now));
        assert_eq!(waits.turn(&1, 10_000), Ok(()));
        waits.took(2, 3_000, 10_000);
        assert_eq!(waits.turn(&2, 10_000), Err(10), "a moment after it was given up");
        assert_eq!(waits.turn(&2, 10_010), Ok(()));
        waits.took(1, 1_001, 100_000);
        assert_eq!(waits.0.len(), 1, "who owes nothing is forgotten");
    }
}
