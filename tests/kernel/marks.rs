//! The mark in first place on a container's cgroup, and what it is there for: filters below the container.

use std::os::fd::{AsFd, AsRawFd};

use qm_hotplug::core::device::Access;
use qm_hotplug::core::filter_program::{self, Insn};
use qm_hotplug::sys::bpf::{Map, Program};
use rustix::io::Errno;

use crate::kernel_bpf::replace;
use crate::stage::{FULL, NULL, Stage, TestCgroup, ZERO, allow_all, allow_only, deny_all};

const REFUSED: Result<(), Errno> = Err(Errno::PERM);

pub const TESTS: &[(&str, fn())] = &[
    ("marks::the_mark_comes_first_and_the_runtimes_programs_stay_the_same", first_place),
    ("marks::the_runtime_can_still_replace_its_program", the_runtime_can_still_replace_its_program),
    ("marks::a_filter_with_maps_keeps_the_mark_out_and_stays", a_filter_with_maps_keeps_the_mark_out_and_stays),
    ("marks::what_fails_half_way_is_put_back", what_fails_half_way_is_put_back),
    ("marks::never_a_moment_unfiltered_while_marks_come_and_go", never_a_moment_unfiltered),
    ("marks::never_a_moment_refused_while_marks_come_and_go", never_a_moment_refused),
    ("marks::an_older_mark_is_replaced_without_a_moment_refused", an_older_mark_is_replaced),
    ("nested::with_a_denying_filter_stays_denied", with_a_denying_filter_stays_denied),
    ("nested::without_a_filter_or_with_one_that_allows_opens", without_a_filter_or_with_one_that_allows_opens),
    ("nested::alone_granted_opens_and_the_outer_does_not", alone_granted_opens_and_the_outer_does_not),
    ("nested::three_levels_deep", three_levels_deep),
    ("nested::after_the_mark_was_detached_the_container_itself_still_opens", after_the_mark_was_detached),
];

fn first_place() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    // crun's and systemd's side by side.
    cgroup.attach(&allow_only(NULL));
    cgroup.attach(&allow_all());
    let before = cgroup.programs();
    let expect_marked = || {
        assert!(stage.filter.is_marked(&cgroup.open()).unwrap());
        let now = cgroup.programs();
        assert_eq!((now[0].1.as_str(), &now[1..]), (filter_program::mark_name().as_str(), &before[..]));
        now[0].0
    };
    assert!(!stage.filter.is_marked(&cgroup.open()).unwrap());
    stage.filter.mark(&cgroup.open()).unwrap();
    let id = expect_marked();
    stage.filter.mark(&cgroup.open()).unwrap();
    assert_eq!(expect_marked(), id, "marking again changes nothing");
    stage.filter.unmark(&cgroup.open()).unwrap();
    assert_eq!(cgroup.programs(), before);
    // A mark that is not in first place any more is put there.
    stage.filter.mark(&cgroup.open()).unwrap();
    let mark = Program::by_id(cgroup.programs()[0].0).unwrap();
    cgroup.detach(&mark);
    cgroup.attach(&mark);
    assert!(!stage.filter.is_marked(&cgroup.open()).unwrap());
    stage.filter.mark(&cgroup.open()).unwrap();
    expect_marked();
    // Also where there is no program at all.
    let bare = TestCgroup::new("bare");
    stage.filter.mark(&bare.open()).unwrap();
    assert!(stage.filter.is_marked(&bare.open()).unwrap());
    assert_eq!(bare.programs().len(), 1);
}

fn the_runtime_can_still_replace_its_program() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    let original = deny_all();
    cgroup.attach(&original);
    stage.filter.mark(&cgroup.open()).unwrap();
    let mut actor = cgroup.actor();
    let null = stage.nodes.node(NULL);
    assert_eq!(actor.open("r", &null), REFUSED);
    let update = allow_only(NULL);
    replace(cgroup.open().as_fd(), &original, &update).expect("as crun and runc update a container");
    assert!(stage.filter.is_marked(&cgroup.open()).unwrap());
    assert_eq!(cgroup.programs()[1..], [(update.info().unwrap().id, "runtime".to_owned())]);
    assert_eq!((actor.open("r", &null), actor.open("r", stage.nodes.node(ZERO))), (Ok(()), REFUSED));
}

