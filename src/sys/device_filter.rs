//! The device filter: one program on the cgroup2 root that lifts refusals, one mark on each granted container's cgroup,
//! and the maps of grants and of withdrawals. What the programs do is told in [`crate::core::filter_program`].

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::core::device::{Access, Kind, Number};
use crate::core::filter_program::{
    self as program, GRANTS_MAP, KEY_SIZE, LAYOUT, REFUSED_MAP, VALUE_SIZE, WATCHED_KEY_SIZE, WATCHED_MAP,
    WATCHED_VALUE_SIZE, WITHDRAWN_MAP, WITNESS_MAP, WITNESS_SIZE,
};
use crate::error::{Error, Result};
use crate::failpoint::reached;
use crate::sys::bpf::{Map, Program, attached, attached_as};
use crate::sys::cgroup::{Cgroup, CgroupRoot};
use crate::sys::mark;
use crate::sys::ring::Ring;

/// Entries that the map of grants takes at first; a full one is doubled.
const CAPACITY: u32 = 65_536;
/// Cgroups that can be watched.
const WATCHED_CAPACITY: u32 = 4096;
/// Bytes of the ring of refusals, for 2,048 of them.
const RING_SIZE: u32 = 64 * 1024;

/// The filter in force on this host.
#[derive(Debug)]
pub struct DeviceFilter {
    grants: Map,
    witness: Map,
    /// There while there are withdrawals: then the program at the root has the form that reads it.
    withdrawn: Option<Map>,
    watched: Map,
    refused: Map,
}

/// One entry of the map of grants or of withdrawals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Id of the cgroup.
    pub cgroup: u64,
    /// The device.
    pub number: Number,
    /// The rights granted or withdrawn.
    pub access: Access,
}

/// Where the filter stands, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Whether our program is attached to the root.
    pub attached: bool,
    /// Names of foreign device programs that run after ours and can refuse what we lift.
    pub after: Vec<String>,
    /// Entries in the map of grants.
    pub entries: usize,
    /// Entries in the map of withdrawals.
    pub withdrawn: usize,
}

impl DeviceFilter {
    /// Takes over the filter that is attached, from this build or another one, or else attaches a new one.
    pub fn open(root: &CgroupRoot) -> Result<DeviceFilter> {
        DeviceFilter::open_as(root, program::lift_name)
    }

    /// [`DeviceFilter::open`] under another program name for each form, to show a hand-over between two builds.
    pub fn open_as<S: Into<String>>(root: &CgroupRoot, name: impl Fn(bool) -> S) -> Result<DeviceFilter> {
        let ours = lifts(root)?;
        // Of several, which an interrupted hand-over leaves, this build's first.
        let is_current = |its_name: &str| [true, false].into_iter().any(|withdraws| name(withdraws).into() == its_name);
        let (current, others): (Vec<_>, Vec<_>) = (0..ours.len()).partition(|at| is_current(&ours[*at].1));
        for at in current.into_iter().chain(others) {
            let Some(filter) = adopt(&ours[at]).map_err(failed("open its maps"))? else { continue };
            match name(filter.withdrawn.is_some()).into() {
                its_name if its_name == ours[at].1 => detach_others(root, &ours, at)?,
                other => filter.take_over(root, &other, &ours)?,
            }
            return Ok(filter);
        }
        let filter = DeviceFilter::create(CAPACITY).map_err(failed("create its maps"))?;
        filter.take_over(root, &name(false).into(), &ours)?;
        Ok(filter)
    }

    /// Loads the program over these maps and puts it in the place of those of ours that are attached, or behind all
    /// others where there is none. At no moment is there none of ours.
    fn take_over(&self, root: &CgroupRoot, name: &str, ours: &[(Program, String)]) -> Result<()> {
        let lift = Program::load(name, &program::lift(self.maps())).map_err(failed("load its program"))?;
        reached("filter: the program is loaded");
        match ours.first() {
            // In place: a program of others that runs after ours keeps the last word.
            Some((old, _)) => {
                lift.replace(root.as_fd(), old).map_err(failed("replace the version before"))?;
                reached("filter: the program is replaced");
            }
            None => {
                lift.attach(root.as_fd()).map_err(failed("attach its program to the cgroup root"))?;
                reached("filter: the program is attached");
            }
        }
        detach_others(root, ours, 0)
    }

