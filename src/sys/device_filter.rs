//! The device filter: one program on the cgroup2 root that lifts refusals, one mark on each granted container's cgroup,
//! and the map of grants. What the programs do is told in [`crate::core::filter_program`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::core::device::{Access, Kind, Number};
use crate::core::filter_program::{
    self as program, GRANTS_MAP, KEY_SIZE, LAYOUT, VALUE_SIZE, WITNESS_MAP, WITNESS_SIZE,
};
use crate::error::{Error, Result};
use crate::sys::bpf::{Map, Program, attached};
use crate::sys::cgroup::{Cgroup, CgroupRoot};

/// Entries that the map of grants takes at first; a full one is doubled.
const CAPACITY: u32 = 65_536;

/// The filter in force on this host.
#[derive(Debug)]
pub struct DeviceFilter {
    grants: Map,
    witness: Map,
}

/// One entry of the map of grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Id of the cgroup.
    pub cgroup: u64,
    /// The device.
    pub number: Number,
    /// Its rights.
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
}

impl DeviceFilter {
    /// Takes over the filter that is attached, from this build or another one, or else attaches a new one.
    pub fn open(root: &CgroupRoot) -> Result<DeviceFilter> {
        DeviceFilter::open_as(root, &program::lift_name())
    }

    /// [`DeviceFilter::open`] under another program name, to show a hand-over between two builds.
    pub fn open_as(root: &CgroupRoot, name: &str) -> Result<DeviceFilter> {
        let ours =
            our_programs(root.as_fd(), program::LIFT_PREFIX).map_err(failed("query programs at the cgroup root"))?;
        for (at, (_, its_name)) in ours.iter().enumerate().filter(|(_, (_, its_name))| its_name == name) {
            if let Some(filter) = adopt(&ours, its_name).map_err(failed("open its maps"))? {
                detach_others(root, &ours, at)?;
                return Ok(filter);
            }
        }
        let filter = match ours.iter().find_map(|(_, name)| adopt(&ours, name).transpose()) {
            Some(adopted) => adopted.map_err(failed("open the maps of the version before"))?,
            None => DeviceFilter::create(CAPACITY).map_err(failed("create its maps"))?,
        };
        filter.take_over(root, name, &ours)?;
        Ok(filter)
    }

    /// Loads the program over these maps and puts it in the place of those of ours that are attached, or behind all
    /// others where there is none. At no moment is there none of ours.
    fn take_over(&self, root: &CgroupRoot, name: &str, ours: &[(Program, String)]) -> Result<()> {
        let lift = Program::load(name, &program::lift(self.grants.as_raw_fd(), self.witness.as_raw_fd()))
            .map_err(failed("load its program"))?;
        match ours.first() {
            // In place: a program of others that runs after ours keeps the last word.
            Some((old, _)) => lift.replace(root.as_fd(), old).map_err(failed("replace the version before"))?,
            None => lift.attach(root.as_fd()).map_err(failed("attach its program to the cgroup root"))?,
        }
        detach_others(root, ours, 0)
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
        let grown = DeviceFilter { grants: copied.map_err(failed("make its map larger"))?, witness: self.witness };
        let ours =
            our_programs(root.as_fd(), program::LIFT_PREFIX).map_err(failed("query programs at the cgroup root"))?;
        grown.take_over(root, &program::lift_name(), &ours)?;
        Ok(grown)
    }

    /// The filter that is attached, if one is.
    pub fn existing(root: &CgroupRoot) -> Result<Option<DeviceFilter>> {
        let ours =
            our_programs(root.as_fd(), program::LIFT_PREFIX).map_err(failed("query programs at the cgroup root"))?;
        ours.iter().find_map(|(_, name)| adopt(&ours, name).transpose()).transpose().map_err(failed("open its maps"))
    }

    fn create(capacity: u32) -> io::Result<DeviceFilter> {
        Ok(DeviceFilter {
            grants: create_grants(capacity)?,
            witness: Map::create_percpu_array(WITNESS_MAP, WITNESS_SIZE, 1)?,
        })
    }

