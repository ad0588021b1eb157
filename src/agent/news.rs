//! What the agent hears of, and what of it counts.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

use crate::core::device::Device;
use crate::core::mirror::Told;
use crate::core::uevent::Uevent;
use crate::runtime::places::Place;

/// How much of what udevd tells of one device at a time is kept.
const MOST_TOLD: usize = 1024;

/// Something happened.
#[derive(Debug)]
pub(super) struct News {
    /// When it was read.
    pub(super) at: Instant,
    /// What it is.
    pub(super) what: What,
}

/// What happened.
#[derive(Debug)]
pub(super) enum What {
    /// A device is there, its node has its final owner and mode; and what udevd told of it, in order.
    Plugged(Box<Device>, Vec<Told>),
    /// A device is there, and udev has not spoken yet. Told only where a container has a udevd of its own.
    Appeared(Box<Device>),
    /// A device is gone.
    Unplugged(Uevent),
    /// Events were lost: compare everything.
    Lost,
    /// What is at a container's place appeared or changed, or is to be looked at again since it was starting then.
    State(Place, Option<Instant>),
    /// Something changed in the runtime directory of an ordinary user.
    User(u32),
    /// Somebody wrote to the cgroup of the container with this id.
    Cgroup(String),
    /// The process with this token ended.
    Exited(u64),
    /// Refusals are in the ring.
    Refused,
}

/// Leaves out what is over: events of a device with its number, a cgroup or a container's state that a later one follows,
/// and all losses but the last, after which everything is compared. Whatever took a device's place is another one by its
/// identity, so its last event takes back what the ones before had left. What udevd told of a device that stays is kept.
pub(super) fn newest(mut all: Vec<News>) -> Vec<News> {
    let (mut devices, mut cgroups, mut places, mut is_lost) = (HashMap::new(), HashSet::new(), HashSet::new(), false);
    let mut users = HashSet::new();
    let mut kept: Vec<News> = Vec::with_capacity(all.len());
    while let Some(news) = all.pop() {
        let counts = match &news.what {
            What::Plugged(device, told) => match devices.entry((device.identity.devpath.clone(), device.number)) {
                Entry::Vacant(entry) => {
                    entry.insert(Some(kept.len()));
                    true
                }
                Entry::Occupied(entry) => {
                    if let Some(What::Plugged(_, later)) = entry.get().map(|at| &mut kept[at].what)
                        && later.len() < MOST_TOLD
                    {
                        later.splice(..0, told.iter().copied());
                    }
                    false
                }
            },
            What::Appeared(device) => !devices.contains_key(&(device.identity.devpath.clone(), device.number)),
            What::Unplugged(event) => match devices.entry((event.devpath.clone(), event.number)) {
                Entry::Vacant(entry) => {
                    entry.insert(None);
                    true
                }
                // What was told before was told of another one.
                Entry::Occupied(mut entry) => {
                    entry.insert(None);
                    false
                }
            },
            What::Cgroup(id) => cgroups.insert(id.clone()),
            What::State(place, None) => places.insert(place.path.clone()),
            What::User(uid) => users.insert(*uid),
            What::Lost => !std::mem::replace(&mut is_lost, true),
            _ => true,
        };
        if counts {
            kept.push(news);
        }
    }
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::plan::tests::device;
    use crate::core::uevent::Action;

    #[test]
    fn of_what_has_happened_the_last_counts() {
        let told = |sequence| Told { action: "change", sequence, of_whole: false };
        let plugged = |minor| What::Plugged(Box::new(device("/dev/x", 189, minor)), vec![told(1)]);
        let again = |all: &[u64]| {
            let told = all.iter().map(|sequence| told(*sequence)).collect();
            What::Plugged(Box::new(device("/dev/x", 189, 5)), told)
        };
        let unplugged = |minor| {
            let device = device("/dev/x", 189, minor);
            let (devpath, number, node) = (device.identity.devpath, device.number, device.node);
            What::Unplugged(Uevent { action: Action::Remove, devpath, number, node, subsystem: "usb".into() })
        };
        let cgroup = |id: &str| What::Cgroup(id.into());
        let all = [
            plugged(4),
            cgroup("a"),
            unplugged(4),
            What::Lost,
            plugged(4),
            cgroup("b"),
            What::Exited(1),
            unplugged(4),
            plugged(5),
            again(&[2]),
            cgroup("a"),
            again(&[3]),
            What::Lost,
            What::Exited(1),
        ];
        let at = Instant::now();
        let kept = newest(all.into_iter().map(|what| News { at, what }).collect());
        let kept: Vec<String> = kept.iter().map(|news| format!("{:?}", news.what)).collect();
        // A device that came back with another number: the old one's removal is not forgotten.
        let expected =
            [cgroup("b"), What::Exited(1), unplugged(4), cgroup("a"), again(&[1, 2, 3]), What::Lost, What::Exited(1)];
        assert_eq!(kept, expected.map(|what| format!("{what:?}")));
    }
}
