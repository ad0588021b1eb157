//! Plans carried out on a model of the world.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::core::device::{Device, Identity, Kind};
use crate::core::ledger::{Granted, Node, Origin};

/// A character device with the owner root:dialout.
pub(crate) fn device(node: &str, major: u32, minor: u32) -> Device {
    Device {
        number: Number { kind: Kind::Char, major, minor },
        identity: Identity { devpath: format!("/devices/{node}"), inode: u64::from(minor) + 100, diskseq: None },
        node: node.into(),
        subsystem: "tty".into(),
        uid: 0,
        gid: 20,
        mode: 0o660,
        properties: BTreeMap::new(),
    }
}

/// A container whose cgroup has this id.
pub(crate) fn holder(cgroup_id: u64) -> Holder {
    Holder {
        id: format!("c{cgroup_id}"),
        name: None,
        pid: cgroup_id as u32,
        start_time: 1,
        cgroup: format!("/c{cgroup_id}"),
        cgroup_id,
        user: 0,
    }
}

pub(crate) fn grant(cgroup: u64, minor: u32, path: u32, access: u32) -> Grant {
    let device = device("/dev/x", 188, minor);
    Grant {
        holder: holder(cgroup),
        device: Granted::from(&device),
        access: Access::from_bits(access),
        node: Node { path: format!("/dev/n{path}"), uid: 0, gid: 20, mode: 0o660, link_to: None },
        origin: Origin::Manual,
        at_start: false,
        exclusive: false,
    }
}

/// The same without a cgroup, of an ordinary user.
fn without_cgroup(number: u64) -> Holder {
    let id = format!("1000@c{number}");
    Holder { id, cgroup: String::new(), cgroup_id: 0, user: 1000, ..holder(number) }
}

type Whose = (u64, String);

fn whose(holder: &Holder) -> Whose {
    let (cgroup, id) = holder.whose();
    (cgroup, id.to_owned())
}

/// What steps change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct World {
    rights: BTreeMap<(u64, Number), Access>,
    nodes: BTreeMap<(Whose, String), Number>,
    marks: BTreeSet<u64>,
    ledger: Vec<Entry>,
}

impl World {
    fn apply(&mut self, step: &Step) {
        if let Step::Mark(holder) | Step::Unmark(holder) | Step::Allow { holder, .. } = step {
            assert!(holder.has_filter(), "nobody has rights in the filter without a cgroup: {step:?}");
        }
        match step {
            Step::Record(entry) => {
                self.ledger.retain(|other| other.left_over.is_none() || !other.grant.is_same(&entry.grant));
                self.ledger.push(entry.clone());
            }
            Step::Leave(entry) => {
                let its = self.ledger.iter_mut().find(|other| other.grant.is_same(&entry.grant));
                *its.expect("it is in force") = entry.leaving();
            }
            Step::Forget(entry) => self.ledger.retain(|other| !other.grant.is_same(&entry.grant)),
            Step::Mark(holder) => assert!(self.marks.insert(holder.cgroup_id), "marked once"),
            Step::Unmark(holder) => assert!(self.marks.remove(&holder.cgroup_id), "unmarked once"),
            Step::Allow { holder, number, before, after } => {
                let key = (holder.cgroup_id, *number);
                assert_eq!(
                    self.rights.get(&key).copied().unwrap_or(Access::NONE),
                    *before,
                    "rights as the plan saw them"
                );
                if after.is_none() {
                    self.rights.remove(&key)
                } else {
                    self.rights.insert(key, *after)
                };
            }
            Step::MakeNode(grant) => {
                let key = (whose(&grant.holder), grant.node.path.clone());
                assert!(self.nodes.insert(key, grant.device.number).is_none(), "no node is overwritten");
            }
            Step::RemoveNode { grant, .. } => {
                self.nodes.remove(&(whose(&grant.holder), grant.node.path.clone()));
            }
        }
    }

    /// Carries out a plan; returns the steps in the order done.
    fn reach(&mut self, desired: &[Grant], unplugged: bool) -> Vec<Step> {
        let mut done = Vec::new();
        for change in changes(desired, &self.ledger.clone(), |_| unplugged) {
            for step in change.steps(self.ledger.clone().iter()) {
                self.apply(&step);
                done.push(step);
            }
            for entry in &mut self.ledger {
                if entry.placement == Placement::Pending {
                    entry.placement = Placement::Ours(Vec::new());
                }
            }
        }
        done
    }

    /// Without the ledger's order.
    fn sorted(mut self) -> World {
        self.ledger.sort_by_key(|entry| format!("{entry:?}"));
        self
    }
}

