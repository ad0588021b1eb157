//! The devices that a rule stands for when a container starts.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use rustix::fs::{Access, access};

use crate::core::device::{Device, Identity, Kind, Number};
use crate::core::facts::Facts;
use crate::core::ledger::Entry;
use crate::core::policy::Bounds;
use crate::core::rule::Rule;
use crate::core::selection::{Group, Selection};
use crate::core::selector::{Key, Test};
use crate::core::spec::SpecDevice;
use crate::ops::RUN_DIRECTORY;
use crate::ops::store::Store;
use crate::sys::host::is_initial_user_namespace;
use crate::sys::process::is_gone;
use crate::sys::sysfs::KernelSysfs;
use crate::sys::{block, devfs, group, udev};

/// What was found for a rule.
#[derive(Debug, Default)]
pub struct Found {
    /// To be granted, sorted by path.
    pub devices: Vec<SpecDevice>,
    /// Paths of those that are withheld, each with the reason in words.
    pub withheld: Vec<(String, String)>,
}

/// Who asks.
pub struct Request<'a> {
    /// What the container may ask for.
    pub bounds: &'a Bounds,
    /// Its root directory, as far as its specification tells it.
    pub root: Option<&'a str>,
    /// The paths that rules before this one have taken, and for which device.
    pub taken: &'a HashMap<String, Number>,
}

