//! The host's configuration: `/etc/qm-hotplug/config.d/*.toml` over `/usr/lib/qm-hotplug/config.d/*.toml`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::core::settings::{File, Settings};

/// A file in the second one takes the place of one with the same name in the first.
const DIRECTORIES: [&str; 2] = ["/usr/lib/qm-hotplug/config.d", "/etc/qm-hotplug/config.d"];

/// The settings of this host, and what is wrong with files that could not be taken: these are passed over, the others
/// count, and a container still starts.
pub fn settings() -> (Settings, Vec<String>) {
    Settings::read(&files(&DIRECTORIES.map(Path::new)))
}

/// The settings of this host; a warning names each file that is passed over.
pub fn settings_or_warn() -> Settings {
    let (settings, problems) = settings();
    for problem in problems {
        tracing::warn!("passed over: {problem}");
    }
    settings
}

/// The files by name, with their text. A directory that is there and cannot be read counts as a file that cannot: who
/// knows what it holds.
fn files(directories: &[&Path]) -> Vec<File> {
    let (mut paths, mut files): (BTreeMap<OsString, PathBuf>, Vec<File>) = Default::default();
    for directory in directories {
        let entries = std::fs::read_dir(directory).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
        match entries {
            Ok(entries) => paths.extend(entries.into_iter().map(|entry| (entry.file_name(), entry.path()))),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => files.push((directory.display().to_string(), Err(error.to_string()))),
        }
    }
    let is_toml = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "toml");
    files.extend(paths.into_values().filter(is_toml).map(|path| {
        let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
        (path.display().to_string(), text)
    }));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_administrator_take_the_place_of_those_of_packages() {
        let (packages, administrator) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (directory, name) in [(&packages, "10-a.toml"), (&packages, "20-b.toml"), (&packages, "notes.txt")] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        for name in ["10-a.toml", "15-c.toml"] {
            std::fs::write(administrator.path().join(name), "").unwrap();
        }
        let found = files(&[packages.path(), Path::new("/nonexistent"), administrator.path()]);
        let expected = [(&administrator, "10-a.toml"), (&administrator, "15-c.toml"), (&packages, "20-b.toml")];
        let path = |(directory, name): (&tempfile::TempDir, &str)| directory.path().join(name).display().to_string();
        assert_eq!(found, expected.map(|file| (path(file), Ok(String::new()))));
    }

    #[test]
    fn a_directory_that_cannot_be_read_may_hold_a_policy() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("config.d");
        std::fs::write(&file, "").unwrap();
        let (settings, problems) = Settings::read(&files(&[&file]));
        assert_eq!(problems, [format!("{}: Not a directory (os error 20)", file.display())]);
        assert_eq!(settings.policies.unreadable.as_ref(), problems.first());
    }
}
