//! What a container should have: its rules against the devices of the host.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};

use crate::core::device::{Device, Identity, Number};
use crate::core::facts::Facts;
use crate::core::ledger::{Grant, Granted, Holder, Node};
use crate::core::policy::Bounds;
use crate::core::rule::Rule;
use crate::core::selection::Group;

/// A container that asks.
pub struct Asking<'a> {
    /// Who it is.
    pub holder: &'a Holder,
    /// The devices that its specification names.
    pub named: &'a [(Number, String)],
    /// What it asks for.
    pub rules: &'a [Rule],
    /// What it may ask for.
    pub bounds: &'a Bounds,
    /// The number of a group of its own.
    pub group: &'a dyn Fn(&str) -> Option<u32>,
    /// Why the user whose container it is may not open the device himself, in words.
    pub own_refusal: &'a dyn Fn(&Device) -> Option<String>,
}

/// A device that a container asks for and does not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Path of the device's node on the host.
    pub device: String,
    /// The rule that asks for it.
    pub rule: String,
    /// Why not, in words.
    pub reason: String,
}

impl Asking<'_> {
    /// Adds the grants that its rules ask for on this device: one a path, by the first rule that wants it.
    pub fn desired(&self, facts: &Facts<'_>, grants: &mut Vec<Grant>, refused: &mut Vec<Refused>) {
        let (device, first) = (facts.device, grants.len());
        // The same for all of them, and a policy may be long.
        let refusal = OnceCell::new();
        for rule in self.rules {
            let Some(how) = rule.matches(facts) else { continue };
            let refusal = || refusal.get_or_init(|| self.refusal(facts)).clone();
            let (bounded, gid) = (rule.is_bounded().then(refusal).flatten(), self.gid(rule));
            let gid = match (bounded, gid) {
                (None, Ok(gid)) => gid,
                (Some(reason), _) | (None, Err(reason)) => {
                    refused.push(Refused { device: device.node.clone(), rule: rule.to_string(), reason });
                    continue;
                }
            };
            for node in rule.nodes(device, how, gid) {
                if grants[first..].iter().all(|grant| grant.node.path != node.path) {
                    grants.push(self.grant(facts, rule, node));
                }
            }
        }
    }

    /// Why it may not ask for the device, in words. A user's may ask for what he may open himself, or for what a policy
    /// gives him by name.
    fn refusal(&self, facts: &Facts<'_>) -> Option<String> {
        let user = Some(self.holder.user).filter(|user| *user != 0);
        let is_given = |user| self.bounds.gives(user, facts);
        let own = || user.filter(|user| !is_given(*user)).and_then(|_| (self.own_refusal)(facts.device));
        self.bounds.refusal(facts).or_else(own)
    }

    fn grant(&self, facts: &Facts<'_>, rule: &Rule, node: Node) -> Grant {
        Grant {
            holder: self.holder.clone(),
            device: Granted::from(facts.device),
            access: rule.access(),
            node,
            origin: rule.origin(),
            at_start: self.named.iter().any(|(number, _)| *number == facts.device.number),
            exclusive: rule.is_exclusive(),
        }
    }

    fn gid(&self, rule: &Rule) -> Result<Option<u32>, String> {
        match rule.group() {
            None => Ok(None),
            Some(Group::Number(gid)) => Ok(Some(*gid)),
            Some(Group::Name(name)) => match (self.group)(name) {
                Some(gid) => Ok(Some(gid)),
                None => Err(format!("its /etc/group has no group '{name}'")),
            },
        }
    }
}

/// A grant that another one stands in the way of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// What is not granted.
    pub grant: Grant,
    /// What stands in the way; `None` where it goes with a grant that is lost itself, as a link with its node.
    pub to: Option<Grant>,
}