fn a_filter_with_maps_keeps_the_mark_out_and_stays() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    let map = Map::create_percpu_array("foreign", filter_program::WITNESS_SIZE, 1).unwrap();
    // r1 = the map; allow.
    let uses_map = [Insn::new(0x18, 1, 1, 0, map.as_raw_fd()), Insn::new(0, 0, 0, 0, 0)];
    let foreign = Program::load("foreign", &[&uses_map[..], &filter_program::allow()].concat()).unwrap();
    for program in [&deny_all(), &foreign] {
        cgroup.attach(program);
    }
    let before = cgroup.programs();
    stage.filter.mark(&cgroup.open()).expect_err("the kernel does not tell which maps an instruction uses");
    assert_eq!(cgroup.programs(), before);
    // The grant holds in the cgroup itself all the same.
    stage.filter.set(cgroup.id(), NULL, Access::ALL).unwrap();
    assert_eq!(cgroup.actor().open("r", stage.nodes.node(NULL)), Ok(()));
}

fn what_fails_half_way_is_put_back() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    // The kernel takes 64 programs a cgroup: not all of the copies find a place.
    let originals: Vec<Program> = (0..40).map(|_| deny_all()).collect();
    originals.iter().for_each(|program| cgroup.attach(program));
    let before = cgroup.programs();
    stage.filter.mark(&cgroup.open()).expect_err("no place for the copies");
    assert_eq!(cgroup.programs(), before);
}

fn never_a_moment_unfiltered() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    cgroup.attach(&allow_only(ZERO));
    let before = cgroup.programs();
    let (null, zero) = (stage.nodes.node(NULL), stage.nodes.node(ZERO));
    let (mut denied, mut allowed) = (cgroup.actor(), cgroup.actor());
    let rounds = |count: u32| {
        for _ in 0..count {
            stage.filter.mark(&cgroup.open()).unwrap();
            stage.filter.unmark(&cgroup.open()).unwrap();
        }
    };
    allowed.hammer("r", &zero);
    rounds(200);
    allowed.stop()[0].always(Ok(()));
    // An unfiltered moment would be as short as one system call: many rounds, and nothing else on the other CPU.
    denied.hammer("r", &null);
    rounds(1500);
    denied.stop()[0].always(REFUSED);
    assert_eq!(cgroup.programs(), before, "the runtime's program is the same one after all rounds");
}

/// Grants in force hold while the mark is put back, as after each update by the runtime.
fn never_a_moment_refused() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    cgroup.attach(&deny_all());
    let nested = cgroup.child("nested");
    nested.attach(&deny_all());
    stage.filter.set(cgroup.id(), NULL, Access::ALL).unwrap();
    let null = stage.nodes.node(NULL);
    for (mut actor, expected) in [(cgroup.actor(), Ok(())), (nested.actor(), REFUSED)] {
        // One at a time: a moment as short as one system call is only met by who has a CPU to itself.
        actor.hammer("r", &null);
        for _ in 0..1000 {
            stage.filter.mark(&cgroup.open()).unwrap();
            stage.filter.unmark(&cgroup.open()).unwrap();
        }
        actor.stop()[0].always(expected);
    }
}

/// A newer binary puts its own mark into the place of an older one's, also for those below the container.
fn an_older_mark_is_replaced() {
    let stage = Stage::new();
    let cgroup = TestCgroup::new("a");
    cgroup.attach(&deny_all());
    let nested = cgroup.child("nested");
    stage.filter.set(cgroup.id(), NULL, Access::ALL).unwrap();
    stage.filter.mark(&cgroup.open()).unwrap();
    let ours = cgroup.programs();
    let mut below = nested.actor();
    below.hammer("r", stage.nodes.node(NULL));
    for round in 0..200 {
        // The same program under an older build's name.
        let now = Program::by_id(cgroup.programs()[0].0).unwrap();
        let witness = Map::by_id(now.info().unwrap().map_ids[0]).unwrap().0;
        let older = Program::load("qmhp_mark1_0000", &filter_program::mark(1, witness.as_raw_fd())).unwrap();
        replace(cgroup.open().as_fd(), &now, &older).unwrap();
        assert!(!stage.filter.is_marked(&cgroup.open()).unwrap());
        stage.filter.mark(&cgroup.open()).unwrap();
        assert!(stage.filter.is_marked(&cgroup.open()).unwrap(), "round {round}");
        assert_eq!(cgroup.programs()[1..], ours[1..]);
    }
    below.stop()[0].always(Ok(()));
}

fn with_a_denying_filter_stays_denied() {
    let stage = Stage::new();
    let null = stage.nodes.node(NULL);
    let (outer, mut outer_actor) = stage.denied("outer");
    let nested = outer.child("nested");
    nested.attach(&deny_all());
    let below = nested.child("below");
    stage.filter.set(outer.id(), NULL, Access::ALL).unwrap();
    for (cgroup, mut actor) in [(&nested, nested.actor()), (&below, below.actor())] {
        for how in ["r", "w", "rw"] {
            assert_eq!(actor.open(how, &null), REFUSED, "{how} in {}", cgroup.path);
        }
        assert_eq!(actor.mknod(NULL, stage.nodes.free()), REFUSED);
    }
    assert_eq!(outer_actor.open("rw", &null), Ok(()));
}

