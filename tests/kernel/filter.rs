//! The device filter: what a grant opens, and all that it does not open.

use std::os::fd::AsFd;

use qm_hotplug::core::device::{Access, Number};
use qm_hotplug::core::filter_program::lift_name;
use qm_hotplug::core::ledger::Withdrawal;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::{DeviceFilter, Entry};
use rustix::io::Errno;

use crate::actor::Actor;
use crate::stage::{ABSENT, Chain, FULL, NULL, Stage, TestCgroup, ZERO, block_device, char_device, deny_all, programs};

const REFUSED: Result<(), Errno> = Err(Errno::PERM);
/// Passed the filter and found no driver.
const NO_DRIVER: Result<(), Errno> = Err(Errno::NXIO);

pub const TESTS: &[(&str, fn())] = &[
    ("filter::a_grant_opens_and_its_end_closes", a_grant_opens_and_its_end_closes),
    ("filter::access_is_exact", access_is_exact),
    ("filter::kind_and_numbers_are_told_apart", kind_and_numbers_are_told_apart),
    ("filter::other_cgroups_stay_as_they_were", other_cgroups_stay_as_they_were),
    ("filter::the_host_stays_as_it_was", the_host_stays_as_it_was),
    ("filter::a_right_held_anyway_is_not_taken", a_right_held_anyway_is_not_taken),
    (
        "filter::level_31_is_reached_and_level_32_is_known_as_too_deep",
        level_31_is_reached_and_level_32_is_known_as_too_deep,
    ),
    ("filter::a_withdrawal_closes_what_the_runtime_allows", a_withdrawal_closes_what_the_runtime_allows),
    ("filter::the_form_changes_while_opening", the_form_changes_while_opening),
    ("filter::entries_are_listed", entries_are_listed),
    ("filter::a_full_map_is_doubled_while_in_use", a_full_map_is_doubled),
];

fn a_grant_opens_and_its_end_closes() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let (null, zero) = (stage.nodes.node(NULL), stage.nodes.node(ZERO));
    assert_eq!(actor.open("rw", &null), REFUSED);
    stage.filter.set(cgroup.id(), NULL, Access::ALL).unwrap();
    for how in ["r", "w", "rw"] {
        assert_eq!(actor.open(how, &null), Ok(()), "{how}");
    }
    assert_eq!(actor.open("r", &zero), REFUSED, "another device");
    stage.filter.set(cgroup.id(), NULL, Access::NONE).unwrap();
    assert_eq!(actor.open("r", &null), REFUSED);
    assert_eq!(stage.filter.entries().unwrap(), []);
}

fn access_is_exact() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let null = stage.nodes.node(NULL);
    for bits in 0..8 {
        let access = Access::from_bits(bits);
        stage.filter.set(cgroup.id(), NULL, access).unwrap();
        assert_eq!(stage.filter.get(cgroup.id(), NULL).unwrap(), access);
        let expect = |letters: &str| {
            if letters.chars().all(|letter| access.to_string().contains(letter)) { Ok(()) } else { REFUSED }
        };
        for how in ["r", "w", "rw"] {
            assert_eq!(actor.open(how, &null), expect(how), "{how} with {access}");
        }
        assert_eq!(actor.mknod(NULL, stage.nodes.free()), expect("m"), "mknod with {access}");
    }
}

fn kind_and_numbers_are_told_apart() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let all = [
        ABSENT,
        block_device(ABSENT.major, ABSENT.minor),
        char_device(ABSENT.major, ABSENT.minor + 1),
        char_device(ABSENT.major + 1, ABSENT.minor),
        char_device(ABSENT.major, 0),
        block_device(ABSENT.major, 0),
    ];
    for granted in all {
        stage.filter.set(cgroup.id(), granted, Access::ALL).unwrap();
        for other in all {
            let expected = if other == granted { NO_DRIVER } else { REFUSED };
            assert_eq!(actor.open("r", stage.nodes.node(other)), expected, "{other} when {granted} is granted");
        }
        stage.filter.set(cgroup.id(), granted, Access::NONE).unwrap();
    }
}

fn other_cgroups_stay_as_they_were() {
    let stage = Stage::new();
    let null = stage.nodes.node(NULL);
    // The parent has a filter too, as a scope has that systemd made.
    let parent = TestCgroup::new("parent");
    parent.attach(&deny_all());
    let granted = parent.child("granted");
    let sibling = parent.child("sibling");
    sibling.attach(&deny_all());
    let bare = parent.child("bare");
    let before = [&parent, &sibling, &bare].map(TestCgroup::programs);

    stage.filter.mark(&granted.open()).unwrap();
    stage.filter.set(granted.id(), NULL, Access::ALL).unwrap();
    assert_eq!(granted.actor().open("rw", &null), Ok(()), "the grant reaches past the parent's filter");
    for other in [&parent, &sibling, &bare] {
        assert_eq!(other.actor().open("rw", &null), REFUSED, "{}", other.path);
    }
    assert_eq!([&parent, &sibling, &bare].map(TestCgroup::programs), before);
}

