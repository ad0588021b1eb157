//! A hook's definition, as Podman and CRI-O read it in their hooks directories (oci-hooks(5)), and which those are.

use serde_json::Value;

/// Where Podman and CRI-O look for hooks if nobody tells them; a file in the second one takes the place of one with the
/// same name in the first (oci-hooks(5)).
pub const DIRECTORIES: [&str; 2] = ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"];

/// What a definition says, as far as it matters to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Path of the program.
    pub program: String,
    /// When it is called: `precreate`, `createRuntime`, `poststop` and others.
    pub stages: Vec<String>,
}

/// Reads a definition, of version 1.0.0 or of 0.1.0, which has the program as a plain string. Errors are in words.
pub fn parse(text: &str) -> Result<Definition, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("not valid JSON: {error}"))?;
    let hook = value.get("hook").ok_or("it has no 'hook'")?;
    let program = hook.as_str().or_else(|| hook.get("path")?.as_str()).ok_or("its 'hook' has no 'path'")?;
    let stages = value.get("stages").or_else(|| value.get("stage")).and_then(Value::as_array);
    let stages = stages.ok_or("it has no 'stages'")?.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    Ok(Definition { program: program.to_owned(), stages })
}

/// Where Podman looks for hooks with these files of containers.conf(5), of which a later one counts before others. A file
/// that is no TOML is passed over.
pub fn directories(files: &[String]) -> Vec<String> {
    let mut directories = DIRECTORIES.map(str::to_owned).to_vec();
    for table in files.iter().filter_map(|text| text.parse::<toml::Table>().ok()) {
        let set = table.get("engine").and_then(|engine| engine.get("hooks_dir")).and_then(toml::Value::as_array);
        let Some(items) = set.filter(|items| !items.is_empty()) else { continue };
        if !items.iter().any(|item| item.get("append").and_then(toml::Value::as_bool) == Some(true)) {
            directories.clear();
        }
        directories.extend(items.iter().filter_map(toml::Value::as_str).map(str::to_owned));
    }
    directories
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn podman_may_be_told_to_look_elsewhere() {
        let of = |files: &[&str]| directories(&files.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        let here = "[engine]\nhooks_dir = ['/opt/hooks.d']\n";
        assert_eq!(of(&["", "[engine]\nhooks_dir = []\n", "no toml"]), DIRECTORIES);
        assert_eq!(of(&["[engine]\nhooks_dir = ['/x', '/y']\n", here]), ["/opt/hooks.d"]);
        let more = "[engine]\nhooks_dir = ['/more', {append = true}]\n";
        assert_eq!(of(&[here, more]), ["/opt/hooks.d", "/more"]);
        assert_eq!(of(&[more]), [DIRECTORIES[0], DIRECTORIES[1], "/more"]);
    }

    #[test]
    fn both_versions_are_read() {
        let ours = include_str!("../../hooks/qm-hotplug.json");
        let expected = |program: &str, stage: &str| Definition { program: program.into(), stages: vec![stage.into()] };
        assert_eq!(parse(ours), Ok(expected("/usr/bin/qm-hotplug", "precreate")));
        let old = r#"{"hook": "/usr/libexec/oci-umount", "stage": ["prestart"], "cmd": [".*"]}"#;
        assert_eq!(parse(old), Ok(expected("/usr/libexec/oci-umount", "prestart")));
    }

    #[test]
    fn what_is_no_definition_is_told_in_words() {
        for (text, reason) in [
            ("{", "not valid JSON: "),
            ("[]", "it has no 'hook'"),
            (r#"{"hook": {"args": []}, "stages": []}"#, "its 'hook' has no 'path'"),
            (r#"{"hook": {"path": "/x"}, "stages": "precreate"}"#, "it has no 'stages'"),
        ] {
            assert!(parse(text).unwrap_err().starts_with(reason), "{text}");
        }
    }
}
