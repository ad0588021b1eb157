//! What a person or a program reads on stdout.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use crate::core::text::{is_printable, printable};
use crate::error::{Error, Result};

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

/// Columns as wide as their widest cell; the last one is not padded.
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Result<()> {
    let mut lines = vec![header.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.map(|row| row.iter().map(|cell| printable(cell)).collect()));
    let width = |column: usize| lines.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for row in &lines {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    write(&text)
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