fn the_host_stays_as_it_was() {
    let root = CgroupRoot::find().unwrap();
    let before = programs(root.as_fd());
    {
        let stage = Stage::new();
        let (cgroup, mut actor) = stage.denied("a");
        let (null, absent) = (stage.nodes.node(NULL), stage.nodes.node(ABSENT));
        let outside = |path: &std::path::Path| Actor::start(None).open("rw", path);
        assert_eq!((outside(&null), outside(&absent)), (Ok(()), NO_DRIVER));
        stage.filter.set(cgroup.id(), NULL, Access::READ).unwrap();
        assert_eq!(actor.open("r", &null), Ok(()));
        assert_eq!((outside(&null), outside(&absent)), (Ok(()), NO_DRIVER), "a narrow grant narrows nobody else");
        let (ours, others): (Vec<_>, Vec<_>) =
            programs(root.as_fd()).into_iter().partition(|(_, name)| name.starts_with("qmhp"));
        assert_eq!((ours.len(), others), (1, before.clone()));
    }
    DeviceFilter::release(&root).unwrap();
    assert_eq!(programs(root.as_fd()), before);
}

/// What programs of others allow is withdrawn from the cgroup and what is below it, from nobody else, and comes back.
fn a_withdrawal_closes_what_the_runtime_allows() {
    let mut stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    cgroup.attach(&crate::stage::allow_only(NULL));
    let (nested, other) = (cgroup.child("nested"), TestCgroup::new("other"));
    let (mut actor, mut below, mut outside) = (cgroup.actor(), nested.actor(), other.actor());
    let null = stage.nodes.node(NULL);
    let names = || programs(CgroupRoot::find().unwrap().as_fd()).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    let (reads, plain) = (lift_name(true), lift_name(false));
    assert!(names().contains(&plain) && !names().contains(&reads));

    stage.filter.withdraw(&stage.root, cgroup.id(), NULL, Withdrawal::ACCESS).unwrap();
    stage.filter.withdraw(&stage.root, cgroup.id(), ZERO, Withdrawal::ACCESS).unwrap();
    assert!(names().contains(&reads) && !names().contains(&plain), "{:?}", names());
    for how in ["r", "w", "rw"] {
        assert_eq!((actor.open(how, &null), below.open(how, &null)), (REFUSED, REFUSED), "{how}");
    }
    assert_eq!(outside.open("rw", &null), Ok(()), "nobody else");
    assert_eq!(actor.mknod(NULL, stage.nodes.free()), Ok(()), "a node gives no access");

    // A grant stands above it, also one that is made by another process that takes the filter over.
    let mut again = DeviceFilter::open(&stage.root).unwrap();
    assert_eq!(again.withdrawn().unwrap().len(), 2);
    again.set(cgroup.id(), NULL, Access::READ).unwrap();
    assert_eq!((actor.open("r", &null), actor.open("w", &null)), (Ok(()), REFUSED));
    assert_eq!(below.open("r", &null), REFUSED, "not vouched for by a mark");
    again.mark(&cgroup.open()).unwrap();
    assert_eq!((actor.open("r", &null), below.open("r", &null)), (Ok(()), Ok(())));
    again.unmark(&cgroup.open()).unwrap();
    again.set(cgroup.id(), NULL, Access::NONE).unwrap();
    assert_eq!(actor.open("r", &null), REFUSED);

    again.withdraw(&stage.root, cgroup.id(), NULL, Access::NONE).unwrap();
    assert_eq!((actor.open("rw", &null), below.open("rw", &null)), (Ok(()), Ok(())));
    assert!(names().contains(&reads), "there is another one still");
    again.withdraw(&stage.root, cgroup.id(), ZERO, Access::NONE).unwrap();
    assert!(names().contains(&plain) && !names().contains(&reads), "{:?}", names());
    assert_eq!(again.withdrawn().unwrap(), []);
}

/// While withdrawals of others come and go, nobody is refused who was allowed, and nobody let in who was not.
fn the_form_changes_while_opening() {
    let mut stage = Stage::new();
    let (granted_to, mut granted) = stage.denied("granted");
    let (_denied_to, mut denied) = stage.denied("denied");
    let allowing = TestCgroup::new("allowing");
    allowing.attach(&crate::stage::allow_only(NULL));
    let mut allowed = allowing.actor();
    let null = stage.nodes.node(NULL);
    stage.filter.set(granted_to.id(), NULL, Access::ALL).unwrap();
    for actor in [&mut granted, &mut denied, &mut allowed] {
        actor.hammer("rw", &null);
    }
    for round in 0..200 {
        let access = if round % 2 == 0 { Access::ALL } else { Access::NONE };
        stage.filter.withdraw(&stage.root, 7, NULL, access).unwrap();
    }
    granted.stop()[0].always(Ok(()));
    allowed.stop()[0].always(Ok(()));
    denied.stop()[0].always(REFUSED);
}

