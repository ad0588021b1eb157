//! A directory of the host's for one run of a container. In it, `view` is what the container sees as its `/run/udev`,
//! read-only; beside that is written down what is shown there, so that the next process can take it back.
//!
//! ```text
//! /run/qm-hotplug/udev/ID.TAG/holder.json          whose it is, once the container runs
//!                            /shown/c188:0.json    a device that is shown
//!                            /view/control         an empty file: where it is missing, libudev listens to nobody
//!                                 /data/c188:0     udev's database
//!                                 /tags/TAG/c188:0
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, mkdirat, openat, renameat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::core::ledger::Holder;
use crate::core::mirror::{Shown, tags};
use crate::core::page::escaped;
use crate::error::{Error, Result};
use crate::failpoint::reached;
use crate::ops::RUN_DIRECTORY;
use crate::ops::files::{self, Durable, open_directory};
use crate::sys::label;
use crate::sys::mount::{DirectoryId, id_of};
use crate::sys::network::NetworkId;

/// How long a container may take from the hook to its start.
const STARTING: Duration = Duration::from_secs(600);

/// Where the runtimes that engines with hooks call keep their state.
const STATES: [&str; 2] = ["/run/crun", "/run/runc"];

/// How many names are looked at in a view. A container with CAP_SYS_ADMIN can make its view writable and put there what it
/// likes, links too: none is followed.
const MOST: usize = 10_000;

/// How the names of those begin that are being removed. The ids of containers do not.
const GONE: &str = ".gone.";

/// Whose a view is, and what is known of its run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Whose {
    /// The run.
    pub(super) holder: Holder,
    /// Its network namespace; `None` where that is the host's.
    pub(super) network: Option<NetworkId>,
    /// Whether it asks for devices: then it sees the view also while there is nothing in it.
    pub(super) asks: bool,
    /// Whether it wants to be shown or told anything.
    pub(super) wants: bool,
    /// Whether it is not known yet what it sees, since whoever looks has not come to the end.
    pub(super) is_pending: bool,
    /// Whether it has a udevd of its own, which tells those inside.
    pub(super) has_udevd: bool,
    /// Whether it sees the view.
    pub(super) sees_view: bool,
    /// Directories inside that were made for it, outermost first.
    pub(super) made: Vec<String>,
    /// What SELinux calls its files, where it is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) label: Option<String>,
}

/// The directory.
#[derive(Debug)]
pub(crate) struct View {
    directory: PathBuf,
    /// What SELinux calls files of the container, where it is on.
    label: Option<String>,
}

fn all() -> PathBuf {
    Path::new(RUN_DIRECTORY).join("udev")
}

