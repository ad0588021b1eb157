//! A row of the table.

use std::time::{Duration, Instant};

/// Durations of one thing, sorted.
pub struct Figure {
    name: String,
    times: Vec<Duration>,
    target: String,
}

impl Figure {
    pub fn new(name: impl Into<String>, mut times: Vec<Duration>, target: impl Into<String>) -> Figure {
        let (name, target) = (name.into(), target.into());
        assert!(!times.is_empty(), "{name}: nothing was measured");
        times.sort();
        Figure { name, times, target }
    }

    pub fn print_header() {
        println!("{:<56} {:>9} {:>9} {:>9} {:>9} {:>5}  target", "what", "median", "p90", "p99", "max", "runs");
    }

    pub fn print(&self) {
        let at = |part: f64| text(self.times[((self.times.len() - 1) as f64 * part).round() as usize]);
        let name = &self.name;
        println!(
            "{name:<56} {:>9} {:>9} {:>9} {:>9} {:>5}  {}",
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0),
            self.times.len(),
            self.target
        );
    }
}

fn text(time: Duration) -> String {
    match time.as_nanos() {
        nanos @ 0..10_000 => format!("{nanos} ns"),
        nanos @ 10_000..10_000_000 => format!("{} µs", nanos / 1000),
        nanos => format!("{} ms", nanos / 1_000_000),
    }
}

/// The value in the middle.
pub fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[(times.len() - 1) / 2]
}

/// Times single runs.
pub fn sample(runs: usize, mut work: impl FnMut()) -> Vec<Duration> {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .collect()
}

/// Times something short: each value is the mean of a batch.
pub fn sample_short(batches: usize, batch: u32, mut work: impl FnMut()) -> Vec<Duration> {
    sample(batches, || (0..batch).for_each(|_| work())).into_iter().map(|time| time / batch).collect()
}
