//! What a person or a program reads on stdout.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use rustix::termios::tcgetwinsize;
use serde::Serialize;

use crate::core::text::{is_printable, printable};
use crate::error::{Error, Result};
use crate::log::colours_are_welcome;

/// One line; control characters from containers are spelt out.
pub(super) fn line(text: &str) -> Result<()> {
    write(&format!("{}\n", printable(text)))
}

/// One JSON document on one line.
pub(super) fn json(value: &impl Serialize) -> Result<()> {
    write(&format!("{}\n", json_text(value)))
}

/// Control characters, which JSON allows in part, are spelt out as JSON does.
fn json_text(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).expect("our own types are printable");
    // There are none of them outside of strings.
    text.chars().fold(String::new(), |text, one| match is_printable(one) {
        true => text + one.encode_utf8(&mut [0; 4]),
        false => text + &format!("\\u{:04x}", u32::from(one)),
    })
}

/// Columns as wide as their widest cell. On a terminal they are made to fit its width, and the header is bold, unless
/// `NO_COLOR` is set (no-color.org).
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Result<()> {
    let mut lines = vec![header.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.map(|row| row.iter().map(|cell| printable(cell)).collect()));
    let mut text = lay_out(&lines, width());
    if io::stdout().is_terminal()
        && colours_are_welcome()
        && let Some(end) = text.find('\n')
    {
        text.insert_str(end, "\x1b[0m");
        text.insert_str(0, "\x1b[1m");
    }
    write(&text)
}

/// Columns of the terminal that stdout is, if it is one.
pub(super) fn width() -> Option<usize> {
    let size = io::stdout().is_terminal().then(|| tcgetwinsize(io::stdout()).ok()).flatten();
    size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0)
}

/// What stands between two columns.
const GAP: usize = 2;
/// No column is cut to less.
const NARROW: usize = 8;

/// The lines in columns; the last one is not padded. Where that is wider than `most`, the widest columns are cut.
fn lay_out(lines: &[Vec<String>], most: Option<usize>) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| lines.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut widths: Vec<usize> = (0..columns).map(width).collect();
    while most.is_some_and(|most| widths.iter().sum::<usize>() + GAP * columns.saturating_sub(1) > most)
        && let Some(widest) = widths.iter_mut().max().filter(|widest| **widest > NARROW)
    {
        *widest -= 1;
    }
    let mut text = String::new();
    for row in lines {
        let cells = row.iter().zip(&widths).map(|(cell, width)| match cell.chars().count() > *width {
            true => cell.chars().take(width - 1).chain(['…']).collect(),
            false => format!("{cell:<width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join(&" ".repeat(GAP)).trim_end());
        text.push('\n');
    }
    text
}

/// One line of many, as JSON or as text; `false` when nobody reads them any more.
pub(super) fn event(value: &(impl Serialize + Display), as_json: bool) -> Result<bool> {
    let line = if as_json { json_text(value) } else { printable(&value.to_string()) };
    try_write(&format!("{line}\n"))
}

/// A reader that has seen enough (`| head`) is no failure.
fn write(text: &str) -> Result<()> {
    try_write(text).map(drop)
}

fn try_write(text: &str) -> Result<bool> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).map_err(Error::host("write to stdout")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(rows: &[&[&str]]) -> Vec<Vec<String>> {
        rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect()
    }

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = lines(&[&["NAME", "DEVICE"], &["wéb", "/dev/ttyUSB0"], &["database", ""]]);
        assert_eq!(lay_out(&rows, None), "NAME      DEVICE\nwéb       /dev/ttyUSB0\ndatabase\n");
        assert_eq!(lay_out(&rows, Some(22)), lay_out(&rows, None), "it fits");
        assert_eq!(lay_out(&[], Some(80)), "");
    }

    #[test]
    fn the_widest_are_cut_to_fit() {
        let rows = lines(&[&["A", "B", "C"], &["x", "0123456789abcdef", "0123456789"]]);
        assert_eq!(lay_out(&rows, Some(25)), "A  B           C\nx  012345678…  0123456789\n");
        for width in 0..40 {
            let text = lay_out(&rows, Some(width));
            let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(longest <= width.max(1 + 2 + NARROW + 2 + NARROW), "{width}: {text}");
        }
    }
}