/// Where devices are looked for: on the host, or in a test's environment.
pub trait Discovery {
    /// The devices that the rule stands for now.
    fn devices(&self, rule: &Rule, request: &Request<'_>) -> io::Result<Found>;
}

/// The host's `/dev` for categories, and udev's database for seats and selectors.
#[derive(Debug, Default)]
pub struct Host {
    /// All devices, looked at once for all selectors that do not say where to look.
    all: OnceCell<Vec<Device>>,
}

impl Discovery for Host {
    fn devices(&self, rule: &Rule, request: &Request<'_>) -> io::Result<Found> {
        let (sysfs, mut found) = (KernelSysfs::default(), Found::default());
        let wanted: Vec<(Vec<SpecDevice>, Option<Device>)> = match rule {
            // The kernel's name for a node is all that counts, so udev is not asked; a policy may want to know more.
            Rule::Category(category) => devfs::nodes(category).into_iter().map(|node| (vec![node], None)).collect(),
            Rule::Seat(seat) => {
                let all = udev::scan_seats()?.into_iter().filter(|device| seat.has(device));
                all.map(|device| (vec![SpecDevice::from(&device)], Some(device))).collect()
            }
            Rule::Selection(selection) => {
                let gid = match gid(selection, request.root) {
                    Ok(gid) => gid,
                    Err(reason) => {
                        found.withheld.push((format!("what {rule} asks for"), reason));
                        return Ok(found);
                    }
                };
                let nodes = |device: Device| {
                    let how = selection.matches(&Facts::new(&device, &sysfs))?;
                    let nodes = selection.nodes(&device, how, gid);
                    let nodes = nodes.iter().map(|node| SpecDevice::new(device.number, node, rule.access()));
                    Some((nodes.collect(), Some(device)))
                };
                self.candidates(selection)?.into_iter().filter_map(nodes).collect()
            }
        };
        let held = match held() {
            Ok(held) => held,
            Err(reason) if rule.is_exclusive() => {
                found.withheld.push((format!("what {rule} asks for"), reason));
                return Ok(found);
            }
            Err(reason) => {
                tracing::warn!("{reason}");
                Vec::new()
            }
        };
        let mut taken = request.taken.clone();
        for (nodes, device) in wanted {
            let on_host = device.as_ref().map_or_else(|| nodes[0].path.clone(), |device| device.node.clone());
            let device = device.or_else(|| needs_facts(rule, request, &held).then(|| described(&on_host, &nodes[0])));
            let facts = device.as_ref().map(|device| Facts::new(device, &sysfs));
            let refused = || request.bounds.refusal(facts.as_ref()?).filter(|_| rule.is_bounded());
            let held = || holder(device.as_ref()?, &held, rule.is_exclusive());
            let other = |node: &SpecDevice| taken.get(&node.path).is_some_and(|number| *number != node.number);
            let contested = || other(&nodes[0]).then(|| format!("{} is another device's already", nodes[0].path));
            let reason = reason_to_withhold(&on_host, &nodes[0]).or_else(refused).or_else(held).or_else(contested);
            match reason {
                Some(reason) => found.withheld.push((on_host, reason)),
                // Of the links, those that are free, as the agent has it.
                None => {
                    let free: Vec<SpecDevice> = nodes.iter().filter(|node| !other(node)).cloned().collect();
                    taken.extend(free.iter().map(|node| (node.path.clone(), node.number)));
                    found.devices.extend(free);
                }
            }
        }
        Ok(found)
    }
}

impl Host {
    /// The devices that the selector may mean, sorted as the agent has them.
    fn candidates(&self, selection: &Selection) -> io::Result<Vec<Device>> {
        // A look at all devices of a host takes milliseconds; most selectors say in which part of it to look.
        let narrow = selection.selector.terms.iter().filter(|term| !term.negated && !selection.options.children);
        let mut found = None;
        for term in narrow {
            match &term.test {
                Test::Category(category) => {
                    let nodes = devfs::nodes(category);
                    found = Some(
                        nodes.iter().filter_map(|node| udev::by_settled_path(&node.path).ok()).collect::<Vec<_>>(),
                    );
                    break;
                }
                Test::Value(Key::Subsystem, glob) => {
                    if let Some(name) = glob.literal() {
                        found = Some(udev::scan_subsystem(&name)?);
                        break;
                    }
                }
                _ => {}
            }
        }
        let mut found = match (found, self.all.get()) {
            (Some(found), _) => found,
            // Whoever waits wants to see what is new.
            (None, Some(all)) if selection.options.wait.is_none() => all.clone(),
            (None, _) => {
                let all = udev::scan()?;
                let _ = self.all.set(all.clone());
                all
            }
        };
        found.sort_by(|a, b| a.identity.devpath.cmp(&b.identity.devpath));
        Ok(found)
    }
}

fn gid(selection: &Selection, root: Option<&str>) -> Result<Option<u32>, String> {
    match &selection.options.gid {
        None => Ok(None),
        Some(Group::Number(gid)) => Ok(Some(*gid)),
        Some(Group::Name(name)) => {
            let root = root.ok_or("where its root directory is is not known")?;
            let text = group::read_below(root).map_err(|error| format!("its /etc/group cannot be read: {error}"))?;
            let gid = Group::all_in(&text)
                .get(name)
                .copied()
                .ok_or_else(|| format!("its /etc/group has no group '{name}'"))?;
            Ok(Some(gid))
        }
    }
}

/// What is known of the device behind a node, and that is only the node while its driver is not loaded: a policy counts
/// for that, too.
pub(super) fn described(on_host: &str, node: &SpecDevice) -> Device {
    udev::by_path(on_host).unwrap_or_else(|_| Device {
        number: node.number,
        identity: Identity { devpath: String::new(), inode: 0, diskseq: None },
        node: on_host.to_owned(),
        subsystem: String::new(),
        uid: node.uid,
        gid: node.gid,
        mode: node.mode,
        properties: BTreeMap::new(),
    })
}

fn needs_facts(rule: &Rule, request: &Request<'_>, held: &[Entry]) -> bool {
    !held.is_empty() || rule.is_bounded() && *request.bounds != Bounds::default()
}

/// What running containers have. The ledger is root's: to the hook of an ordinary user it seems empty.
fn held() -> Result<Vec<Entry>, String> {
    if !is_initial_user_namespace() || !rustix::process::geteuid().is_root() {
        return Ok(Vec::new());
    }
    let unknown = |why: String| format!("which devices other containers have alone is not known: {why}");
    let passed_over = OnceCell::new();
    let pass_over = |page: &Path, why: &str| drop(passed_over.set(format!("{}: {why}", page.display())));
    let entries = Store::peek(RUN_DIRECTORY.as_ref(), pass_over).map_err(|error| unknown(error.chain()))?;
    if let Some(page) = passed_over.into_inner() {
        return Err(unknown(page));
    }
    let counts =
        |entry: &Entry| entry.left_over.is_none() && !is_gone(entry.grant.holder.pid, entry.grant.holder.start_time);
    Ok(entries.into_iter().filter(counts).collect())
}

/// Who has the device for itself alone, or has it at all where it is wanted `alone`.
fn holder(device: &Device, held: &[Entry], alone: bool) -> Option<String> {
    let mut grants = held.iter().map(|entry| &entry.grant);
    let other = grants.find(|grant| grant.device.identity == device.identity && (alone || grant.exclusive))?;
    Some(format!("container {} has it, and only one may: it is free when that ends", other.holder.label()))
}

fn reason_to_withhold(node: &str, device: &SpecDevice) -> Option<String> {
    let on_host = SpecDevice { path: node.to_owned(), ..device.clone() };
    if !devfs::is_where_it_belongs(&on_host) {
        return Some("the kernel gives its numbers another name".into());
    }
    // For an ordinary user's container, in a user namespace where the hook seems to be root, that user's rights on the
    // node are all that counts. Root has them.
    if access(node, Access::READ_OK | Access::WRITE_OK).is_err() {
        return Some("this user may not open it".into());
    }
    match device.number.kind {
        Kind::Char => None,
        Kind::Block => block::in_use(node, device.number),
    }
}
