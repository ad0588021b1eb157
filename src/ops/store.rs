//! The ledger on disk: `ledger/ID.json`, one file a container, so that a change writes what it concerns and no more.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::core::ledger::{Entry, Grant, Page, Placement, VERSION, Withdrawal};
use crate::error::{Error, Result};

/// The ledger, locked for this process.
pub struct Store {
    directory: PathBuf,
    entries: Vec<Entry>,
    withdrawn: Vec<Withdrawal>,
    _lock: File,
}

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
        let (mut entries, mut withdrawn) = (Vec::new(), Vec::new());
        for page in read_pages(&directory, true)? {
            entries.extend(page.entries);
            withdrawn.extend(page.withdrawn);
        }
        Ok(Some(Store { directory, entries, withdrawn, _lock: lock }))
    }

    /// Reads the ledger without the lock, for a look.
    pub fn peek(run: &Path) -> Result<Vec<Entry>> {
        Ok(read_pages(&run.join("ledger"), false)?.into_iter().flat_map(|page| page.entries).collect())
    }

    /// All entries.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
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
        let id = entry.grant.holder.id.clone();
        self.entries.retain(|other| other.left_over.is_none() || !other.grant.is_same(&entry.grant));
        self.entries.push(entry);
        self.write(&id).inspect_err(|_| drop(self.entries.pop()))
    }

    /// Says whose node a recorded grant has.
    pub fn settle(&mut self, grant: &Grant, placement: Placement) -> Result<()> {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.grant.is_same(grant)) {
            entry.placement = placement;
        }
        self.write(&grant.holder.id)
    }

    /// Gives the directories that were made for a grant to other grants of the same container that have a node of ours in
    /// them.
    pub fn hand_on(&mut self, grant: &Grant, directories: &[String]) -> Result<()> {
        let is_below = |path: &str, directory: &str| path.strip_prefix(directory).is_some_and(|it| it.starts_with('/'));
        let mut has_changed = false;
        for directory in directories {
            let other = self.entries.iter_mut().find_map(|entry| {
                let its = &entry.grant;
                let is_in = its.holder.is_same_run(&grant.holder) && is_below(&its.node.path, directory);
                match &mut entry.placement {
                    Placement::Ours(its_directories) if is_in && !entry.grant.is_same(grant) => Some(its_directories),
                    _ => None,
                }
            });
            if let Some(others) = other.filter(|others| !others.contains(directory)) {
                // Outermost first.
                others.push(directory.clone());
                others.sort_by_key(String::len);
                has_changed = true;
            }
        }
        if has_changed { self.write(&grant.holder.id) } else { Ok(()) }
    }

    /// Strikes an entry.
    pub fn forget(&mut self, grant: &Grant) -> Result<()> {
        self.entries.retain(|entry| !entry.grant.is_same(grant));
        self.write(&grant.holder.id)
    }

    /// Notes that something of a grant could not be taken back.
    pub fn mark_left_over(&mut self, grant: &Grant, reason: &str) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.grant.is_same(grant)) {
            entry.left_over = Some(reason.to_owned());
        }
        if let Err(error) = self.write(&grant.holder.id) {
            tracing::error!(container = grant.holder.label(), "{}", error.chain());
        }
    }

    /// Writes a container's page under a temporary name and renames it; an empty page is removed.
    fn write(&self, id: &str) -> Result<()> {
        let path = self.directory.join(file_name(id));
        let entries: Vec<Entry> = self.entries.iter().filter(|entry| entry.grant.holder.id == id).cloned().collect();
        let withdrawn: Vec<_> = self.withdrawn.iter().filter(|other| other.holder.id == id).cloned().collect();
        let result = if entries.is_empty() && withdrawn.is_empty() {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        } else {
            let temporary = path.with_extension("tmp");
            let text =
                serde_json::to_vec(&Page { version: VERSION, entries, withdrawn }).expect("a page is valid JSON");
            File::options()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&temporary)
                .and_then(|mut file| file.write_all(&text))
                .and_then(|()| fs::rename(&temporary, &path))
        };
        result.map_err(Error::host(format!("write the ledger {}", path.display())))
    }
}

