//! An agent that starts finds everything as it is: containers that ran before it, and what a ledger told that is lost.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::attach::REFUSED;
use crate::exact::{Exact, STICK, compare, expect};
use crate::plug::console;
use crate::selectors::asks;
use crate::state::{entries, entries_of, programs_on};
use crate::support::podman::Container;
use crate::support::{Agent, configure, grants, qm, unconfigure, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("adoption::a_page_that_is_no_page_is_set_aside_and_found_out_anew", a_page_that_is_no_page),
    ("adoption::what_no_rule_asks_for_any_more_goes_at_the_start", what_no_rule_asks_for_any_more),
    ("adoption::what_was_withdrawn_stays_so_without_its_page", what_was_withdrawn_stays_so_without_its_page),
    ("adoption::without_any_ledger_rules_have_what_they_had", without_any_ledger),
];

pub(crate) const ONCE: &[CaseOnce] = &[("adoption::many_containers_that_ran_before", many_containers_that_ran_before)];

const LEDGER: &str = "/run/qm-hotplug/ledger";

fn page_of(c: &Container) -> PathBuf {
    PathBuf::from(format!("{LEDGER}/c-{}.json", c.id))
}

/// What becomes of a page.
type Damage = fn(Value) -> Vec<u8>;

/// What somebody or something may have made of a page.
fn damages() -> Vec<(&'static str, Damage)> {
    fn changed(mut page: Value, at: &str, value: impl Into<Value>) -> Vec<u8> {
        *page.pointer_mut(at).unwrap() = value.into();
        page.to_string().into_bytes()
    }
    vec![
        ("empty", |_| Vec::new()),
        ("cut short", |page| page.to_string().into_bytes()[..99].to_vec()),
        ("noise", |_| (0u8..=255).cycle().take(70_000).collect()),
        ("of a future version", |page| changed(page, "/version", 2)),
        ("of no version", |_| b"{\"entries\":[]}".to_vec()),
        ("of another container", |page| changed(page, "/entries/0/grant/holder/id", "web")),
        ("of every process", |page| changed(page, "/entries/0/grant/holder/cgroup_id", 1)),
        ("with a relative path", |page| changed(page, "/entries/0/grant/node/path", "dev/stick")),
        ("with a line break", |page| changed(page, "/entries/0/grant/node/path", "/dev/a\nb")),
        ("with everything twice", |mut page| {
            let again = page["entries"][0].clone();
            page["entries"].as_array_mut().unwrap().push(again);
            page.to_string().into_bytes()
        }),
    ]
}

fn a_page_that_is_no_page(runtime: &str) {
    let (device, by_hand) = (console(41), console(42));
    let c = Container::start(runtime, "qmh-page", &[&asks("x", STICK)]);
    let other = Container::start(runtime, "qmh-page-hand", &[]);
    let all = [&c, &other];
    compare();
    let full = Exact::of(&all);
    let inode = || c.look("/dev/a/b/stick").unwrap().ino();
    let node = inode();
    for (what, damage) in damages() {
        qm(&["attach", &other.name, &by_hand.path, "/dev/x/mine", "--mode", "0604"]).ok();
        other.past_the_filter(&format!("mknod /dev/zero2 c 1 5; mknod /dev/x/again {}", by_hand.numbers())).ok();
        for c in all {
            let page: Value = serde_json::from_slice(&fs::read(page_of(c)).unwrap()).unwrap();
            fs::write(page_of(c), damage(page)).unwrap();
        }
        let agent = Agent::start();
        let log = agent.log();
        for c in all {
            let line = format!("the ledger {} is set aside as", page_of(c).display());
            assert_eq!(log.matches(&line).count(), 1, "{what}: {log}");
            assert!(page_of(c).with_extension("bad").exists(), "{what}");
            fs::remove_file(page_of(c).with_extension("bad")).unwrap();
        }
        assert!(log.contains("c 7:170") && log.contains("is taken back, with /dev/x/again and /dev/x/mine"), "{log}");
        assert_eq!(other.node("/dev/zero2").as_deref(), Some("c 1:5 0:0 0644"), "what it has of its own stays");
        other.past_the_filter(&format!("rm /dev/zero2 && mknod /dev/byhand {}", by_hand.numbers())).ok();
        assert_eq!(other.open("<", "/dev/byhand"), REFUSED.map_err(Into::into), "{what}");
        other.past_the_filter("rm /dev/byhand").ok();
        agent.stop();
        let _ = fs::remove_file(log_path());
        expect(&all, &[&full], what);
        assert_eq!(inode(), node, "{what}: the node is not made anew");
        assert!(c.opens("<>", "/dev/c/link"), "{what}");
    }
    // What was found out is taken back like anything else.
    let _agent = Agent::start();
    device.unplug();
    wait_for("all to go", || grants().is_empty() && entries().is_empty());
    assert!(c.look("/dev/a").is_none() && c.look("/dev/c").is_none());
    assert!(!programs_on(&c.cgroup()).iter().any(|name| name.starts_with("qmhp")));
}

