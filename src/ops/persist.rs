//! What was attached for good, on disk: `/var/lib/qm-hotplug/attached/RUNTIME-OWNER-NAME.json`. A file that cannot be read
//! is a person's word: it is passed over with a warning, left where it is and never written over.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::core::attachment::{Attached, Attachment, Lasting, file_name};
use crate::core::container::{Container, Reference};
use crate::core::ledger::{Entry, Origin};
use crate::error::{Error, Result};
use crate::failpoint::reached;
use crate::ops::files::{self, Durable};

/// What outlives a restart of the machine.
pub const STATE_DIRECTORY: &str = "/var/lib/qm-hotplug";

/// All files.
#[derive(Debug)]
pub struct Persisted {
    directory: PathBuf,
    all: Vec<Attached>,
}

impl Persisted {
    /// Reads all files, for a look.
    pub fn look() -> Persisted {
        let directory = Path::new(STATE_DIRECTORY).join("attached");
        let mut all = Vec::new();
        for path in files::with_extension(&directory, "json") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match files::read(&path).and_then(|text| Attached::parse(&name, &text)) {
                Ok(attached) => all.push(attached),
                Err(reason) => {
                    tracing::warn!("what was attached for good is passed over: {}: {reason}", path.display())
                }
            }
        }
        Persisted { directory, all }
    }

    /// The same for the one who holds the ledger's lock: what writes that were interrupted have left is removed.
    pub(super) fn take_over() -> Persisted {
        let found = Persisted::look();
        files::with_extension(&found.directory, files::TEMPORARY).iter().for_each(|path| drop(fs::remove_file(path)));
        found
    }

    /// What they say.
    pub fn all(&self) -> &[Attached] {
        &self.all
    }

    /// Those of the container that is meant. Where it does not run, the name has to do, with its engine before it where
    /// several have it.
    pub fn named(&self, reference: &Reference, container: Option<&Container>) -> Option<&Attached> {
        let is_meant = |attached: &&Attached| match (container, reference) {
            (Some(container), _) => attached.is_for(container),
            (None, Reference::Name { engine, name }) => {
                let (its, kept) = (attached.container.runtime.engine(), &attached.container.name);
                let is_it = kept == name || kept.strip_prefix(its).and_then(|it| it.strip_prefix(':')) == Some(name);
                is_it && engine.is_none_or(|engine| engine == its)
            }
            (None, Reference::Pid(_)) => false,
        };
        let mut meant = self.all.iter().filter(is_meant);
        meant.next().filter(|_| meant.next().is_none())
    }

    /// Whether a grant that was made for good still is one.
    pub fn has(&self, entry: &Entry) -> bool {
        let is_of = |attached: &&Attached| attached.may_be_of(&entry.grant.holder);
        let mut paths = self.all.iter().filter(is_of).flat_map(|it| &it.devices).map(|device| &device.node.path);
        entry.grant.origin == Origin::Persist && paths.any(|path| *path == entry.grant.node.path)
    }

    /// Writes a device down, in the place of another one with its path. Returns what was there.
    pub fn add(&mut self, container: Lasting, device: Attachment) -> Result<Option<Attached>> {
        let at = self.all.iter().position(|attached| attached.container == container);
        let before = at.map(|at| self.all[at].clone());
        let mut after = before.clone().unwrap_or_else(|| Attached::new(container));
        after.devices.retain(|other| other.node.path != device.node.path);
        after.devices.push(device);
        let path = self.directory.join(file_name(&after.container));
        if before.is_none() && path.exists() {
            let reason = "it cannot be read, and is not written over: move it away".to_owned();
            return Err(Error::BadFile { path, reason });
        }
        self.put(after)?;
        Ok(before)
    }

    /// Strikes a container's device with that path.
    pub fn strike(&mut self, container: &Lasting, path: &str) -> Result<()> {
        let Some(attached) = self.all.iter().find(|attached| attached.container == *container) else { return Ok(()) };
        let mut after = attached.clone();
        after.devices.retain(|device| device.node.path != path);
        self.put(after)
    }

    /// Writes a container's file; one without devices is removed.
    pub fn put(&mut self, attached: Attached) -> Result<()> {
        let path = self.directory.join(file_name(&attached.container));
        let result = if attached.devices.is_empty() {
            let removed = files::remove(&path).inspect(|()| reached("persist: the file is removed"));
            removed.and_then(|()| files::sync_directory(&path, Durable::Yes))
        } else {
            self.make_directory()?;
            let text = serde_json::to_vec_pretty(&attached).expect("it is valid JSON");
            files::replace(&path, &text, Durable::Yes, || reached("persist: before the file is renamed"))
                .inspect(|()| reached("persist: the file is written"))
        };
        result.map_err(Error::host(format!("write {}", path.display())))?;
        self.all.retain(|other| other.container != attached.container);
        if !attached.devices.is_empty() {
            self.all.push(attached);
        }
        Ok(())
    }

    fn make_directory(&self) -> Result<()> {
        for directory in [Path::new(STATE_DIRECTORY), &self.directory] {
            if !directory.exists() {
                let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
                let made = made.and_then(|()| files::sync_directory(directory, Durable::Yes));
                made.map_err(Error::host(format!("make {}", directory.display())))?;
            }
        }
        Ok(())
    }
}