/// Ids are file names, but for `pid:N` and whatever a runtime may allow one day: those bytes are written as `%XX`.
fn file_name(id: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let escaped =
        id.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") });
    format!("c-{}.json", escaped.collect::<String>())
}

/// Only who holds the lock may set a page aside: to an older program a newer one's pages are unreadable.
fn read_pages(directory: &Path, set_aside: bool) -> Result<Vec<Page>> {
    let mut pages = Vec::new();
    let files = match fs::read_dir(directory) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(pages),
        Err(error) => return Err(Error::host(format!("read the ledger {}", directory.display()))(error)),
    };
    for file in files.flatten() {
        let path = file.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let page = fs::read(&path).map_err(|error| error.to_string()).and_then(|text| parse(&text));
        match page {
            Ok(page) => pages.push(page),
            Err(reason) if !set_aside => tracing::warn!("the ledger {} is passed over: {reason}", path.display()),
            Err(reason) => {
                let aside = path.with_extension("bad");
                tracing::warn!("the ledger {} is set aside as {}: {reason}", path.display(), aside.display());
                let _ = fs::rename(&path, &aside);
            }
        }
    }
    Ok(pages)
}

fn parse(text: &[u8]) -> std::result::Result<Page, String> {
    let page: Page = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if page.version != VERSION {
        return Err(format!("it has version {}, this program writes version {VERSION}", page.version));
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::device::Access;
    use crate::core::ledger::{Granted, Node, Origin};
    use crate::core::plan::tests::{device, holder};

    fn entry(id: &str, path: &str) -> Entry {
        let mut holder = holder(1);
        holder.id = id.into();
        let node = Node { path: path.into(), uid: 0, gid: 20, mode: 0o660, link_to: None };
        let device = Granted::from(&device("/dev/ttyUSB0", 188, 0));
        let grant = Grant {
            holder,
            device,
            access: Access::ALL,
            node,
            origin: Origin::Manual,
            at_start: false,
            exclusive: false,
        };
        Entry { grant, placement: Placement::Pending, left_over: None }
    }

    #[test]
    fn what_is_recorded_is_there_after_reopening_and_what_is_forgotten_is_not() {
        let run = tempfile::tempdir().unwrap();
        let entries = [entry("a", "/dev/x"), entry("a", "/dev/y"), entry("pid:7", "/dev/x"), entry("pid_7", "/dev/x")];
        let mut store = Store::open(run.path()).unwrap().unwrap();
        entries.iter().for_each(|entry| store.record(entry.clone()).unwrap());
        assert!(Store::open(run.path()).unwrap().is_none(), "locked");
        store.settle(&entries[0].grant, Placement::Ours(vec!["/dev/d".into()])).unwrap();
        store.forget(&entries[1].grant).unwrap();
        drop(store);
        let store = Store::open(run.path()).unwrap().unwrap();
        assert_eq!(store.entries().len(), 3);
        assert!(store.entries().iter().any(|entry| entry.placement == Placement::Ours(vec!["/dev/d".into()])));
        assert_eq!(Store::peek(run.path()).unwrap().len(), 3);
    }

    #[test]
    fn a_page_that_cannot_be_read_is_set_aside() {
        let run = tempfile::tempdir().unwrap();
        Store::open(run.path()).unwrap().unwrap().record(entry("good", "/dev/x")).unwrap();
        let ledger = run.path().join("ledger");
        fs::write(ledger.join("c-cut.json"), "{\"version\":1,\"entr").unwrap();
        fs::write(ledger.join("c-new.json"), "{\"version\":99,\"entries\":[]}").unwrap();
        assert_eq!(Store::peek(run.path()).unwrap().len(), 1);
        assert!(ledger.join("c-cut.json").exists(), "a look changes nothing");
        assert_eq!(Store::open(run.path()).unwrap().unwrap().entries().len(), 1);
        assert!(ledger.join("c-cut.bad").exists() && ledger.join("c-new.bad").exists());
    }

    #[test]
    fn no_ledger_is_an_empty_one() {
        assert!(Store::peek(Path::new("/nonexistent/qm-hotplug")).unwrap().is_empty());
    }
}
