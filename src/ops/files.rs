//! Files of ours: replaced whole, and read with bounds.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Extension of a file that is being written.
pub(super) const TEMPORARY: &str = "tmp";
/// The longest file that is read, in bytes: a container's page has some hundred bytes a grant, and no host has that many
/// devices.
const LONGEST: u64 = 256 << 20;

/// Whether a file is to outlive the machine's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durable {
    Yes,
    No,
}

/// Writes a file under a temporary name and renames it: it is there whole, or as it was before.
pub(super) fn replace(path: &Path, text: &[u8], durable: Durable, before_rename: impl FnOnce()) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".");
    temporary.push(TEMPORARY);
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(text)?;
    if durable == Durable::Yes {
        file.sync_all()?;
    }
    before_rename();
    fs::rename(&temporary, path)?;
    sync_directory(path, durable)
}

/// Removes a file; one that is not there is removed already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// What a directory says of its files is on disk only once the directory is (fsync(2)).
pub(super) fn sync_directory(path: &Path, durable: Durable) -> io::Result<()> {
    match (durable, path.parent()) {
        (Durable::Yes, Some(directory)) => File::open(directory)?.sync_all(),
        _ => Ok(()),
    }
}

/// The text of a regular file. Errors are in words.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let kind = fs::symlink_metadata(path).map_err(|error| error.to_string())?.file_type();
    if !kind.is_file() {
        return Err("it is no regular file".into());
    }
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST + 1).read_to_end(&mut text))
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > LONGEST {
        return Err(format!("it is longer than {} MiB", LONGEST >> 20));
    }
    Ok(text)
}

/// The files of a directory whose names end so, sorted by name; none where it cannot be read.
pub(super) fn with_extension(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = all.filter(|path| path.extension().is_some_and(|its| its == extension)).collect();
    found.sort();
    found
}