fn without_a_filter_or_with_one_that_allows_opens() {
    let stage = Stage::new();
    let (null, zero) = (stage.nodes.node(NULL), stage.nodes.node(ZERO));
    let (outer, _) = stage.denied("outer");
    stage.filter.set(outer.id(), NULL, Access::ALL).unwrap();
    let bare = outer.child("bare");
    let below = bare.child("below");
    let allowing = outer.child("allowing");
    allowing.attach(&allow_only(NULL));
    for nested in [&bare, &below, &allowing] {
        let mut actor = nested.actor();
        assert_eq!(actor.open("rw", &null), Ok(()), "{}", nested.path);
        assert_eq!(actor.mknod(NULL, stage.nodes.free()), Ok(()), "{}", nested.path);
        assert_eq!(actor.open("r", &zero), REFUSED, "what the outer container has not, {} has not", nested.path);
    }
}

fn alone_granted_opens_and_the_outer_does_not() {
    let stage = Stage::new();
    let (null, zero) = (stage.nodes.node(NULL), stage.nodes.node(ZERO));
    let (outer, mut outer_actor) = stage.denied("outer");
    let nested = outer.child("nested");
    nested.attach(&deny_all());
    let neighbour = outer.child("neighbour");
    stage.filter.mark(&nested.open()).unwrap();
    stage.filter.set(nested.id(), NULL, Access::READ).unwrap();
    let mut actor = nested.actor();
    assert_eq!(actor.open("r", &null), Ok(()));
    assert_eq!(actor.open("w", &null), REFUSED);
    assert_eq!(actor.open("r", &zero), REFUSED);
    assert_eq!(outer_actor.open("r", &null), REFUSED);
    assert_eq!(neighbour.actor().open("r", &null), REFUSED);
    // Each has its own grants, and keeps them to itself.
    stage.filter.set(outer.id(), ZERO, Access::ALL).unwrap();
    assert_eq!((outer_actor.open("rw", &zero), outer_actor.open("r", &null)), (Ok(()), REFUSED));
    assert_eq!((actor.open("r", &zero), actor.open("r", &null)), (REFUSED, Ok(())));
}

fn three_levels_deep() {
    let stage = Stage::new();
    let (null, zero, full) = (stage.nodes.node(NULL), stage.nodes.node(ZERO), stage.nodes.node(FULL));
    let (outer, mut outer_actor) = stage.denied("outer");
    let middle = outer.child("middle");
    middle.attach(&deny_all());
    let inner = middle.child("inner");
    inner.attach(&deny_all());
    for (cgroup, number) in [(&outer, NULL), (&middle, ZERO), (&inner, FULL)] {
        stage.filter.mark(&cgroup.open()).unwrap();
        stage.filter.set(cgroup.id(), number, Access::ALL).unwrap();
    }
    for (level, actor) in [&mut outer_actor, &mut middle.actor(), &mut inner.actor()].into_iter().enumerate() {
        for (at, path) in [&null, &zero, &full].into_iter().enumerate() {
            let expected = if at == level { Ok(()) } else { REFUSED };
            assert_eq!(actor.open("r", path), expected, "device {at} at level {level}");
        }
    }
}

/// `runc update` detaches every program and attaches its new one.
fn after_the_mark_was_detached() {
    let stage = Stage::new();
    let null = stage.nodes.node(NULL);
    let (outer, mut actor) = stage.denied("outer");
    let (denying, bare) = (outer.child("denying"), outer.child("bare"));
    denying.attach(&deny_all());
    stage.filter.set(outer.id(), NULL, Access::ALL).unwrap();
    let old: Vec<u32> = outer.programs().iter().map(|(id, _)| *id).collect();
    outer.attach(&deny_all());
    old.iter().for_each(|id| outer.detach(&Program::by_id(*id).unwrap()));
    assert!(!stage.filter.is_marked(&outer.open()).unwrap());
    assert_eq!(actor.open("rw", &null), Ok(()));
    assert_eq!(denying.actor().open("r", &null), REFUSED);
    assert_eq!(bare.actor().open("r", &null), REFUSED, "whose refusal it was cannot be told, so it stays");
    stage.filter.mark(&outer.open()).unwrap();
    assert_eq!(actor.open("rw", &null), Ok(()));
    assert_eq!(denying.actor().open("r", &null), REFUSED);
    assert_eq!(bare.actor().open("r", &null), Ok(()), "the mark is back");
}
