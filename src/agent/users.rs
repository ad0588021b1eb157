//! The containers of ordinary users, who can have them looked at as often as they like.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use crate::agent::news::What;
use crate::agent::registry::Registry;
use crate::agent::{Compared, reconcile};
use crate::core::container::Container;
use crate::core::ledger::Grant;
use crate::ops::Executor;
use crate::runtime::users;
use crate::sys::cgroup::CgroupRoot;

impl Registry {
    /// Takes in the containers of an ordinary user. Returns the ids of those that have to be looked at.
    pub(super) fn look_at_user(&mut self, cgroups: &CgroupRoot, uid: u32) -> BTreeSet<String> {
        let users::Listing { mut containers, mut is_cut } = users::containers(uid);
        // He can give a process as many names as he likes, one after the other: the first one counts while it runs.
        let known = self.containers.values().map(|known| &known.container).filter(|its| its.user() == Some(uid));
        let run = |its: &Container| (its.pid, its.start_time);
        let mut known: HashMap<_, String> = known.map(|its| (run(its), its.id.clone())).collect();
        containers.retain(|its| match known.get(&run(its)) {
            Some(id) => *id == its.id,
            None if known.len() == users::MOST => {
                is_cut = true;
                false
            }
            None => known.insert(run(its), its.id.clone()).is_none(),
        });
        if is_cut {
            let text = format!("user {uid} has more containers than are looked at: the first {}", users::MOST);
            self.said.once(&format!("{uid}@"), "", text);
        }
        let ids = containers.into_iter().map(|container| (container.id.clone(), self.learn(cgroups, container)));
        ids.filter(|(_, is_new)| *is_new).map(|(id, _)| id).collect()
    }
}

/// What each look at a user's containers leaves to others, as a multiple of what it took.
const LEFT_TO_OTHERS: u32 = 20;

/// Something changed in an ordinary user's runtime directory. He can have that as often as he likes, and make each look
/// long: each takes a twentieth of the time at most.
pub(super) fn changed(executor: &mut Executor, registry: &mut Registry, uid: u32, since: Instant) {
    registry.watched.take_up(uid);
    if !registry.serves(uid) {
        return;
    }
    if let Some(last) = registry.users.get_mut(&uid) {
        // What was there before the last time was found then.
        if since < last.started && !last.is_due {
            return;
        }
        let rest = (last.took * LEFT_TO_OTHERS).saturating_sub(last.started.elapsed());
        if !rest.is_zero() {
            if !std::mem::replace(&mut last.is_due, true) {
                registry.watched.later(rest, What::User(uid));
            }
            return;
        }
    }
    let started = Instant::now();
    let ids = registry.look_at_user(&executor.cgroups, uid);
    reconcile::arrived(executor, registry, &ids, since);
    registry.users.insert(uid, Compared { started, took: started.elapsed(), is_due: false });
}

/// How many grants rules give to the containers of a user, all together: each is a node, and he can ask for one device under
/// as many names as he likes.
const MOST_GRANTS: usize = 512;

/// What of that is granted; `has` says what is in force already.
pub(super) fn bounded(
    executor: &Executor,
    registry: &Registry,
    mut wanted: Vec<Grant>,
    has: impl Fn(&Grant) -> bool,
) -> Vec<Grant> {
    let mut counts: HashMap<u32, usize> = HashMap::new();
    let in_force = |uid: u32| executor.ledger.entries().filter(|entry| entry.grant.holder.user == uid).count();
    wanted.retain(|grant| {
        let uid = grant.holder.user;
        if uid == 0 || has(grant) {
            return true;
        }
        let count = counts.entry(uid).or_insert_with(|| in_force(uid));
        *count += 1;
        if *count > MOST_GRANTS {
            let text = format!("user {uid} has {MOST_GRANTS} grants, and no rule gives more to containers of one user");
            registry.said.once(&format!("{uid}@"), "", text);
        }
        *count <= MOST_GRANTS
    });
    wanted
}