    /// Makes these the rights of a cgroup on a device; with none, the entry goes. E2BIG: the map is full, see
    /// [`DeviceFilter::grow`].
    pub fn set(&self, cgroup: u64, number: Number, access: Access) -> io::Result<()> {
        let key = key(cgroup, number);
        if access.is_none() {
            return self.grants.remove(&key).map(drop);
        }
        self.grants.insert(&key, &access.bits().to_ne_bytes())
    }

    /// The rights that the map holds.
    pub fn get(&self, cgroup: u64, number: Number) -> io::Result<Access> {
        Ok(self.grants.get(&key(cgroup, number))?.map_or(Access::NONE, |value| access(&value)))
    }

    /// All entries, sorted.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for key in self.grants.keys()? {
            // An entry may go between the two calls.
            if let (Some((cgroup, number)), Some(value)) = (parse_key(&key), self.grants.get(&key)?) {
                entries.push(Entry { cgroup, number, access: access(&value) });
            }
        }
        entries.sort();
        Ok(entries)
    }

    /// Whether the cgroup has our mark in first place: this build's, and one that leaves its witness where this filter
    /// reads it.
    pub fn is_marked(&self, cgroup: &Cgroup) -> io::Result<bool> {
        let Some(first) = attached(cgroup.as_fd())?.into_iter().next() else { return Ok(false) };
        let info = first.info()?;
        Ok(info.name == program::mark_name() && info.map_ids.contains(&self.witness.id()?))
    }

    /// Puts our mark into first place on the cgroup, without a moment in which the programs there do not decide, and
    /// without one in which the mark runs after a program that refuses: it would take that refusal for one from below.
    /// Copies of the programs are attached, the first original is replaced by the mark, and the originals come back, so
    /// that the runtime that attached them can still replace them. A mark of another version is replaced in its place.
    pub fn mark(&self, cgroup: &Cgroup) -> io::Result<()> {
        if self.is_marked(cgroup)? {
            return Ok(());
        }
        let mark = Program::load(&program::mark_name(), &program::mark(cgroup.level, self.witness.as_raw_fd()))?;
        let (mut originals, mut marks) = (Vec::new(), Vec::new());
        for (at, program) in attached(cgroup.as_fd())?.into_iter().enumerate() {
            if !program.info()?.name.starts_with(program::MARK_PREFIX) {
                originals.push(program);
            } else if at == 0 {
                mark.replace(cgroup.as_fd(), &program)?;
            } else {
                marks.push(program);
            }
        }
        for stale in marks {
            stale.detach(cgroup.as_fd())?;
        }
        if self.is_marked(cgroup)? {
            return Ok(());
        }
        let Some(first) = originals.first() else { return mark.attach(cgroup.as_fd()) };
        let copies = originals.iter().map(Program::copy).collect::<io::Result<Vec<_>>>()?;
        let mut done = Vec::new();
        let result = step_aside(cgroup.as_fd(), &mark, &originals, &copies, &mut done);
        if result.is_err() {
            for undo in done.iter().rev() {
                // Best effort: the copies stay attached until their originals are back, so nothing is opened.
                let _ = match undo {
                    Done::Attached(program) => program.detach(cgroup.as_fd()),
                    Done::Replaced => first.replace(cgroup.as_fd(), &mark),
                    Done::Detached(program) => program.attach(cgroup.as_fd()),
                };
            }
        }
        result
    }

    /// Removes our marks from a cgroup.
    pub fn unmark(&self, cgroup: &Cgroup) -> io::Result<()> {
        unmark(cgroup)
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
        let entries = match DeviceFilter::existing(root)? {
            Some(filter) => filter.grants.keys().map_err(failed("read its map"))?.len(),
            None => 0,
        };
        Ok(Standing { attached: ours.is_some(), after, entries })
    }

    /// Takes everything of ours out: the marks of all cgroups first, because their verdict means nothing without the
    /// program at the root, then that program and with it the maps.
    pub fn release(root: &CgroupRoot) -> Result<()> {
        let lifts =
            our_programs(root.as_fd(), program::LIFT_PREFIX).map_err(failed("query programs at the cgroup root"))?;
        for path in root.walk() {
            // A cgroup that vanished took its programs along.
            if let Ok(cgroup) = root.open(&path) {
                unmark(&cgroup).map_err(Error::host(format!("remove our mark from cgroup {path}")))?;
            }
        }
        for (lift, _) in lifts {
            lift.detach(root.as_fd()).map_err(failed("detach its program from the cgroup root"))?;
        }
        Ok(())
    }
}

