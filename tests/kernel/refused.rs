//! What the device filter reports of refusals.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use qm_hotplug::core::device::{Access, Number};
use qm_hotplug::core::filter_program::{REPORTS_PER_WINDOW, lift_name};
use qm_hotplug::core::ledger::Withdrawal;
use qm_hotplug::core::refusal::Refusal;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::before;
use crate::stage::{ABSENT, NULL, Nodes, Stage, TestCgroup, ZERO, allow_only, block_device, deny_all, programs};

const REFUSED: Result<(), Errno> = Err(Errno::PERM);

pub const TESTS: &[(&str, fn())] = &[
    ("refused::a_refused_open_is_reported_as_it_was", a_refused_open_is_reported_as_it_was),
    ("refused::who_is_not_watched_is_not_reported", who_is_not_watched_is_not_reported),
    ("refused::what_is_below_is_reported_as_the_watched_one", what_is_below_is_reported_as_the_watched_one),
    ("refused::what_is_let_through_is_not_reported", what_is_let_through_is_not_reported),
    ("refused::ten_thousand_refusals_are_a_few_reports", ten_thousand_refusals_are_a_few_reports),
    ("refused::a_reader_that_waits_is_woken_up_each_time", a_reader_that_waits_is_woken_up),
    ("refused::a_full_ring_refuses_on", a_full_ring_refuses_on),
    ("refused::the_ring_stays_when_the_program_changes", the_ring_stays_when_the_program_changes),
    ("refused::a_build_before_hands_its_grants_over", a_build_before_hands_its_grants_over),
];

fn refusal(cgroup: &TestCgroup, number: Number, access: &str) -> Refusal {
    Refusal { cgroup: cgroup.id(), number, access: access.parse().unwrap() }
}

fn a_refused_open_is_reported_as_it_was() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    stage.filter.watch(cgroup.id()).unwrap();
    let mut ring = stage.filter.refusals().unwrap();
    let block = block_device(4000, 0xf_ffff);
    for (number, how) in [(NULL, "r"), (ZERO, "w"), (ABSENT, "rw"), (block, "r")] {
        assert_eq!(actor.open(how, stage.nodes.node(number)), REFUSED);
        assert_eq!(ring.take(), [refusal(&cgroup, number, how)]);
    }
    assert_eq!(ring.take(), []);
    assert_eq!(actor.mknod(NULL, stage.nodes.free()), REFUSED);
    assert_eq!(ring.take(), [], "a node opens nothing");
    stage.filter.set(cgroup.id(), NULL, Access::READ).unwrap();
    assert_eq!(actor.open("rw", stage.nodes.node(NULL)), REFUSED);
    assert_eq!(ring.take(), [refusal(&cgroup, NULL, "rw")], "what was wanted, not what was missing");
}

fn who_is_not_watched_is_not_reported() {
    let stage = Stage::new();
    let (watched, mut first) = stage.denied("watched");
    let (_other, mut second) = stage.denied("other");
    let null = stage.nodes.node(NULL);
    let mut ring = stage.filter.refusals().unwrap();
    assert_eq!(stage.filter.watched().unwrap(), [].into());
    stage.filter.watch(watched.id()).unwrap();
    stage.filter.watch(watched.id()).unwrap();
    assert_eq!(stage.filter.watched().unwrap(), [watched.id()].into());
    assert_eq!((first.open("r", &null), second.open("r", &null)), (REFUSED, REFUSED));
    assert_eq!(ring.take(), [refusal(&watched, NULL, "r")]);
    stage.filter.unwatch(watched.id()).unwrap();
    stage.filter.unwatch(watched.id()).unwrap();
    assert_eq!(first.open("r", &null), REFUSED);
    assert_eq!(ring.take(), []);
}