fn grants() -> impl Strategy<Value = Vec<Grant>> {
    let one = (1u64..6, 0u32..3, 0u32..3, 1u32..8).prop_map(|(cgroup, minor, path, access)| {
        let mut grant = grant(cgroup, minor, path, access);
        // Several of these at once.
        if cgroup > 3 {
            grant.holder = without_cgroup(cgroup);
        }
        // By its path, so that two of these are the same only if they have one origin.
        if path > 0 {
            grant.origin = Origin::Rule("ttyUSB".into());
        }
        grant
    });
    proptest::collection::vec(one, 0..8).prop_map(|mut all| {
        let mut seen = BTreeSet::new();
        all.retain(|grant| seen.insert((whose(&grant.holder), grant.node.path.clone())));
        all
    })
}

proptest! {
    #[test]
    fn any_state_is_reached_from_any_other(first in grants(), second in grants()) {
        let (mut world, mut fresh) = (World::default(), World::default());
        world.reach(&first, false);
        world.reach(&second, false);
        fresh.reach(&second, false);
        prop_assert_eq!(world.clone().sorted(), fresh.sorted());
        prop_assert!(world.reach(&second, false).is_empty(), "a second time there is nothing to do");
        world.reach(&[], false);
        prop_assert_eq!(world, World::default());
    }

    #[test]
    fn steps_then_their_inverses_are_nothing(first in grants(), second in grants(), unplugged in any::<bool>()) {
        let mut world = World::default();
        world.reach(&first, false);
        let before = world.clone();
        for change in changes(&second, &world.ledger.clone(), |_| unplugged).into_iter().take(1) {
            let steps = change.steps(world.ledger.clone().iter());
            for step in &steps { world.apply(step); }
            for step in steps.iter().rev() { world.apply(&step.inverse()); }
        }
        prop_assert_eq!(world.sorted(), before.sorted());
    }
}

#[test]
fn two_nodes_of_one_device_share_the_right_until_the_last_goes() {
    let mut world = World::default();
    let (a, b) = (grant(1, 0, 0, 2), grant(1, 0, 1, 4));
    let number = a.device.number;
    world.reach(&[a.clone(), b.clone()], false);
    assert_eq!(world.rights[&(1, number)], Access::from_bits(6));
    world.reach(&[b], false);
    assert_eq!(world.rights[&(1, number)], Access::WRITE);
    world.reach(&[], false);
    assert!(world.rights.is_empty() && world.marks.is_empty());
}

#[test]
fn a_device_that_comes_back_with_the_same_number_is_another_one() {
    let old = grant(1, 0, 0, 7);
    let mut new = old.clone();
    new.device.identity.inode += 1;
    let entry = Entry { grant: old, placement: Placement::Ours(vec![]), left_over: None };
    let plan = changes(std::slice::from_ref(&new), std::slice::from_ref(&entry), |_| true);
    assert_eq!(plan, [Change::Remove { entry, unplugged: true }, Change::Add(new)]);
}

#[test]
fn a_node_whose_owner_or_mode_changed_on_the_host_is_made_anew() {
    let old = grant(1, 0, 0, 7);
    let mut new = old.clone();
    new.node.mode = 0o600;
    let entry = Entry { grant: old, placement: Placement::Ours(vec![]), left_over: None };
    let plan = changes(std::slice::from_ref(&new), std::slice::from_ref(&entry), |_| false);
    assert_eq!(plan, [Change::Remove { entry, unplugged: false }, Change::Add(new)]);
}

#[test]
fn what_was_left_half_done_is_taken_back_and_done_again() {
    let wanted = grant(1, 0, 0, 7);
    let entry = Entry { grant: wanted.clone(), placement: Placement::Pending, left_over: None };
    let plan = changes(std::slice::from_ref(&wanted), std::slice::from_ref(&entry), |_| false);
    assert_eq!(plan, [Change::Remove { entry, unplugged: false }, Change::Add(wanted)]);
}

#[test]
fn a_node_from_the_containers_start_goes_only_when_its_device_is_unplugged() {
    let mut grant = grant(1, 0, 0, 7);
    grant.origin = Origin::Rule("ttyUSB".into());
    let entry = Entry { grant, placement: Placement::Container, left_over: None };
    for unplugged in [true, false] {
        let steps = Change::Remove { entry: entry.clone(), unplugged }.steps(std::iter::once(&entry));
        assert_eq!(steps.iter().any(|step| matches!(step, Step::RemoveNode { .. })), unplugged);
        // What a person attached has taken no node over, for good or not.
        for origin in [Origin::Manual, Origin::Persist] {
            let mut entry = entry.clone();
            entry.grant.origin = origin;
            let steps = Change::Remove { entry: entry.clone(), unplugged }.steps(std::iter::once(&entry));
            assert!(!steps.iter().any(|step| matches!(step, Step::RemoveNode { .. })));
        }
    }
}