/// Settles who gets what only one can have: a path in a container, and a device that somebody wants exclusively. What is
/// `in_force` stays; root's containers come before those of users; then counts who `has` it already; then what a container has from its start; then the container that
/// started first; then the order in which the devices are given.
pub fn settle(desired: Vec<Grant>, in_force: &[Grant], has: impl Fn(&Grant) -> bool) -> (Vec<Grant>, Vec<Lost>) {
    let mut order: Vec<usize> = (0..desired.len()).collect();
    order.sort_by_cached_key(|at| {
        let grant = &desired[*at];
        let holder = &grant.holder;
        let is_users = holder.user != 0;
        (
            grant.node.link_to.is_some(),
            is_users,
            !has(grant),
            !grant.at_start,
            holder.start_time,
            holder.id.clone(),
            *at,
        )
    });
    let mut places = Places::default();
    in_force.iter().for_each(|grant| places.take(grant));
    let mut losses: HashMap<usize, Option<&Grant>> = HashMap::new();
    for at in order {
        let grant = &desired[at];
        let is_link_to_nothing = grant.node.link_to.as_deref().is_some_and(|to| !places.is_own(grant, to));
        match places.in_the_way_of(grant) {
            Some(other) => drop(losses.insert(at, Some(other))),
            None if is_link_to_nothing => drop(losses.insert(at, None)),
            None => places.take(grant),
        }
    }
    let lost = losses.iter().map(|(at, to)| Lost { grant: desired[*at].clone(), to: to.cloned() });
    let (mut lost, gone): (Vec<Lost>, HashSet<usize>) = (lost.collect(), losses.into_keys().collect());
    lost.sort_by(|a, b| (&a.grant.holder.id, &a.grant.node.path).cmp(&(&b.grant.holder.id, &b.grant.node.path)));
    let kept = desired.into_iter().enumerate().filter(|(at, _)| !gone.contains(at)).map(|(_, grant)| grant);
    (kept.collect(), lost)
}

/// What is taken.
#[derive(Default)]
struct Places<'a> {
    /// By whose it is and the path inside.
    paths: HashMap<((u64, &'a str), &'a str), &'a Grant>,
    devices: HashMap<&'a Identity, Vec<&'a Grant>>,
    /// Those of them that want their device alone.
    alone: HashMap<&'a Identity, Vec<&'a Grant>>,
}

impl<'a> Places<'a> {
    fn take(&mut self, grant: &'a Grant) {
        self.paths.entry((grant.holder.whose(), &grant.node.path)).or_insert(grant);
        let note = |all: &mut HashMap<&'a Identity, Vec<&'a Grant>>| {
            let others = all.entry(&grant.device.identity).or_default();
            // One a container is enough; most come one after the other.
            if !others.iter().rev().any(|other| other.holder.is_same_run(&grant.holder)) {
                others.push(grant);
            }
        };
        note(&mut self.devices);
        if grant.exclusive {
            note(&mut self.alone);
        }
    }

    fn in_the_way_of(&self, grant: &Grant) -> Option<&'a Grant> {
        let at_path = self.paths.get(&(grant.holder.whose(), grant.node.path.as_str()));
        let in_question = if grant.exclusive { &self.devices } else { &self.alone };
        let of_device = in_question.get(&grant.device.identity).into_iter().flatten();
        let user = grant.holder.user;
        // A user keeps nobody but himself from a device, and root from nothing.
        let counts = |other: &&&Grant| match other.holder.user {
            0 => true,
            its => its == user || user != 0 && grant.exclusive,
        };
        let mut alone = of_device.filter(counts).filter(|other| !other.holder.is_same_run(&grant.holder));
        at_path.filter(|other| other.device.identity != grant.device.identity).or_else(|| alone.next()).copied()
    }

    /// Whether the path is taken by the grant's own device.
    fn is_own(&self, grant: &Grant, path: &str) -> bool {
        let other = self.paths.get(&(grant.holder.whose(), path));
        other.is_some_and(|other| other.device.identity == grant.device.identity)
    }
}