fn what_is_below_is_reported_as_the_watched_one() {
    let stage = Stage::new();
    let (outer, _) = stage.denied("outer");
    let inner = outer.child("inner");
    let deeper = inner.child("deeper");
    let strict = outer.child("strict");
    strict.attach(&deny_all());
    let null = stage.nodes.node(NULL);
    let mut ring = stage.filter.refusals().unwrap();
    stage.filter.watch(outer.id()).unwrap();
    assert_eq!(deeper.actor().open("r", &null), REFUSED);
    assert_eq!(ring.take(), [refusal(&outer, NULL, "r")]);
    // The outer one's mark tells that its own filter did not refuse this.
    assert_eq!(strict.actor().open("r", &null), REFUSED);
    assert_eq!(ring.take(), []);
    // Of two that are watched, the inner one.
    stage.filter.watch(inner.id()).unwrap();
    assert_eq!(deeper.actor().open("r", &null), REFUSED);
    assert_eq!(ring.take(), [refusal(&inner, NULL, "r")]);
}

fn what_is_let_through_is_not_reported() {
    let mut stage = Stage::new();
    let (granted, mut first) = stage.denied("granted");
    let allowing = TestCgroup::new("allowing");
    allowing.attach(&allow_only(NULL));
    let mut second = allowing.actor();
    let null = stage.nodes.node(NULL);
    stage.filter.set(granted.id(), NULL, Access::ALL).unwrap();
    for cgroup in [&granted, &allowing] {
        stage.filter.watch(cgroup.id()).unwrap();
    }
    let mut ring = stage.filter.refusals().unwrap();
    for how in ["r", "w", "rw"] {
        assert_eq!((first.open(how, &null), second.open(how, &null)), (Ok(()), Ok(())));
    }
    assert_eq!(ring.take(), []);
    stage.filter.withdraw(&stage.root, allowing.id(), NULL, Withdrawal::ACCESS).unwrap();
    assert_eq!((first.open("r", &null), second.open("r", &null)), (Ok(()), REFUSED));
    assert_eq!(ring.take(), [refusal(&allowing, NULL, "r")], "a withdrawal is a refusal");
}

fn ten_thousand_refusals_are_a_few_reports() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    stage.filter.watch(cgroup.id()).unwrap();
    let mut ring = stage.filter.refusals().unwrap();
    let started = Instant::now();
    actor.hammer("r", stage.nodes.node(NULL));
    std::thread::sleep(Duration::from_millis(1500));
    let tally = actor.stop().remove(0);
    tally.always(REFUSED);
    assert!(tally.tries > 10_000, "{tally:?}");
    // A second has begun twice or three times.
    let (reports, limit) = (ring.take().len() as u64, u64::from(REPORTS_PER_WINDOW));
    let seconds = started.elapsed().as_secs() + 2;
    assert!((2 * limit..=seconds * limit).contains(&reports), "{reports} of {}", tally.tries);
}

fn a_reader_that_waits_is_woken_up() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let null = stage.nodes.node(NULL);
    let mut ring = stage.filter.refusals().unwrap();
    let is_readable = |ring: &qm_hotplug::sys::ring::Ring, millis: i64| {
        let patience = Timespec { tv_sec: 0, tv_nsec: millis * 1_000_000 };
        poll(&mut [PollFd::new(ring, PollFlags::IN)], Some(&patience)).unwrap() == 1
    };
    assert!(!is_readable(&ring, 0));
    for _ in 0..2000 {
        // Anew each time, past the limit: often enough for the ring to wrap around, and the reader's position with it.
        stage.filter.watch(cgroup.id()).unwrap();
        for how in ["r", "w"] {
            assert_eq!(actor.open(how, &null), REFUSED);
        }
        assert!(is_readable(&ring, 900));
        assert_eq!(ring.take(), [refusal(&cgroup, NULL, "r"), refusal(&cgroup, NULL, "w")]);
        assert!(!is_readable(&ring, 0));
    }
    // Another reader goes on where this one has stopped.
    assert_eq!(actor.open("rw", &null), REFUSED);
    drop(ring);
    assert_eq!(stage.filter.refusals().unwrap().take(), [refusal(&cgroup, NULL, "rw")]);
}

