//! `qm-hotplug doctor`.

use crate::agent::client;
use crate::cli::output;
use crate::core::diagnosis::{CheckInfo, State, lines};
use crate::core::host::Agent;
use crate::core::info::StatusInfo;
use crate::core::protocol::{Nothing, Request};
use crate::error::{Error, Result};
use crate::ops::doctor::look;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print an array of checks as JSON
    #[arg(long)]
    json: bool,
}

/// Columns, where stdout is no terminal or a wider one, and of the narrowest that is made use of.
const WIDTH: usize = 80;
const NARROW: usize = 40;

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let agent = match client::call::<StatusInfo>(&Request::Status(Nothing {})) {
        Ok(status) => Some(Ok(status.map(|its| Agent { version: its.version, configuration: its.configuration }))),
        // Its socket is root's, and a group's.
        Err(error) if error.exit_code() == 5 && !rustix::process::geteuid().is_root() => None,
        Err(error) => Some(Err(error.chain())),
    };
    let checks = lines(&look(agent));
    if args.json {
        output::json(&checks)?;
    } else {
        layout(&checks, output::width().unwrap_or(WIDTH).clamp(NARROW, WIDTH))
            .iter()
            .try_for_each(|line| output::line(line))?;
    }
    let mut topics: Vec<&str> =
        checks.iter().filter(|check| check.state == State::Problem).map(|check| check.topic).collect();
    topics.dedup();
    if topics.is_empty() { Ok(()) } else { Err(Error::Unwell(topics.join(", "))) }
}

/// A table with its last column wrapped; what to do stands below what was found.
fn layout(checks: &[CheckInfo], width: usize) -> Vec<String> {
    let topic = checks.iter().map(|check| check.topic.len()).max().unwrap_or(0);
    let state = State::Warning.word().len();
    let indent = topic + state + 4;
    let row = |first: &str, second: &str, third: &str| format!("{first:<topic$}  {second:<state$}  {third}");
    let mut rows = vec![row("CHECK", "STATE", "FINDING")];
    for check in checks {
        let (mut first, mut word) = (check.topic, check.state.word());
        for line in wrap(&check.finding, width - indent) {
            rows.push(row(first, word, &line));
            (first, word) = ("", "");
        }
        let remedy = check.remedy.iter().flat_map(|remedy| wrap(remedy, width - indent - 2));
        rows.extend(
            remedy.enumerate().map(|(at, line)| row("", "", &format!("{} {line}", if at == 0 { '→' } else { ' ' }))),
        );
    }
    rows
}

/// Lines of whole words, as long as the longest word at least.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always one");
        match line.chars().count() {
            0 => line.push_str(word),
            length if length + 1 + word.chars().count() <= width => *line += &format!(" {word}"),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_no_word_is_cut() {
        let check = |topic, state, finding: &str, remedy: Option<&str>| CheckInfo {
            topic,
            state,
            finding: finding.into(),
            remedy: remedy.map(str::to_owned),
        };
        let long = "word ".repeat(14);
        let path = "/x".repeat(40);
        let shown = layout(
            &[check("udev", State::Ok, "udevd runs", None), check("containers", State::Warning, &long, Some(&path))],
            WIDTH,
        );
        let words = |count| vec!["word"; count].join(" ");
        let expected = [
            "CHECK       STATE    FINDING".to_owned(),
            "udev        ok       udevd runs".to_owned(),
            format!("containers  warning  {}", words(12)),
            format!("{:21}{}", "", words(2)),
            format!("{:21}→ {path}", ""),
        ];
        assert_eq!(shown, expected);
        assert!(shown[..4].iter().all(|line| line.chars().count() <= WIDTH));
    }
}