    fn maps(&self) -> program::Maps {
        program::Maps {
            grants: self.grants.as_raw_fd(),
            witness: self.witness.as_raw_fd(),
            withdrawn: self.withdrawn.as_ref().map(AsRawFd::as_raw_fd),
            watched: self.watched.as_raw_fd(),
            refused: self.refused.as_raw_fd(),
        }
    }

    /// Puts the form of the program into place that this filter needs now.
    fn change_form(&self, root: &CgroupRoot) -> Result<()> {
        self.take_over(root, &program::lift_name(self.withdrawn.is_some()), &lifts(root)?)
    }

    /// Moves to a map of twice the size, with all entries, without a moment in which a grant does not hold.
    pub fn grow(self, root: &CgroupRoot) -> Result<DeviceFilter> {
        let copied = self.grants.capacity().and_then(|capacity| {
            let grants = create_grants(capacity.saturating_mul(2))?;
            for key in self.grants.keys()? {
                if let Some(value) = self.grants.get(&key)? {
                    grants.insert(&key, &value)?;
                }
            }
            Ok(grants)
        });
        // The marks refer to the map of witnesses, which stays.
        let grown = DeviceFilter { grants: copied.map_err(failed("make its map larger"))?, ..self };
        grown.change_form(root)?;
        Ok(grown)
    }

    /// The filter that is attached, if one is.
    pub fn existing(root: &CgroupRoot) -> Result<Option<DeviceFilter>> {
        lifts(root)?.iter().find_map(|lift| adopt(lift).transpose()).transpose().map_err(failed("open its maps"))
    }

    fn create(capacity: u32) -> io::Result<DeviceFilter> {
        Ok(DeviceFilter {
            grants: create_grants(capacity)?,
            witness: Map::create_percpu_array(WITNESS_MAP, WITNESS_SIZE, 1)?,
            withdrawn: None,
            watched: create_watched()?,
            refused: create_refused()?,
        })
    }

    /// Makes these the rights of a cgroup on a device; with none, the entry goes. E2BIG: the map is full, see
    /// [`DeviceFilter::grow`].
    pub fn set(&self, cgroup: u64, number: Number, access: Access) -> io::Result<()> {
        let key = key(cgroup, number);
        if access.is_none() {
            return self.grants.remove(&key).map(|_| reached("filter: the right is gone"));
        }
        self.grants.insert(&key, &access.bits().to_ne_bytes()).inspect(|()| reached("filter: the right is set"))
    }

    /// The rights that the map holds.
    pub fn get(&self, cgroup: u64, number: Number) -> io::Result<Access> {
        Ok(self.grants.get(&key(cgroup, number))?.map_or(Access::NONE, |value| access(&value)))
    }

