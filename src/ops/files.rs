//! Files of ours: replaced whole, and read with bounds.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat};
use rustix::io::Errno;

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

/// Opens a directory; a link is none.
pub(super) fn open_directory(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, path, flags, Mode::empty())?)
}

/// Removes a directory with all that is in it, `most` files at most: where there are more, it fails, and goes on when it is
/// called again. What is in the directory may be a container's making, and still be changed by it: however deep it is, it
/// takes no more stack and no more descriptors.
pub(super) fn remove_tree(path: &Path, most: usize) -> io::Result<()> {
    let top = open_directory(CWD, path)?;
    let (mut left, mut turn) = (most, 0_usize);
    let mut inner: Vec<String> = vec![".".into()];
    while let Some(name) = inner.pop() {
        let directory = open_directory(&top, Path::new(&name))?;
        // All names before anything is changed: whether readdir(3) gives those that come meanwhile is not said.
        let names = Dir::read_from(&directory)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
        let is_below =
            |name: &rustix::io::Result<CString>| !matches!(name.as_deref().map(CStr::to_bytes), Ok(b"." | b".."));
        let names: Vec<CString> = names.filter(is_below).take(left + 1).collect::<rustix::io::Result<_>>()?;
        for below in &names {
            left = left.checked_sub(1).ok_or_else(|| io::Error::other("there is too much in it"))?;
            match unlinkat(&directory, below, AtFlags::empty()) {
                // Directories are brought up to the top, and emptied there.
                Err(Errno::ISDIR) => loop {
                    turn += 1;
                    let aside = format!(".{turn}");
                    match renameat_with(&directory, below, &top, &*aside, RenameFlags::NOREPLACE) {
                        Err(Errno::EXIST) if turn < 2 * most => continue,
                        result => result?,
                    }
                    inner.push(aside);
                    break;
                },
                result => result?,
            }
        }
        if name != "." {
            unlinkat(&top, &*name, AtFlags::REMOVEDIR)?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mkdirat;

    #[test]
    fn a_tree_of_any_depth_goes_and_what_it_links_to_stays() {
        let place = tempfile::tempdir().unwrap();
        let (tree, other) = (place.path().join("tree"), place.path().join("other"));
        [&tree, &other].iter().for_each(|path| fs::create_dir(path).unwrap());
        fs::write(other.join("file"), "precious").unwrap();
        let mut at = open_directory(CWD, &tree).unwrap();
        for _ in 0..30_000 {
            mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open_directory(&at, Path::new("d")).unwrap();
        }
        for name in ["a", "b"] {
            std::os::unix::fs::symlink(&other, tree.join(name)).unwrap();
            fs::create_dir(tree.join(name.to_uppercase())).unwrap();
            fs::write(tree.join(name.to_uppercase()).join("file"), "").unwrap();
        }
        // With a bound, it comes to an end all the same.
        let mut rounds = 0;
        while tree.exists() {
            rounds += 1;
            assert_eq!(remove_tree(&tree, 10_000).is_ok(), !tree.exists());
        }
        assert_eq!(rounds, 4);
        assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "precious");
    }
}
