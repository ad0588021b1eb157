//! Lines of a log that come again and again: which of them are told, and how many were not.

use std::collections::BTreeMap;

/// Milliseconds in which repeats of a line are counted and not told.
pub const QUIET: u64 = 60_000;
/// Different lines of one container that are told in that time: one that fails in ever new ways fills no log.
const MANY: usize = 32;

/// What was told of each container, and when. Times are in milliseconds.
#[derive(Debug, Default)]
pub struct Flood {
    containers: BTreeMap<String, Told>,
    /// When there may be something to tell next.
    due: u64,
}

#[derive(Debug, Default)]
struct Told {
    lines: BTreeMap<String, Line>,
    /// Different ones that there was no room for.
    others: Line,
}

#[derive(Debug, Clone, Copy, Default)]
struct Line {
    since: u64,
    untold: u64,
}

/// What was not told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untold {
    /// Of which container, empty where the lines name none.
    pub container: String,
    /// The line that was repeated; `None` for lines of which none was told.
    pub line: Option<String>,
    /// How often.
    pub count: u64,
}

impl Flood {
    /// Whether a line is to be told now; else it is counted.
    pub fn tell(&mut self, container: &str, line: &str, now: u64) -> bool {
        if self.containers.is_empty() {
            self.due = now + QUIET;
        }
        let told = self.containers.entry(container.to_owned()).or_default();
        if let Some(known) = told.lines.get_mut(line) {
            if now < known.since + QUIET || known.untold > 0 {
                known.untold += 1;
                return false;
            }
            known.since = now;
            return true;
        }
        if told.lines.len() < MANY {
            told.lines.insert(line.to_owned(), Line { since: now, untold: 0 });
            return true;
        }
        if told.others.untold == 0 {
            told.others.since = now;
        }
        told.others.untold += 1;
        false
    }

    /// What was counted for long enough to be told now. Forgets lines that have not come again.
    pub fn due(&mut self, now: u64) -> Vec<Untold> {
        if now < self.due {
            return Vec::new();
        }
        let untold = self.take(|line| now >= line.since + QUIET, now);
        let lines = self.containers.values().flat_map(|told| told.lines.values().chain([&told.others]));
        self.due = (lines.map(|line| line.since).min().unwrap_or(now) + QUIET).max(now + 1);
        untold
    }

    /// All that was counted, before the end or a new beginning: nothing was told then.
    pub fn rest(&mut self) -> Vec<Untold> {
        let untold = self.take(|_| true, 0);
        *self = Flood::default();
        untold
    }

    fn take(&mut self, is_over: impl Fn(&Line) -> bool, now: u64) -> Vec<Untold> {
        let mut all = Vec::new();
        self.containers.retain(|container, told| {
            let mut add = |line: Option<&String>, count| {
                all.push(Untold { container: container.clone(), line: line.cloned(), count });
            };
            told.lines.retain(|text, line| {
                let is_over = is_over(line);
                let count = if is_over { std::mem::take(&mut line.untold) } else { 0 };
                if count > 0 {
                    line.since = now;
                    add(Some(text), count);
                }
                !is_over || count > 0
            });
            if told.others.untold > 0 && is_over(&told.others) {
                add(None, std::mem::take(&mut told.others).untold);
            }
            !told.lines.is_empty() || told.others.untold > 0
        });
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untold(container: &str, line: Option<&str>, count: u64) -> Untold {
        Untold { container: container.into(), line: line.map(str::to_owned), count }
    }

    #[test]
    fn a_repeat_is_counted_and_told_once_a_minute() {
        let mut flood = Flood::default();
        assert!(flood.tell("web", "x", 0));
        assert!(flood.tell("db", "x", 0) && flood.tell("web", "y", 1), "another container, another line");
        assert!((1..10_000).all(|now| !flood.tell("web", "x", now)));
        assert_eq!(flood.due(59_999), []);
        assert!(!flood.tell("web", "x", 60_000), "it is told with its number");
        assert_eq!(flood.due(60_000), [untold("web", Some("x"), 10_000)]);
        assert!(flood.tell("db", "x", 60_001), "not repeated for a minute");
        assert!(!flood.tell("web", "x", 60_002));
        assert_eq!(flood.due(119_999), []);
        assert_eq!(flood.due(120_000), [untold("web", Some("x"), 1)]);
        assert_eq!(flood.due(180_001), []);
        assert!(flood.containers.is_empty(), "{flood:?}");
        assert!(flood.tell("web", "x", 180_002));
    }

    #[test]
    fn ever_new_lines_of_one_container_are_counted_too() {
        let mut flood = Flood::default();
        let told = (0..10_000).filter(|now| flood.tell("web", &format!("line {now}"), *now)).count();
        assert_eq!(told, MANY);
        assert!(flood.tell("db", "x", 10_000), "others are heard");
        assert_eq!(flood.due(70_100), [untold("web", None, 10_000 - MANY as u64)]);
        assert!(flood.tell("web", "line 3", 70_101));
        assert!(!flood.tell("web", "line 3", 70_102));
        assert_eq!(flood.rest(), [untold("web", Some("line 3"), 1)]);
        assert_eq!(flood.rest(), []);
    }
}
