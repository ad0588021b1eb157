//! The ledger on disk: `ledger/ID.json`, one file a container, so that a change writes what it concerns and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::core::ledger::{Entry, Grant, Holder, Origin, Page, Placement, VERSION, Withdrawal};
use crate::core::page;
use crate::error::{Error, Result};
use crate::failpoint::reached;
use crate::ops::files::{self, Durable};

/// The ledger, locked for this process.
pub struct Store {
    directory: PathBuf,
    /// By the containers' ids.
    pages: BTreeMap<String, Vec<Line>>,
    /// The ids of those with entries, by their cgroups.
    cgroups: BTreeMap<u64, BTreeSet<String>>,
    withdrawn: Vec<Withdrawal>,
    lost: Vec<String>,
    _lock: File,
}

/// An entry, and how it is written: of a long page only what changed is put into words again.
struct Line {
    entry: Entry,
    text: Box<RawValue>,
}

impl Line {
    fn new(entry: Entry) -> Line {
        let text = serde_json::value::to_raw_value(&entry).expect("an entry is valid JSON");
        Line { entry, text }
    }
}

/// A [`Page`] that is being written.
#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    entries: Vec<&'a RawValue>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    withdrawn: Vec<&'a Withdrawal>,
}

/// Extension of a page that cannot be read, until what it told of is found out, and from then on.
const LOST: &str = "lost";
const BAD: &str = "bad";
/// How many of them are kept.
const KEPT: usize = 8;

