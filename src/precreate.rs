//! The OCI precreate hook: `config.json` on stdin, edited, on stdout.

use std::io::{Read, Write};

use serde_json::Value;

use crate::core::annotation::rules;
use crate::core::spec::{add_devices, annotations};
use crate::error::{Error, Result};
use crate::sys::devfs;

/// Runs the hook. With nothing of ours asked for, stdout is byte for byte stdin. Devices that are not there are no
/// error; a document that is no OCI specification is, and then nothing is written.
pub fn run(input: &mut impl Read, output: &mut impl Write) -> Result<()> {
    let mut text = Vec::new();
    input.read_to_end(&mut text).map_err(Error::host("read config.json from stdin"))?;
    let edited = edit(&text)?;
    output
        .write_all(edited.as_deref().unwrap_or(&text))
        .and_then(|()| output.flush())
        .map_err(Error::host("write config.json to stdout"))
}

/// The edited document, or `None` where nothing changes.
fn edit(text: &[u8]) -> Result<Option<Vec<u8>>> {
    let bad = |reason: String| Error::BadFile { path: "config.json on stdin".into(), reason };
    if text.iter().all(u8::is_ascii_whitespace) {
        return Err(bad("it is empty: an OCI specification is expected".into()));
    }
    let mut spec: Value = serde_json::from_slice(text).map_err(|error| bad(format!("not valid JSON: {error}")))?;
    let annotations = annotations(&spec).map_err(bad)?;
    let (rules, ignored) = rules(annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    for annotation in ignored {
        tracing::warn!("annotation {} ignored: {}", annotation.key, annotation.reason);
    }
    if rules.is_empty() {
        return Ok(None);
    }
    let categories: Vec<_> = rules.iter().map(|rule| rule.category).collect();
    let added = add_devices(&mut spec, &devfs::nodes(&categories)).map_err(bad)?;
    for path in &added.corrected {
        tracing::warn!("{path} had stale numbers, which are corrected");
    }
    tracing::info!("{} devices and {} rules added", added.devices.len(), added.rules);
    if added == Default::default() {
        return Ok(None);
    }
    Ok(Some(serde_json::to_vec(&spec).expect("a JSON value is printable")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(input: &str) -> Result<String> {
        let mut output = Vec::new();
        run(&mut input.as_bytes(), &mut output).map(|()| String::from_utf8(output).unwrap())
    }

    #[test]
    fn without_our_annotations_every_byte_stays() {
        for text in [
            "{ }\n",
            "{\"annotations\":{\"a\":\"b\"},  \"x\":1e3}",
            "{\"annotations\":{\"org.containers.qm.device.audio\":\"no\"}} ",
        ] {
            assert_eq!(hook(text).unwrap(), text);
        }
    }

    #[test]
    fn what_is_no_specification_is_refused_in_one_line() {
        for text in ["", " \n", "{", "[]", "3", "{\"annotations\":[]}"] {
            let message = hook(text).unwrap_err().chain();
            assert!(message.starts_with("config.json on stdin: ") && !message.contains('\n'), "{message}");
        }
    }
}