    /// All grants, sorted.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        entries(&self.grants)
    }

    /// All withdrawals, sorted.
    pub fn withdrawn(&self) -> io::Result<Vec<Entry>> {
        self.withdrawn.as_ref().map_or(Ok(Vec::new()), entries)
    }

    /// Withdraws rights that programs of others give to a cgroup and to all below it; with none, they hold again. A
    /// grant stands above a withdrawal. The program at the root has the form for it only while there are any.
    pub fn withdraw(&mut self, root: &CgroupRoot, cgroup: u64, number: Number, access: Access) -> Result<()> {
        let changed = failed("change its map of withdrawals");
        let key = key(cgroup, number);
        match (&self.withdrawn, access.is_none()) {
            (None, true) => Ok(()),
            (None, false) => {
                let map = Map::create_hash(WITHDRAWN_MAP, KEY_SIZE, VALUE_SIZE, CAPACITY).map_err(&changed)?;
                map.insert(&key, &access.bits().to_ne_bytes()).map_err(&changed)?;
                reached("filter: the right is withdrawn");
                self.withdrawn = Some(map);
                self.change_form(root).inspect_err(|_| self.withdrawn = None)
            }
            (Some(map), false) => map.insert(&key, &access.bits().to_ne_bytes()).map_err(changed),
            (Some(map), true) => {
                map.remove(&key).map_err(&changed)?;
                reached("filter: the right is restored");
                if !map.keys().map_err(&changed)?.is_empty() {
                    return Ok(());
                }
                let unused = self.withdrawn.take();
                self.change_form(root).inspect_err(|_| self.withdrawn = unused)
            }
        }
    }

    /// Loads the form that reads withdrawals, and lets it go: that this kernel takes it is known before it is needed.
    pub fn prove_withdrawal(&self) -> Result<()> {
        let map = Map::create_hash(WITHDRAWN_MAP, KEY_SIZE, VALUE_SIZE, 1).map_err(failed("create its maps"))?;
        let form = program::lift(program::Maps { withdrawn: Some(map.as_raw_fd()), ..self.maps() });
        Program::load(&program::lift_name(true), &form).map(drop).map_err(failed("load its program"))
    }

    /// Loads the program in both forms, with maps of its own, and lets all of it go: whether this kernel takes it is known
    /// without a change to what is in force.
    pub fn prove() -> Result<()> {
        let filter = DeviceFilter::create(1).map_err(failed("create its maps"))?;
        Program::load(&program::lift_name(false), &program::lift(filter.maps())).map_err(failed("load its program"))?;
        filter.prove_withdrawal()
    }

    /// Has refusals in this cgroup and below it reported; what is watched already stays so. E2BIG: too many are.
    pub fn watch(&self, cgroup: u64) -> io::Result<()> {
        self.watched.insert(&cgroup.to_ne_bytes(), &[0; WATCHED_VALUE_SIZE])
    }

    /// No longer.
    pub fn unwatch(&self, cgroup: u64) -> io::Result<()> {
        self.watched.remove(&cgroup.to_ne_bytes()).map(drop)
    }

    /// Ids of the watched cgroups.
    pub fn watched(&self) -> io::Result<BTreeSet<u64>> {
        let ids = self.watched.keys()?;
        Ok(ids.into_iter().filter_map(|id| id.try_into().ok()).map(u64::from_ne_bytes).collect())
    }

    /// The reports. There is one ring; what one reader has taken another one does not see.
    pub fn refusals(&self) -> io::Result<Ring> {
        Ring::open(&self.refused)
    }

    /// Whether reports go to this very ring.
    pub fn reports_to(&self, ring: &Ring) -> bool {
        self.refused.id().is_ok_and(|id| id == ring.id())
    }

    /// Whether the cgroup has our mark in first place: this build's, and one that leaves its witness where this filter
    /// reads it.
    pub fn is_marked(&self, cgroup: &Cgroup) -> io::Result<bool> {
        mark::is_first(cgroup, &self.witness)
    }

    /// Puts our mark into first place on the cgroup.
    pub fn mark(&self, cgroup: &Cgroup) -> io::Result<()> {
        mark::put_first(cgroup, &self.witness)
    }

    /// Removes our marks from a cgroup.
    pub fn unmark(&self, cgroup: &Cgroup) -> io::Result<()> {
        mark::remove(cgroup)
    }

    /// Where the filter stands.
    pub fn standing(root: &CgroupRoot) -> Result<Standing> {
        let programs = attached(root.as_fd()).map_err(failed("query programs at the cgroup root"))?;
        let names: Vec<String> = programs.iter().filter_map(|p| Some(p.info().ok()?.name)).collect();
        let ours = names.iter().rposition(|name| name.starts_with(program::LIFT_PREFIX));
        let after = match ours {
            Some(at) => names[at + 1..]
                .iter()
                .map(|name| if name.is_empty() { "(no name)".into() } else { name.clone() })
                .collect(),
            None => Vec::new(),
        };
        let count = |map: &Map| map.keys().map(|keys| keys.len()).map_err(failed("read its maps"));
        let (entries, withdrawn) = match DeviceFilter::existing(root)? {
            Some(filter) => (count(&filter.grants)?, filter.withdrawn.as_ref().map_or(Ok(0), count)?),
            None => (0, 0),
        };
        Ok(Standing { attached: ours.is_some(), after, entries, withdrawn })
    }

    /// Takes everything of ours out: the marks of all cgroups first, because their verdict means nothing without the
    /// program at the root, then that program and with it the maps.
    pub fn release(root: &CgroupRoot) -> Result<()> {
        let lifts = lifts(root)?;
        for path in root.walk() {
            // A cgroup that vanished took its programs along.
            if let Ok(cgroup) = root.open(&path) {
                mark::remove(&cgroup).map_err(Error::host(format!("remove our mark from cgroup {path}")))?;
            }
        }
        reached("release: the marks are removed");
        for (lift, _) in lifts {
            lift.detach(root.as_fd()).map_err(failed("detach its program from the cgroup root"))?;
            reached("release: the program is detached");
        }
        Ok(())
    }
}