/// Where [`Agent`] logs: each agent is to be looked at by itself.
fn log_path() -> PathBuf {
    std::env::temp_dir().join(format!("qm-hotplug-agent-{}.log", std::process::id()))
}

fn without_any_ledger(runtime: &str) {
    let device = console(41);
    let c = Container::start(runtime, "qmh-noledger", &[&asks("x", STICK)]);
    compare();
    let full = Exact::of(&[&c]);
    let agent = Agent::start();
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), Signal::KILL).unwrap();
    fs::remove_dir_all(LEDGER).unwrap();
    // The container's own, where another name is asked for: not ours, though it looks so.
    c.past_the_filter(&format!("mknod /dev/mine {}", device.numbers())).ok();
    compare();
    c.past_the_filter("rm /dev/mine").ok();
    expect(&[&c], &[&full], "without a ledger");
}

fn what_no_rule_asks_for_any_more(runtime: &str) {
    let device = console(41);
    let c = Container::start(runtime, "qmh-no-rule", &[]);
    configure("[[container]]\nmatch = \"qmh-no-rule\"\ndevices = [\"devname=/dev/vcsa41,as=/dev/mine\"]\n");
    compare();
    assert!(c.opens("<>", "/dev/mine"));
    unconfigure();
    compare();
    c.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
    assert_eq!((c.node("/dev/mine"), c.open("<", "/dev/byhand")), (None, REFUSED.map_err(Into::into)));
    assert!(!programs_on(&c.cgroup()).iter().any(|name| name.starts_with("qmhp")));
}

fn what_was_withdrawn_stays_so_without_its_page(runtime: &str) {
    let device = console(43);
    let asked = asks("x", "devname=/dev/vcsa43;as=/dev/screen");
    let c = crate::precreate::start(runtime, "qmh-withdrawn", &[&asked]);
    compare();
    device.unplug();
    compare();
    let withdrawn = Exact::of(&[&c]);
    c.past_the_filter("mknod /dev/byhand c 7 171").ok();
    let is_refused = || c.open("<", "/dev/byhand") == REFUSED.map_err(Into::into);
    assert!(is_refused());
    fs::write(page_of(&c), "{").unwrap();
    compare();
    assert!(is_refused());
    c.past_the_filter("rm /dev/byhand").ok();
    fs::remove_file(page_of(&c).with_extension("bad")).unwrap();
    expect(&[&c], &[&withdrawn], "without its page");
    device.again();
    compare();
    assert!(c.opens("<", "/dev/screen"));
}

fn many_containers_that_ran_before() {
    const ASKING: usize = 20;
    const OTHERS: usize = 10;
    let names: Vec<String> = (0..ASKING + OTHERS).map(|n| format!("qmh-before-{n}")).collect();
    let start = |(n, name): (usize, &String)| {
        let runtime = ["runc", "crun"][n % 2];
        let rule = if n < ASKING { asks("x", STICK) } else { "--annotation=is=plain".to_owned() };
        Container::start(runtime, name, &[&rule])
    };
    let all: Vec<Container> = std::thread::scope(|scope| {
        let numbered: Vec<_> = names.iter().enumerate().collect();
        let halves: Vec<_> = numbered.chunks(names.len() / 2).map(<[_]>::to_vec).collect();
        let starts: Vec<_> = halves
            .into_iter()
            .map(|half| scope.spawn(move || half.into_iter().map(start).collect::<Vec<_>>()))
            .collect();
        starts.into_iter().flat_map(|half| half.join().unwrap()).collect()
    });
    let device = console(41);
    let started = Instant::now();
    let agent = Agent::start();
    let elapsed = started.elapsed();
    eprintln!("{ASKING} of {} containers were given a device within {elapsed:.0?} of the agent's start", all.len());
    let is_asking = |c: &Container| names[..ASKING].contains(&c.name);
    for c in &all {
        let expected = if is_asking(c) { Some(device.describe()) } else { None };
        assert_eq!(c.node("/dev/a/b/stick"), expected, "{}", c.name);
        assert_eq!(entries_of(&c.cgroup()).len(), usize::from(is_asking(c)), "{}", c.name);
    }
    assert!(all.iter().filter(|c| is_asking(c)).take(2).all(|c| c.opens("<>", "/dev/a/b/stick")));
    // While nobody looks, the device goes for some and for all.
    let inodes = || all.iter().map(|c| c.look("/dev/a/b/stick").map(|found| found.ino())).collect::<Vec<_>>();
    let before = inodes();
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), Signal::KILL).unwrap();
    let started = Instant::now();
    let second = Agent::start();
    eprintln!("and known to the next one within {:.0?}", started.elapsed());
    assert_eq!(inodes(), before, "nothing is made anew");
    second.stop();
    device.unplug();
    let started = Instant::now();
    compare();
    eprintln!("and taken back within {:.0?} of the next one's start", started.elapsed());
    assert!(entries().is_empty() && inodes().iter().all(Option::is_none));
}