impl Store {
    /// Makes the directory if need be, takes the lock and reads all pages; `None` while another process has the lock. A
    /// page that cannot be read is set aside with a warning.
    pub fn open(run: &Path) -> Result<Option<Store>> {
        let directory = run.join("ledger");
        let at = |what: &str, path: &Path| Error::host(format!("{what} {}", path.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(at("make", &directory))?;
        let path = run.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(at("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(Error::host(format!("lock {}", path.display()))(errno)),
        }
        let (pages, cgroups, withdrawn) = Default::default();
        let mut store = Store { directory, pages, cgroups, withdrawn, lost: Vec::new(), _lock: lock };
        for page in take_over(&store.directory)? {
            page.entries.into_iter().for_each(|entry| store.insert(entry));
            store.withdrawn.extend(page.withdrawn);
        }
        let lost = files::with_extension(&store.directory, LOST);
        store.lost = lost.iter().filter_map(|path| page::id_of(path.file_name()?.to_str()?)).collect();
        Ok(Some(store))
    }

    /// Reads the ledger without the lock, for a look. Of pages that cannot be read, `passed_over` is told the path and why.
    pub fn peek(run: &Path, passed_over: impl Fn(&Path, &str)) -> Result<Vec<Entry>> {
        // Only who holds the lock may set a page aside: to an older program a newer one's pages are unreadable.
        let pages = read_pages(&run.join("ledger"), passed_over);
        Ok(pages?.into_iter().flat_map(|page| page.entries).collect())
    }

    /// All entries, those of a container one after the other.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> + Clone {
        self.pages.values().flatten().map(|line| &line.entry)
    }

    /// How many entries there are.
    pub fn count(&self) -> usize {
        self.pages.values().map(Vec::len).sum()
    }

    /// The entries of the container with this id.
    pub fn of(&self, id: &str) -> impl Iterator<Item = &Entry> {
        self.pages.get(id).into_iter().flatten().map(|line| &line.entry)
    }

    /// The entries of all that share the holder's rights.
    pub fn sharing<'a>(&'a self, holder: &'a Holder) -> impl Iterator<Item = &'a Entry> + Clone {
        let own = (!holder.has_filter()).then_some(&holder.id);
        let ids = self.cgroups.get(&holder.cgroup_id).into_iter().flatten().chain(own);
        let lines = ids.filter_map(|id| self.pages.get(id)).flatten();
        lines.map(|line| &line.entry).filter(|entry| entry.grant.holder.cgroup_id == holder.cgroup_id)
    }

    fn insert(&mut self, entry: Entry) {
        let holder = &entry.grant.holder;
        if holder.has_filter() {
            self.cgroups.entry(holder.cgroup_id).or_default().insert(holder.id.clone());
        }
        self.pages.entry(holder.id.clone()).or_default().push(Line::new(entry));
    }

    /// Changes an entry, if it is there.
    fn change(&mut self, grant: &Grant, change: impl FnOnce(&mut Entry)) {
        let mut lines = self.pages.get_mut(&grant.holder.id).into_iter().flatten();
        if let Some(line) = lines.find(|line| line.entry.grant.is_same(grant)) {
            change(&mut line.entry);
            *line = Line::new(line.entry.clone());
        }
    }

    /// Takes out the entries of a container that do not pass the test.
    fn retain(&mut self, id: &str, test: impl Fn(&Entry) -> bool) {
        let Some(lines) = self.pages.get_mut(id) else { return };
        lines.retain(|line| test(&line.entry));
        if lines.is_empty() {
            self.pages.remove(id);
            self.cgroups.retain(|_, ids| {
                ids.remove(id);
                !ids.is_empty()
            });
        }
    }

    /// All withdrawals.
    pub fn withdrawn(&self) -> &[Withdrawal] {
        &self.withdrawn
    }

    /// Adds a withdrawal.
    pub fn withdraw(&mut self, withdrawal: &Withdrawal) -> Result<()> {
        self.withdrawn.push(withdrawal.clone());
        self.write(&withdrawal.holder.id).inspect_err(|_| drop(self.withdrawn.pop()))
    }

    /// Strikes a withdrawal.
    pub fn restore(&mut self, withdrawal: &Withdrawal) -> Result<()> {
        self.withdrawn.retain(|other| !other.is_same(withdrawal));
        self.write(&withdrawal.holder.id)
    }

    /// Adds an entry. It takes the place of one that is left over of the same grant.
    pub fn record(&mut self, entry: Entry) -> Result<()> {
        let grant = entry.grant.clone();
        let id = &grant.holder.id;
        self.retain(id, |other| other.left_over.is_none() || !other.grant.is_same(&grant));
        self.insert(entry);
        let written = self.write(id);
        if written.is_err() {
            self.pages.get_mut(id).and_then(Vec::pop);
            self.retain(id, |_| true);
        }
        written
    }

    /// Says whose node a recorded grant has.
    pub fn settle(&mut self, grant: &Grant, placement: Placement) -> Result<()> {
        self.change(grant, |entry| entry.placement = placement);
        self.write(&grant.holder.id)
    }

    /// Says why a grant in force is there from now on.
    pub fn set_origin(&mut self, grant: &Grant, origin: Origin) -> Result<()> {
        self.change(grant, |entry| entry.grant.origin = origin);
        self.write(&grant.holder.id)
    }

    /// Gives the directories that were made for a grant to other grants of the same container that have a node of ours in
    /// them.
    pub fn hand_on(&mut self, grant: &Grant, directories: &[String]) -> Result<()> {
        let is_below = |path: &str, directory: &str| path.strip_prefix(directory).is_some_and(|it| it.starts_with('/'));
        let mut has_changed = false;
        for directory in directories {
            let is_in = |its: &Grant| its.holder.is_same_run(&grant.holder) && is_below(&its.node.path, directory);
            let is_other = |entry: &&Entry| is_in(&entry.grant) && !entry.grant.is_same(grant);
            let directories_of = |entry: &Entry| match &entry.placement {
                Placement::Ours(directories) => Some((entry.grant.clone(), directories.clone())),
                _ => None,
            };
            let other = self.of(&grant.holder.id).filter(is_other).find_map(directories_of);
            if let Some((other, mut its)) = other.filter(|(_, its)| !its.contains(directory)) {
                // Outermost first.
                its.push(directory.clone());
                its.sort_by_key(String::len);
                self.change(&other, |entry| entry.placement = Placement::Ours(its));
                has_changed = true;
            }
        }
        if has_changed { self.write(&grant.holder.id) } else { Ok(()) }
    }

    /// Notes that a grant is about to be taken back.
    pub fn leave(&mut self, grant: &Grant) -> Result<()> {
        self.change(grant, |entry| *entry = entry.leaving());
        self.write(&grant.holder.id)
    }

    /// Strikes an entry.
    pub fn forget(&mut self, grant: &Grant) -> Result<()> {
        self.retain(&grant.holder.id, |entry| !entry.grant.is_same(grant));
        self.write(&grant.holder.id)
    }

    /// Notes that something of a grant could not be taken back.
    pub fn mark_left_over(&mut self, grant: &Grant, reason: &str) {
        self.change(grant, |entry| entry.left_over = Some(reason.to_owned()));
        if let Err(error) = self.write(&grant.holder.id) {
            tracing::error!(container = grant.holder.label(), "{}", error.chain());
        }
    }

    /// Writes a container's page; an empty one is removed.
    fn write(&self, id: &str) -> Result<()> {
        let path = self.directory.join(page::file_name(id));
        let entries: Vec<&RawValue> = self.pages.get(id).into_iter().flatten().map(|line| &*line.text).collect();
        let withdrawn: Vec<_> = self.withdrawn.iter().filter(|other| other.holder.id == id).collect();
        reached("ledger: before a page is written");
        let result = if entries.is_empty() && withdrawn.is_empty() {
            files::remove(&path).inspect(|()| reached("ledger: a page is removed"))
        } else {
            let page = Written { version: VERSION, entries, withdrawn };
            let text = serde_json::to_vec(&page).expect("a page is valid JSON");
            // On a tmpfs nothing outlives the machine: it need not wait for a disk.
            files::replace(&path, &text, Durable::No, || reached("ledger: before a page is renamed"))
                .inspect(|()| reached("ledger: a page is written"))
        };
        result.map_err(Error::host(format!("write the ledger {}", path.display())))
    }

    /// The ids of containers whose pages were lost, as far as they are known: what is in force of them has to be found out
    /// anew.
    pub fn lost(&self) -> &[String] {
        &self.lost
    }

    /// What was lost has been found out: the pages are kept for a person to look at, the newest ones of them.
    pub fn found(&mut self) {
        self.lost.clear();
        for path in files::with_extension(&self.directory, LOST) {
            let _ = fs::rename(&path, path.with_extension(BAD));
        }
        let written = |path: &PathBuf| path.metadata().and_then(|found| found.modified()).ok();
        let mut bad = files::with_extension(&self.directory, BAD);
        bad.sort_by_key(|path| std::cmp::Reverse(written(path)));
        bad.iter().skip(KEPT).for_each(|path| drop(fs::remove_file(path)));
    }
}

/// Reads all pages of a directory that this process has locked. A page that cannot be read is set aside, and what writes
/// that were interrupted have left is removed.
fn take_over(directory: &Path) -> Result<Vec<Page>> {
    files::with_extension(directory, files::TEMPORARY).iter().for_each(|path| drop(fs::remove_file(path)));
    read_pages(directory, |path, reason| {
        let aside = path.with_extension(LOST);
        let kept = path.with_extension(BAD);
        tracing::warn!("the ledger {} is set aside as {}: {reason}", path.display(), kept.display());
        if let Err(error) = fs::rename(path, &aside) {
            tracing::error!("cannot set the ledger {} aside: {error}", path.display());
        }
    })
}

fn read_pages(directory: &Path, bad: impl Fn(&Path, &str)) -> Result<Vec<Page>> {
    let at = || Error::host::<io::Error>(format!("read the ledger {}", directory.display()));
    match fs::read_dir(directory) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at()(error)),
    }
    let mut pages = Vec::new();
    for path in files::with_extension(directory, "json") {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match files::read(&path).and_then(|text| page::parse(&name, &text)) {
            Ok(page) => pages.push(page),
            Err(reason) => bad(&path, &reason),
        }
    }
    Ok(pages)
}

/// Says that a page is passed over.
pub fn warn(page: &Path, reason: &str) {
    tracing::warn!("the ledger {} is passed over: {reason}", page.display());
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