fn create_grants(capacity: u32) -> io::Result<Map> {
    Map::create_hash(GRANTS_MAP, KEY_SIZE, VALUE_SIZE, capacity)
}

fn create_watched() -> io::Result<Map> {
    Map::create_hash(WATCHED_MAP, WATCHED_KEY_SIZE, WATCHED_VALUE_SIZE, WATCHED_CAPACITY)
}

fn create_refused() -> io::Result<Map> {
    Map::create_ring(REFUSED_MAP, RING_SIZE)
}

/// One version of ours is enough: others are left by a hand-over that was interrupted.
fn detach_others(root: &CgroupRoot, ours: &[(Program, String)], kept: usize) -> Result<()> {
    for (_, (old, _)) in ours.iter().enumerate().filter(|(at, _)| *at != kept) {
        old.detach(root.as_fd()).map_err(failed("detach the version before"))?;
    }
    Ok(())
}

/// The programs of ours at the cgroup root.
fn lifts(root: &CgroupRoot) -> Result<Vec<(Program, String)>> {
    attached_as(root.as_fd(), program::LIFT_PREFIX).map_err(failed("query programs at the cgroup root"))
}

/// The maps of a program of ours at the root, if they have this build's layout. Those that a build before this one did not
/// have are made.
fn adopt((program, name): &(Program, String)) -> io::Result<Option<DeviceFilter>> {
    if !name.starts_with(&format!("{}{LAYOUT}_", program::LIFT_PREFIX)) {
        return Ok(None);
    }
    let (mut grants, mut witness, mut withdrawn, mut watched, mut refused) = (None, None, None, None, None);
    for id in program.info()?.map_ids {
        let (map, its_name) = Map::by_id(id)?;
        match (its_name.as_str(), map.sizes()) {
            (GRANTS_MAP, (KEY_SIZE, VALUE_SIZE)) => grants = Some(map),
            (WITHDRAWN_MAP, (KEY_SIZE, VALUE_SIZE)) => withdrawn = Some(map),
            (WITNESS_MAP, (4, WITNESS_SIZE)) => witness = Some(map),
            (WATCHED_MAP, (WATCHED_KEY_SIZE, WATCHED_VALUE_SIZE)) => watched = Some(map),
            (REFUSED_MAP, (0, 0)) => refused = Some(map),
            _ => {}
        }
    }
    let (Some(grants), Some(witness)) = (grants, witness) else { return Ok(None) };
    let watched = watched.map_or_else(create_watched, Ok)?;
    let refused = refused.map_or_else(create_refused, Ok)?;
    Ok(Some(DeviceFilter { grants, witness, withdrawn, watched, refused }))
}

fn entries(map: &Map) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for key in map.keys()? {
        // An entry may go between the two calls.
        if let (Some((cgroup, number)), Some(value)) = (parse_key(&key), map.get(&key)?) {
            entries.push(Entry { cgroup, number, access: access(&value) });
        }
    }
    entries.sort();
    Ok(entries)
}

fn key(cgroup: u64, number: Number) -> [u8; KEY_SIZE] {
    let mut key = [0; KEY_SIZE];
    key[..8].copy_from_slice(&cgroup.to_ne_bytes());
    key[8..12].copy_from_slice(&number.kind.bpf_code().to_ne_bytes());
    key[12..16].copy_from_slice(&number.major.to_ne_bytes());
    key[16..20].copy_from_slice(&number.minor.to_ne_bytes());
    key
}

fn parse_key(key: &[u8]) -> Option<(u64, Number)> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(key.get(at..at + 4)?.try_into().ok()?));
    let cgroup = u64::from_ne_bytes(key.get(..8)?.try_into().ok()?);
    Some((cgroup, Number { kind: Kind::from_bpf_code(u32_at(8)?)?, major: u32_at(12)?, minor: u32_at(16)? }))
}

fn access(value: &[u8]) -> Access {
    Access::from_bits(value.try_into().map_or(0, u32::from_ne_bytes))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Error::NoDeviceFilter { release, what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_are_read_as_they_were_written(cgroup in any::<u64>(), block in any::<bool>(), major in any::<u32>(), minor in any::<u32>()) {
            let number = Number { kind: if block { Kind::Block } else { Kind::Char }, major, minor };
            prop_assert_eq!(parse_key(&key(cgroup, number)), Some((cgroup, number)));
        }
    }
}
