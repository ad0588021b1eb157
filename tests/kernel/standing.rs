//! The filter at the cgroup root as a whole: who else is there, hand-over between builds, and its end.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use qm_hotplug::core::device::Access;
use qm_hotplug::core::filter_program::{self, LIFT_PREFIX};
use qm_hotplug::sys::bpf::Program;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::{DeviceFilter, Standing};
use rustix::io::Errno;

use crate::actor::Actor;
use crate::stage::{ABSENT, NULL, Nodes, Stage, ZERO, programs, refuse_only};
use crate::support;

const REFUSED: Result<(), Errno> = Err(Errno::PERM);
const NO_DRIVER: Result<(), Errno> = Err(Errno::NXIO);

pub const TESTS: &[(&str, fn())] = &[
    ("standing::opening_twice_takes_over", opening_twice_takes_over),
    ("standing::existing_is_there_only_after_open", existing_is_there_only_after_open),
    ("standing::a_foreign_program_after_ours_wins_and_is_named", a_foreign_program_after_ours_wins),
    ("standing::a_foreign_program_before_ours_is_no_matter", a_foreign_program_before_ours_is_no_matter),
    ("standing::a_hand_over_does_not_jump_over_a_foreign_program", a_hand_over_does_not_jump),
    ("standing::hand_over_between_two_builds_while_opening", hand_over_between_two_builds),
    ("standing::what_a_killed_hand_over_left_is_cleared", what_a_killed_hand_over_left_is_cleared),
    ("standing::release_leaves_nothing", release_leaves_nothing),
];

/// A program at the root that refuses [`ABSENT`], which nobody else opens; it goes when dropped.
struct Foreign(Program);

impl Foreign {
    fn attach(name: &str) -> Foreign {
        let program = refuse_only(name, ABSENT);
        program.attach(CgroupRoot::find().unwrap().as_fd()).unwrap();
        Foreign(program)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.0.detach(CgroupRoot::find().unwrap().as_fd()).unwrap();
    }
}

fn ours() -> Vec<(u32, String)> {
    let root = CgroupRoot::find().unwrap();
    programs(root.as_fd()).into_iter().filter(|(_, name)| name.starts_with(LIFT_PREFIX)).collect()
}

fn opening_twice_takes_over() {
    let stage = Stage::new();
    stage.filter.set(7, NULL, Access::READ).unwrap();
    let before = ours();
    assert_eq!(before.len(), 1);
    assert_eq!(before[0].1, filter_program::lift_name(false));
    let again = DeviceFilter::open(&stage.root).unwrap();
    assert_eq!(ours(), before, "the very same program");
    assert_eq!(again.get(7, NULL).unwrap(), Access::READ);
    again.set(7, NULL, Access::NONE).unwrap();
    assert_eq!(stage.filter.entries().unwrap(), [], "both have one map");
}

fn existing_is_there_only_after_open() {
    let root = CgroupRoot::find().unwrap();
    assert!(DeviceFilter::existing(&root).unwrap().is_none());
    assert_eq!(ours(), [], "a look attaches nothing");
    assert_eq!(
        DeviceFilter::standing(&root).unwrap(),
        Standing { attached: false, after: vec![], entries: 0, withdrawn: 0 }
    );
    let stage = Stage::new();
    stage.filter.set(7, NULL, Access::READ).unwrap();
    // The filter outlives the one who made it.
    drop(stage);
    let existing = DeviceFilter::existing(&root).unwrap().expect("it stays attached");
    assert_eq!(existing.get(7, NULL).unwrap(), Access::READ);
    assert_eq!(
        DeviceFilter::standing(&root).unwrap(),
        Standing { attached: true, after: vec![], entries: 1, withdrawn: 0 }
    );
}

fn a_foreign_program_after_ours_wins() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let absent = stage.nodes.node(ABSENT);
    stage.filter.set(cgroup.id(), ABSENT, Access::ALL).unwrap();
    assert_eq!(actor.open("r", &absent), NO_DRIVER);
    assert_eq!(status("filter"), "override");
    let foreign = Foreign::attach("guard");
    let nameless = Foreign::attach("");
    assert_eq!(actor.open("r", &absent), REFUSED);
    let standing = DeviceFilter::standing(&stage.root).unwrap();
    assert_eq!(
        standing,
        Standing { attached: true, after: vec!["guard".into(), "(no name)".into()], entries: 1, withdrawn: 0 }
    );
    assert_eq!(status("filter"), "degraded");
    let text = support::qm(&["status"]).ok();
    assert!(text.contains("guard") && text.contains("degraded"), "{text}");
    drop((foreign, nameless));
    assert_eq!(status("filter"), "override");
    assert_eq!(actor.open("r", &absent), NO_DRIVER);
}