/// What the container's own filter allows stays allowed, whatever the map says of it.
fn a_right_held_anyway_is_not_taken() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    cgroup.attach(&crate::stage::allow_only(NULL));
    let mut actor = cgroup.actor();
    let (null, zero) = (stage.nodes.node(NULL), stage.nodes.node(ZERO));
    let narrow = |access| stage.filter.set(cgroup.id(), NULL, access).unwrap();
    for access in [Access::READ, Access::NONE] {
        narrow(access);
        assert_eq!((actor.open("rw", &null), actor.open("r", &zero)), (Ok(()), REFUSED));
    }
}

fn level_31_is_reached_and_level_32_is_known_as_too_deep() {
    let stage = Stage::new();
    let null = stage.nodes.node(NULL);
    let mut chain = Chain(vec![TestCgroup::new("1")]);
    while chain.0.len() < 32 {
        let next = chain.0.last().unwrap().child(&(chain.0.len() + 1).to_string());
        chain.0.push(next);
    }
    let (deepest, too_deep) = (&chain.0[30], &chain.0[31]);
    assert_eq!((deepest.open().level, deepest.open().is_too_deep()), (31, false));
    assert_eq!((too_deep.open().level, too_deep.open().is_too_deep()), (32, true));
    deepest.attach(&deny_all());
    stage.filter.mark(&deepest.open()).unwrap();
    let mut actor = deepest.actor();
    assert_eq!(actor.open("r", &null), REFUSED);
    stage.filter.set(deepest.id(), NULL, Access::ALL).unwrap();
    assert_eq!(actor.open("r", &null), Ok(()));
    // Beyond its reach a refusal stays one: nothing is opened by mistake.
    too_deep.attach(&deny_all());
    stage.filter.set(too_deep.id(), NULL, Access::ALL).unwrap();
    assert_eq!(too_deep.actor().open("r", &null), REFUSED);
}

fn entries_are_listed() {
    let stage = Stage::new();
    let entry = |cgroup, number: Number, access| Entry { cgroup, number, access };
    let mut all = vec![
        entry(7, NULL, Access::READ),
        entry(7, block_device(1, 3), Access::ALL),
        entry(u64::MAX, char_device(u32::MAX, u32::MAX), Access::MKNOD),
        entry(5, FULL, Access::WRITE),
    ];
    for Entry { cgroup, number, access } in &all {
        stage.filter.set(*cgroup, *number, *access).unwrap();
    }
    all.sort();
    assert_eq!(stage.filter.entries().unwrap(), all);
    stage.filter.set(7, NULL, Access::WRITE).unwrap();
    assert_eq!(stage.filter.get(7, NULL).unwrap(), Access::WRITE, "set replaces, it does not add");
    stage.filter.set(7, NULL, Access::NONE).unwrap();
    stage.filter.set(7, NULL, Access::NONE).unwrap();
    assert_eq!(stage.filter.entries().unwrap().len(), 3);
}

fn a_full_map_is_doubled() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let null = stage.nodes.node(NULL);
    stage.filter.set(cgroup.id(), NULL, Access::ALL).unwrap();
    let mut taken = 1u64;
    let refusal = loop {
        match stage.filter.set(taken << 40, NULL, Access::ALL) {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken <= 65_536, "more than it is said to take");
    };
    assert_eq!((taken, refusal.raw_os_error()), (65_536, Some(libc::E2BIG)));
    stage.filter.set(1 << 40, NULL, Access::READ).expect("what is there can be changed");
    stage.filter.set(2 << 40, NULL, Access::NONE).unwrap();
    stage.filter.set(taken << 40, NULL, Access::ALL).expect("a place that became free is taken");

    let before = stage.filter.entries().unwrap();
    actor.hammer("rw", &null);
    let grown = stage.filter.grow(&stage.root).unwrap();
    actor.stop()[0].always(Ok(()));
    assert!(grown.entries().unwrap() == before, "the entries are the same");
    grown.set(2 << 40, NULL, Access::ALL).unwrap();
    grown.set(cgroup.id(), NULL, Access::READ).unwrap();
    assert_eq!((actor.open("r", &null), actor.open("w", &null)), (Ok(()), REFUSED), "the new map is the one in force");
    let standing = DeviceFilter::standing(&stage.root).unwrap();
    assert_eq!((standing.attached, standing.entries), (true, 65_537));
    assert_eq!(programs(stage.root.as_fd()).iter().filter(|(_, name)| name.starts_with("qmhp")).count(), 1);
}