impl View {
    /// Makes one for the container with this id. `tag` tells it from that of another run.
    pub(crate) fn create(id: &str, tag: u64) -> Result<View> {
        let directory = all().join(format!("{}.{tag}", escaped(id)));
        let view = View { directory, label: None };
        let make = || -> io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&view.directory)?;
            fs::DirBuilder::new().recursive(true).mode(0o700).create(view.directory.join("shown"))?;
            let directory = Mode::from_raw_mode(0o755);
            // Whatever the umask is: those inside are other users.
            let make = |name: &str| {
                let path = view.path().join(name);
                match mkdirat(CWD, &path, directory) {
                    Ok(()) | Err(Errno::EXIST) => rustix::fs::chmod(&path, directory),
                    Err(errno) => Err(errno),
                }
            };
            ["", "data", "tags"].into_iter().try_for_each(make)?;
            view.write_in(&open_directory(CWD, &view.path())?, "control", b"", 0o444)
        };
        make().map_err(Error::host(format!("make {}", view.directory.display())))?;
        Ok(view)
    }

    /// Gives it the label of the container's files.
    pub(crate) fn set_label(&mut self, label: &str) -> io::Result<()> {
        let view = open_directory(CWD, &self.path())?;
        label::set(&view, label)?;
        for name in ["data", "tags"] {
            label::set(&open_directory(&view, Path::new(name))?, label)?;
        }
        self.label = Some(label.to_owned());
        self.write_in(&view, "control", b"", 0o444)
    }

    /// Writes a file under another name first: who reads it has it whole.
    fn write_in(&self, directory: &OwnedFd, name: &str, text: &[u8], mode: u32) -> io::Result<()> {
        let temporary = format!(".#{name}");
        forget(directory, &temporary)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        let file = openat(directory, &*temporary, flags, mode)?;
        rustix::fs::fchmod(&file, mode)?;
        if let Some(label) = &self.label {
            label::set(&file, label)?;
        }
        fs::File::from(file).write_all(text)?;
        Ok(renameat(directory, &*temporary, directory, name)?)
    }

    /// All of the container with this id that are nobody's yet: the hook made them, or whoever did was interrupted.
    pub(super) fn unclaimed(id: &str) -> Vec<View> {
        let start = format!("{}.", escaped(id));
        let is_its = |view: &View| {
            let name = view.directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix(&start).is_some_and(|tag| tag.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let is_free = |view: &View| view.whose().is_none_or(|whose| whose.is_pending);
        listed().into_iter().filter(is_its).filter(is_free).collect()
    }

    /// All that are somebody's.
    pub(super) fn claimed() -> Vec<(View, Whose)> {
        let claimed = |view: View| {
            let whose = view.whose().filter(|_| !view.is_gone())?;
            Some((View { label: whose.label.clone(), ..view }, whose))
        };
        listed().into_iter().filter_map(claimed).collect()
    }

    /// Removes those that the hook made for containers that did not start, or that ended while no agent ran.
    pub(crate) fn sweep() {
        let is_old = |view: &View| {
            let made = fs::metadata(&view.directory).and_then(|stat| stat.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            SystemTime::now().duration_since(made).is_ok_and(|age| age > STARTING)
        };
        let has_state = |view: &View| {
            let id = view.directory.file_stem().unwrap_or_default();
            STATES.iter().any(|states| Path::new(states).join(id).exists())
        };
        let is_free = |view: &View| !view.directory.join("holder.json").exists();
        let is_nobodys = |view: &View| is_free(view) && is_old(view) && !has_state(view);
        let all = listed().into_iter();
        all.filter(|view| view.is_gone() || is_nobodys(view)).for_each(View::remove);
    }

    fn whose(&self) -> Option<Whose> {
        serde_json::from_slice(&files::read(&self.directory.join("holder.json")).ok()?).ok()
    }

    /// Writes down whose it is.
    pub(super) fn claim(&self, whose: &Whose) -> Result<()> {
        let path = self.directory.join("holder.json");
        let text = serde_json::to_vec(whose).expect("it is valid JSON");
        files::replace(&path, &text, Durable::No, || {}).map_err(Error::host(format!("write {}", path.display())))?;
        reached("mirror: a view is claimed");
        Ok(())
    }

    /// The directory that the container sees.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("view")
    }

    /// What tells that directory from others.
    pub(super) fn id(&self) -> io::Result<DirectoryId> {
        id_of(&self.path())
    }

    /// The names of the entries that it has, as many as the hook may have made. A container may have added others.
    pub(super) fn entries(&self) -> Vec<String> {
        const MOST_AT_START: usize = 512;
        let entries = fs::read_dir(self.path().join("data")).into_iter().flatten().flatten();
        entries.take(MOST_AT_START).filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// What is shown, by the names of the entries.
    pub(super) fn shown(&self) -> BTreeMap<String, Shown> {
        let read = |path: PathBuf| {
            let shown = serde_json::from_slice(&files::read(&path).ok()?).ok()?;
            Some((path.file_stem()?.to_str()?.to_owned(), shown))
        };
        files::with_extension(&self.directory.join("shown"), "json").into_iter().filter_map(read).collect()
    }

    /// Writes down that a device is shown, before it is.
    pub(super) fn note(&self, name: &str, shown: &Shown) -> io::Result<()> {
        let path = self.directory.join("shown").join(format!("{name}.json"));
        files::replace(&path, &serde_json::to_vec(shown)?, Durable::No, || {})?;
        reached("mirror: a device is noted");
        Ok(())
    }

    /// Makes the database's entry what it is on the host.
    pub(crate) fn write(&self, name: &str, record: Option<&str>) -> io::Result<()> {
        let view = open_directory(CWD, &self.path())?;
        let kept: Vec<&str> = record.map(|record| tags(record).collect()).unwrap_or_default();
        let all = open_directory(&view, Path::new("tags"))?;
        untag(&all, name, &kept)?;
        let data = open_directory(&view, Path::new("data"))?;
        let Some(record) = record else { return forget(&data, name) };
        self.write_in(&data, name, record.as_bytes(), 0o644)?;
        reached("mirror: an entry is written");
        for tag in kept {
            let mode = Mode::from_raw_mode(0o755);
            let is_new = match mkdirat(&all, tag, mode) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(errno.into()),
            };
            let directory = open_directory(&all, Path::new(tag))?;
            if is_new {
                rustix::fs::fchmod(&directory, mode)?;
                self.label.iter().try_for_each(|label| label::set(&directory, label))?;
            }
            self.write_in(&directory, name, b"", 0o444)?;
        }
        Ok(())
    }

    /// Removes the database's entry.
    pub(super) fn strike(&self, name: &str) -> io::Result<()> {
        let view = open_directory(CWD, &self.path())?;
        untag(&open_directory(&view, Path::new("tags"))?, name, &[])?;
        forget(&open_directory(&view, Path::new("data"))?, name)?;
        reached("mirror: an entry is removed");
        Ok(())
    }

    /// Strikes out that a device is shown.
    pub(super) fn forget(&self, name: &str) -> io::Result<()> {
        files::remove(&self.directory.join("shown").join(format!("{name}.json")))
    }

    /// Removes the directory of all, when none is left.
    pub(super) fn leave_nothing() {
        let _ = fs::remove_dir(all());
    }

    /// Removes it, with all that it shows. What is too much for once goes with [`View::sweep`].
    pub(crate) fn remove(self) {
        let name = self.directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let aside = self.directory.with_file_name(format!("{GONE}{name}"));
        let directory =
            if !self.is_gone() && fs::rename(&self.directory, &aside).is_ok() { aside } else { self.directory };
        if let Err(error) = files::remove_tree(&directory, MOST)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {} at once: {error}", directory.display());
        }
    }

    fn is_gone(&self) -> bool {
        self.directory.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(GONE.as_bytes()))
    }
}

fn listed() -> Vec<View> {
    let entries = fs::read_dir(all()).into_iter().flatten().flatten();
    entries.map(|entry| View { directory: entry.path(), label: None }).collect()
}

fn forget(directory: &OwnedFd, name: &str) -> io::Result<()> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes a device out of all tags but these.
fn untag(all: &OwnedFd, name: &str, kept: &[&str]) -> io::Result<()> {
    for entry in Dir::read_from(all)?.take(MOST) {
        let entry = entry?;
        let Ok(tag) = entry.file_name().to_str() else { continue };
        if tag.starts_with('.') || kept.contains(&tag) {
            continue;
        }
        if let Ok(directory) = open_directory(all, Path::new(tag)) {
            forget(&directory, name)?;
            // Only an empty one goes.
            let _ = unlinkat(all, tag, AtFlags::REMOVEDIR);
        }
    }
    Ok(())
}
