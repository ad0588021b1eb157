//! The host's configuration: `/etc/qm-hotplug/config.d/*.toml` over `/usr/lib/qm-hotplug/config.d/*.toml`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::core::settings::{File, Settings};

/// A file in the second one takes the place of one with the same name in the first.
const DIRECTORIES: [&str; 2] = ["/usr/lib/qm-hotplug/config.d", "/etc/qm-hotplug/config.d"];

/// The settings of this host, and what is wrong with files that could not be taken: these are passed over, the others
/// count, and a container still starts.
pub fn settings() -> (Settings, Vec<String>) {
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
        (path.display().to_string(), text)
    };
    Settings::read(&files(&DIRECTORIES.map(Path::new)).into_iter().map(read).collect::<Vec<File>>())
}

/// The settings of this host; a warning names each file that is passed over.
pub fn settings_or_warn() -> Settings {
    let (settings, problems) = settings();
    for problem in problems {
        tracing::warn!("passed over: {problem}");
    }
    settings
}

/// The files to read, by name.
fn files(directories: &[&Path]) -> Vec<PathBuf> {
    let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for entry in directories.iter().filter_map(|directory| std::fs::read_dir(directory).ok()).flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.insert(entry.file_name(), path);
        }
    }
    files.into_values().collect()
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
        assert_eq!(found, expected.map(|(directory, name)| directory.path().join(name)));
    }
}