fn a_full_ring_refuses_on() {
    let stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let null = stage.nodes.node(NULL);
    let mut ring = stage.filter.refusals().unwrap();
    for round in 0..2500 {
        if round % 10 == 0 {
            stage.filter.watch(cgroup.id()).unwrap();
        }
        assert_eq!(actor.open("r", &null), REFUSED);
    }
    let taken = ring.take();
    assert!((2000..2048).contains(&taken.len()), "{}", taken.len());
    assert_eq!(actor.open("w", &null), REFUSED);
    assert_eq!(ring.take(), [refusal(&cgroup, NULL, "w")]);
}

fn the_ring_stays_when_the_program_changes() {
    let mut stage = Stage::new();
    let (cgroup, mut actor) = stage.denied("a");
    let null = stage.nodes.node(NULL);
    stage.filter.watch(cgroup.id()).unwrap();
    let mut ring = stage.filter.refusals().unwrap();
    let mut is_told = |filter: &DeviceFilter, what: &str| {
        assert_eq!(actor.open("r", &null), REFUSED, "{what}");
        assert_eq!(ring.take(), [refusal(&cgroup, NULL, "r")], "{what}");
        assert!(filter.reports_to(&ring), "{what}");
        assert_eq!(filter.watched().unwrap(), [cgroup.id()].into(), "{what}");
    };
    is_told(&stage.filter, "at first");
    stage.filter.withdraw(&stage.root, 7, NULL, Access::ALL).unwrap();
    is_told(&stage.filter, "with withdrawals");
    let grown = stage.filter.grow(&stage.root).unwrap();
    is_told(&grown, "grown");
    let other = DeviceFilter::open_as(&stage.root, |_| "qmhp_lift1_aaaa").unwrap();
    is_told(&other, "another build");
    drop((grown, other));
    is_told(&DeviceFilter::open(&stage.root).unwrap(), "another process");
    is_told(&DeviceFilter::existing(&stage.root).unwrap().unwrap(), "a look");
    // Detached by somebody: all is new.
    DeviceFilter::release(&stage.root).unwrap();
    let anew = DeviceFilter::open(&stage.root).unwrap();
    assert!(!anew.reports_to(&ring) && anew.watched().unwrap().is_empty());
}

/// A build that reports nothing has two maps less.
fn a_build_before_hands_its_grants_over() {
    let (root, nodes) = (CgroupRoot::find().unwrap(), Nodes::new());
    let (null, zero) = (nodes.node(NULL), nodes.node(ZERO));
    let cgroup = TestCgroup::new("a");
    cgroup.attach(&deny_all());
    let (mut granted, mut denied) = (cgroup.actor(), cgroup.actor());
    let (program, grants) = before::load();
    program.attach(root.as_fd()).unwrap();
    let standing = DeviceFilter::existing(&root).unwrap().expect("its layout is the same");
    standing.set(cgroup.id(), NULL, Access::READ).unwrap();
    assert_eq!(grants.keys().unwrap().len(), 1);
    granted.hammer("r", &null);
    denied.hammer("r", &zero);
    // However busy the machine is: both try before, while and after the newer build takes over.
    let turn = || std::thread::sleep(Duration::from_millis(100));
    turn();
    let filter = DeviceFilter::open(&root).unwrap();
    turn();
    granted.stop()[0].always(Ok(()));
    denied.stop()[0].always(REFUSED);
    let names = programs(root.as_fd()).into_iter().map(|(_, name)| name).filter(|name| name.starts_with("qmhp"));
    assert_eq!(names.collect::<Vec<_>>(), [lift_name(false)]);
    assert_eq!(filter.entries().unwrap(), standing.entries().unwrap(), "one map");
    let mut ring = filter.refusals().unwrap();
    filter.watch(cgroup.id()).unwrap();
    assert_eq!((granted.open("r", &null), granted.open("w", &null)), (Ok(()), REFUSED));
    assert_eq!(ring.take(), [refusal(&cgroup, NULL, "w")]);
}