impl Lost {
    /// Why it is not granted, in words; `None` where nothing needs to be said.
    pub fn reason(&self) -> Option<String> {
        let other = self.to.as_ref()?;
        let device = &other.device.node;
        Some(match other.holder.is_same_run(&self.grant.holder) {
            true => format!("{} is {device} there, until that is unplugged or detached", other.node.path),
            false => format!("container {} has it, and only one may: it is free when that ends", other.holder.label()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::annotation::rules;
    use crate::core::category::Categories;
    use crate::core::device::{Device, Kind};
    use crate::core::facts::tests::Tree;
    use crate::core::plan::tests::{device, holder};
    use crate::core::policy::Subject;
    use crate::core::settings::Settings;

    fn desired(cgroup: u64, asked: &[(&str, &str)], devices: &[Device]) -> (Vec<Grant>, Vec<Refused>) {
        let (rules, ignored) = rules(asked.iter().copied(), &Categories::default());
        assert_eq!(ignored, []);
        let named = [(devices[0].number, String::new())];
        let (holder, bounds) = (holder(cgroup), Bounds::default());
        let group = |name: &str| (name == "dialout").then_some(20);
        let asking = Asking {
            holder: &holder,
            named: &named,
            rules: &rules,
            bounds: &bounds,
            group: &group,
            own_refusal: &|_| None,
        };
        let (mut grants, mut refused) = (Vec::new(), Vec::new());
        devices
            .iter()
            .for_each(|device| asking.desired(&Facts::new(device, &Tree::default()), &mut grants, &mut refused));
        (grants, refused)
    }

    #[test]
    fn a_user_gets_what_he_may_open_or_a_policy_gives_him() {
        let asked = [("org.containers.qm.device.ttyUSB", "true")];
        let (rules, _) = rules(asked, &Categories::default());
        let device = device("/dev/ttyUSB0", 188, 0);
        let ask = |user: u32, config: &str, may: bool| {
            let subject = Subject { owner: user, names: vec!["alice@web".into()], ..Subject::default() };
            let bounds = Settings::read(&[("x".into(), Ok(config.into()))]).0.policies.bounds(&subject);
            let holder = Holder { user, ..holder(0) };
            let own_refusal = |_: &Device| (!may).then(|| "not his".to_owned());
            let group = |_: &str| None;
            let asking = Asking {
                holder: &holder,
                named: &[],
                rules: &rules,
                bounds: &bounds,
                group: &group,
                own_refusal: &own_refusal,
            };
            let (mut grants, mut refused) = (Vec::new(), Vec::new());
            asking.desired(&Facts::new(&device, &Tree::default()), &mut grants, &mut refused);
            (grants.len(), refused.first().map(|refused| refused.reason.clone()))
        };
        let not_his = Some("not his".to_owned());
        assert_eq!(ask(1000, "", true), (1, None));
        assert_eq!(ask(1000, "", false), (0, not_his.clone()));
        assert_eq!(ask(0, "", false), (1, None), "root's containers are asked nothing");
        assert_eq!(ask(1000, "[[policy]]\nowner = 1000\nallow = ['ttyUSB']", false), (1, None));
        for policy in ["owner = 1001\nallow = ['ttyUSB']", "allow = ['ttyUSB']", "container = '*'\nallow = ['ttyUSB']"]
        {
            assert_eq!(ask(1000, &format!("[[policy]]\n{policy}"), false), (0, not_his.clone()), "{policy}");
        }
        for policy in ["owner = 1000\nallow = ['audio']", "container = '*'\ndeny = ['ttyUSB']"] {
            let reason = ask(1000, &format!("[[policy]]\n{policy}"), true).1.unwrap();
            assert!(reason.contains("policy"), "{policy}: {reason}");
        }
        let both = "[[policy]]\nowner = 1000\nallow = ['ttyUSB']\n[[policy]]\ndeny = ['tty']";
        assert!(ask(1000, both, true).1.unwrap().contains("denies"));
    }

    fn paths(grants: &[Grant]) -> Vec<(&str, &str)> {
        grants.iter().map(|grant| (grant.device.node.as_str(), grant.node.path.as_str())).collect()
    }

    #[test]
    fn each_device_once_with_the_hosts_owner_and_mode() {
        let asked = [("org.containers.qm.device.ttyUSB", "true"), ("org.containers.qm.device.input", "1")];
        let devices = [device("/dev/ttyUSB0", 188, 0), device("/dev/ttyUSB10", 188, 10), device("/dev/video0", 81, 0)];
        let (grants, _) = desired(1, &asked, &devices);
        assert_eq!(paths(&grants), [("/dev/ttyUSB0", "/dev/ttyUSB0"), ("/dev/ttyUSB10", "/dev/ttyUSB10")]);
        assert_eq!((grants[0].node.gid, grants[0].node.mode), (20, 0o660));
        assert_eq!(grants[0].origin, crate::core::ledger::Origin::Rule("ttyUSB".into()));
        assert_eq!(grants.iter().map(|grant| grant.at_start).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_block_device_is_in_no_category_and_in_no_selector() {
        let asked = [("org.containers.qm.device.video", "true"), ("org.containers.qm.hotplug.x", "devname=*")];
        let mut device = device("/dev/video0", 81, 0);
        device.number.kind = Kind::Block;
        assert_eq!(desired(1, &asked, &[device]), (vec![], vec![]));
    }

    #[test]
    fn a_device_gets_a_node_for_each_rule_and_links() {
        let asked = [
            ("org.containers.qm.device.ttyUSB", "true"),
            ("org.containers.qm.hotplug.stick", "ttyUSB,as=/dev/stick,link=/dev/s1,access=rw,mode=0600,gid=dialout"),
            ("org.containers.qm.hotplug.other", "ttyUSB,gid=nobody"),
        ];
        let (grants, refused) = desired(1, &asked, &[device("/dev/ttyUSB0", 188, 0)]);
        let found =
            grants.iter().map(|grant| (grant.node.path.as_str(), grant.node.link_to.as_deref(), grant.node.mode));
        assert_eq!(
            found.collect::<Vec<_>>(),
            [("/dev/stick", None, 0o600), ("/dev/s1", Some("/dev/stick"), 0o600), ("/dev/ttyUSB0", None, 0o660)]
        );
        assert_eq!(grants[0].access.to_string(), "rw");
        assert_eq!((refused.len(), &*refused[0].reason), (1, "its /etc/group has no group 'nobody'"));
    }

    #[test]
    fn of_two_devices_for_one_path_the_one_that_has_it_keeps_it() {
        let asked = [("org.containers.qm.hotplug.stick", "ttyUSB,as=/dev/stick,link=/dev/s1")];
        let devices = [device("/dev/ttyUSB0", 188, 0), device("/dev/ttyUSB1", 188, 1)];
        let (mut grants, _) = desired(1, &asked, &devices);
        grants.iter_mut().for_each(|grant| grant.at_start = false);
        let (kept, lost) = settle(grants.clone(), &[], |_| false);
        assert_eq!(paths(&kept), [("/dev/ttyUSB0", "/dev/stick"), ("/dev/ttyUSB0", "/dev/s1")]);
        assert_eq!(
            lost.iter().filter_map(Lost::reason).next().unwrap(),
            "/dev/s1 is /dev/ttyUSB0 there, until that is unplugged or detached"
        );
        let (kept, _) = settle(grants.clone(), &[], |grant| grant.device.node == "/dev/ttyUSB1");
        assert_eq!(paths(&kept), [("/dev/ttyUSB1", "/dev/stick"), ("/dev/ttyUSB1", "/dev/s1")]);
        let (kept, lost) = settle(grants[2..].to_vec(), &grants[..2], |_| false);
        assert_eq!((kept, lost.len()), (vec![], 2));
    }

    #[test]
    fn a_user_keeps_nobody_else_from_a_device() {
        let exclusive = [("org.containers.qm.hotplug.stick", "ttyUSB,exclusive")];
        let shared = [("org.containers.qm.device.ttyUSB", "true")];
        let devices = [device("/dev/ttyUSB0", 188, 0)];
        let of = |user: u32, id: &str, asked: &[(&str, &str)]| {
            let mut grants = desired(0, asked, &devices).0;
            grants.iter_mut().for_each(|grant| (grant.holder.user, grant.holder.id) = (user, id.into()));
            grants
        };
        let kept = |all: &[&[Grant]]| -> Vec<String> {
            let kept = settle(all.concat(), &[], |_| false).0;
            kept.into_iter().map(|grant| grant.holder.id).collect()
        };
        // Without cgroups they share neither path nor right.
        assert_eq!(kept(&[&of(1, "1@a", &shared), &of(1, "1@b", &shared)]), ["1@a", "1@b"]);
        assert_eq!(kept(&[&of(1, "1@a", &exclusive), &of(1, "1@b", &shared)]), ["1@a"]);
        assert_eq!(kept(&[&of(1, "1@a", &exclusive), &of(0, "root", &shared)]), ["root"]);
        assert_eq!(kept(&[&of(1, "1@a", &shared), &of(0, "root", &exclusive)]), ["root"]);
        assert_eq!(kept(&[&of(1, "1@a", &exclusive), &of(2, "2@b", &shared)]), ["1@a", "2@b"]);
        assert_eq!(settle(of(0, "root", &shared), &of(1, "1@a", &exclusive), |_| false).0.len(), 1);
    }

    #[test]
    fn a_device_that_is_wanted_alone_goes_to_the_first() {
        let asked = [("org.containers.qm.hotplug.stick", "ttyUSB,exclusive")];
        let shared = [("org.containers.qm.device.ttyUSB", "true")];
        let devices = [device("/dev/ttyUSB0", 188, 0)];
        let both = |first: &[(&str, &str)], second: &[(&str, &str)]| {
            let (mut grants, _) = desired(1, first, &devices);
            grants.extend(desired(2, second, &devices).0);
            grants
        };
        let ids = |grants: &[Grant]| grants.iter().map(|grant| grant.holder.id.clone()).collect::<Vec<_>>();
        for (first, second) in [(&asked, &asked), (&asked, &shared), (&shared, &asked)] {
            let (kept, lost) = settle(both(first, second), &[], |_| false);
            assert_eq!(ids(&kept), ["c1"]);
            assert!(lost[0].reason().unwrap().contains("container c1 has it"), "{lost:?}");
            let (kept, _) = settle(both(first, second), &[], |grant| grant.holder.id == "c2");
            assert_eq!(ids(&kept), ["c2"]);
        }
        assert_eq!(settle(both(&shared, &shared), &[], |_| false).0.len(), 2);
    }
}