fn create_grants(capacity: u32) -> io::Result<Map> {
    Map::create_hash(GRANTS_MAP, KEY_SIZE, VALUE_SIZE, capacity)
}

enum Done<'a> {
    Attached(&'a Program),
    /// The mark has taken the place of the first original.
    Replaced,
    Detached(&'a Program),
}

fn step_aside<'a>(
    cgroup: BorrowedFd<'_>,
    mark: &Program,
    originals: &'a [Program],
    copies: &'a [Program],
    done: &mut Vec<Done<'a>>,
) -> io::Result<()> {
    let attach = |program: &'a Program, done: &mut Vec<Done<'a>>| -> io::Result<()> {
        program.attach(cgroup)?;
        done.push(Done::Attached(program));
        Ok(())
    };
    let detach = |program: &'a Program, done: &mut Vec<Done<'a>>| -> io::Result<()> {
        program.detach(cgroup)?;
        done.push(Done::Detached(program));
        Ok(())
    };
    for copy in copies {
        attach(copy, done)?;
    }
    let (first, others) = originals.split_first().expect("there is one");
    mark.replace(cgroup, first)?;
    done.push(Done::Replaced);
    for original in others {
        detach(original, done)?;
    }
    for original in originals {
        attach(original, done)?;
    }
    for copy in copies {
        detach(copy, done)?;
    }
    Ok(())
}

/// One version of ours is enough: others are left by a hand-over that was interrupted.
fn detach_others(root: &CgroupRoot, ours: &[(Program, String)], kept: usize) -> Result<()> {
    for (_, (old, _)) in ours.iter().enumerate().filter(|(at, _)| *at != kept) {
        old.detach(root.as_fd()).map_err(failed("detach the version before"))?;
    }
    Ok(())
}

fn unmark(cgroup: &Cgroup) -> io::Result<()> {
    for (mark, _) in our_programs(cgroup.as_fd(), program::MARK_PREFIX)? {
        mark.detach(cgroup.as_fd())?;
    }
    Ok(())
}

fn our_programs(cgroup: BorrowedFd<'_>, prefix: &str) -> io::Result<Vec<(Program, String)>> {
    let mut ours = Vec::new();
    for program in attached(cgroup)? {
        let name = program.info()?.name;
        if name.starts_with(prefix) {
            ours.push((program, name));
        }
    }
    Ok(ours)
}

/// The maps of the program with that name, if they have this build's layout.
fn adopt(programs: &[(Program, String)], name: &str) -> io::Result<Option<DeviceFilter>> {
    let Some((program, _)) = programs.iter().find(|(_, its_name)| its_name == name) else { return Ok(None) };
    if !name.starts_with(&format!("{}{LAYOUT}_", program::LIFT_PREFIX)) {
        return Ok(None);
    }
    let (mut grants, mut witness) = (None, None);
    for id in program.info()?.map_ids {
        match Map::by_id(id)? {
            (map, name) if name == GRANTS_MAP && map.sizes() == (KEY_SIZE, VALUE_SIZE) => grants = Some(map),
            (map, name) if name == WITNESS_MAP && map.sizes() == (4, WITNESS_SIZE) => witness = Some(map),
            _ => {}
        }
    }
    Ok(grants.zip(witness).map(|(grants, witness)| DeviceFilter { grants, witness }))
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