fn status(field: &str) -> String {
    let status: serde_json::Value = serde_json::from_str(&support::qm(&["status", "--json"]).ok()).unwrap();
    status[field].as_str().unwrap().to_owned()
}

fn a_foreign_program_before_ours_is_no_matter() {
    let nodes = Nodes::new();
    let absent = nodes.node(ABSENT);
    let _foreign = Foreign::attach("early");
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    stage.filter.set(cgroup.id(), ABSENT, Access::ALL).unwrap();
    assert_eq!(DeviceFilter::standing(&stage.root).unwrap().after, [""; 0]);
    assert_eq!(actor.open("r", &absent), NO_DRIVER);
    assert_eq!(Actor::start(None).open("r", &absent), REFUSED, "for all others it holds");
}

fn a_hand_over_does_not_jump() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let absent = stage.nodes.node(ABSENT);
    stage.filter.set(cgroup.id(), ABSENT, Access::ALL).unwrap();
    let _foreign = Foreign::attach("guard");
    for name in ["qmhp_lift1_aaaa", "qmhp_lift1_bbbb"] {
        DeviceFilter::open_as(&stage.root, |_| name).unwrap();
        assert_eq!(ours().len(), 1);
        assert_eq!(DeviceFilter::standing(&stage.root).unwrap().after, ["guard"]);
        assert_eq!(actor.open("r", &absent), REFUSED, "the one who came later has the last word");
    }
}

fn hand_over_between_two_builds() {
    let stage = Stage::new();
    let (cgroup, mut granted) = stage.denied("a");
    let nested = cgroup.child("nested");
    let denying = cgroup.child("denying");
    denying.attach(&crate::stage::deny_all());
    stage.filter.set(cgroup.id(), NULL, Access::ALL).unwrap();
    let entries = stage.filter.entries().unwrap();
    let null = stage.nodes.node(NULL);
    let (mut below, mut refused, mut ungranted) = (nested.actor(), denying.actor(), cgroup.actor());
    granted.hammer("rw", &null);
    below.hammer("rw", &null);
    refused.hammer("rw", &null);
    ungranted.hammer("rw", stage.nodes.node(ZERO));
    let mut ids = BTreeSet::new();
    for round in 0..200 {
        let name = ["qmhp_lift1_aaaa", "qmhp_lift1_bbbb"][round % 2];
        let filter = DeviceFilter::open_as(&stage.root, |_| name).unwrap();
        assert_eq!(filter.entries().unwrap(), entries);
        let now = ours();
        assert_eq!(now.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), [name]);
        ids.insert(now[0].0);
    }
    assert_eq!(ids.len(), 200, "each was a new program");
    granted.stop()[0].always(Ok(()));
    below.stop()[0].always(Ok(()));
    refused.stop()[0].always(REFUSED);
    ungranted.stop()[0].always(REFUSED);
    assert!(stage.filter.is_marked(&cgroup.open()).unwrap());
}

/// A process that was killed between attaching the new version and detaching the old one.
fn what_a_killed_hand_over_left_is_cleared() {
    let stage = Stage::new();
    stage.filter.set(7, NULL, Access::READ).unwrap();
    for name in ["qmhp_lift0_old0", "qmhp_lift1_old1"] {
        Program::load(name, &filter_program::allow()).unwrap().attach(stage.root.as_fd()).unwrap();
    }
    assert_eq!(ours().len(), 3);
    let filter = DeviceFilter::open(&stage.root).unwrap();
    assert_eq!(filter.get(7, NULL).unwrap(), Access::READ);
    assert_eq!(ours().iter().map(|(_, name)| name.clone()).collect::<Vec<_>>(), [filter_program::lift_name(false)]);
}

fn release_leaves_nothing() {
    let stage = Stage::new();
    let (outer, mut actor) = stage.denied("outer");
    let nested = outer.child("nested");
    nested.attach(&crate::stage::deny_all());
    stage.filter.mark(&nested.open()).unwrap();
    let null = stage.nodes.node(NULL);
    stage.filter.set(outer.id(), NULL, Access::ALL).unwrap();
    assert_eq!(actor.open("r", &null), Ok(()));
    let foreign = Foreign::attach("guard");
    DeviceFilter::release(&stage.root).unwrap();
    support::assert_nothing_left();
    assert_eq!(actor.open("r", &null), REFUSED, "the container's own filter is as before");
    assert_eq!((outer.programs().len(), nested.programs().len()), (1, 1));
    assert!(programs(stage.root.as_fd()).iter().any(|(_, name)| name == "guard"), "others' programs stay");
    drop(foreign);
    DeviceFilter::release(&stage.root).expect("where nothing is, nothing is to do");
}
