//! Annotations with selectors and options: names that stay, devices that must be there, devices for one alone.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::attach::REFUSED;
use crate::plug::{console, tap_with};
use crate::precreate::{hooks, start as start_with_hook};
use crate::support::podman::{Container, place, podman};
use crate::support::{Agent, Said, assert_nothing_left, configure, grants, qm, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("selectors::a_fixed_name_leads_to_whichever_device_is_there", a_fixed_name_leads_to_whichever_device_is_there),
    ("selectors::a_fixed_name_from_the_start_on", a_fixed_name_from_the_start_on),
    ("selectors::without_what_is_required_there_is_no_start", without_what_is_required_there_is_no_start),
    ("selectors::who_has_it_exclusively_has_it_alone", who_has_it_exclusively_has_it_alone),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("selectors::of_two_at_start_the_first_has_the_name", of_two_at_start_the_first_has_the_name),
    ("selectors::what_went_before_the_agent_came_is_withdrawn", what_went_before_the_agent_came_is_withdrawn),
    ("selectors::names_that_begin_alike_and_number_zero", names_that_begin_alike_and_number_zero),
    ("selectors::a_selector_that_podman_has_cut_stands_for_nothing", a_selector_that_podman_has_cut_stands_for_nothing),
];

/// The log of the hook, in containers/qm's format.
pub(crate) const HOOK_LOG: &str = "/var/log/qm-device-manager.log";

/// An option for podman: a rule of that name.
pub(crate) fn asks(name: &str, selector: &str) -> String {
    format!("--annotation=org.containers.qm.hotplug.{name}={selector}")
}

/// What `list` says of a container: each path with its device and its origin.
pub(crate) fn listed(c: &Container) -> Vec<String> {
    let of_it = |grant: &&serde_json::Value| grant["id"] == *c.id;
    let text = |grant: &serde_json::Value, key: &str| grant[key].as_str().unwrap().to_owned();
    let line = |grant| format!("{} {} {}", text(grant, "path"), text(grant, "device"), text(grant, "origin"));
    grants().iter().filter(of_it).map(line).collect()
}

/// A node in the container, past its device filter, with the number of a device of the host.
fn by_hand(c: &Container, numbers: &str) {
    c.past_the_filter(&format!("rm -f /dev/byhand && mknod /dev/byhand {numbers}")).ok();
}

fn refused(c: &Container) -> bool {
    c.open("<", "/dev/byhand") == REFUSED.map_err(Into::into)
}

/// Containers know a group 77.
fn make_group() {
    std::fs::write(place().join("rootfs/etc/group"), "root:x:0:\nscreens:x:77:\n").unwrap();
}

const SCREEN: &str = "as=/dev/screen;link=/dev/by/one;mode=0640;uid=5;gid=screens;access=rw";

fn a_fixed_name_leads_to_whichever_device_is_there(runtime: &str) {
    make_group();
    let agent = Agent::start();
    let before = agent.log().len();
    let c = Container::start(
        runtime,
        "qmh-fixed",
        &[&asks("x", &format!("subsystem=vc;devname=vcsa5?;{SCREEN};link=/dev/by/two"))],
    );
    let (look, nobody) = (
        asks("look", "subsystem=vc;devname=vcsa5?;as=/dev/look;access=r"),
        asks("nobody", "devname=vcsa5?;as=/dev/nobody;gid=wizards"),
    );
    let reader = Container::start(runtime, "qmh-fixed-look", &[&look, &nobody]);
    let leads_to = |c: &Container, number: &str| {
        wait_for(number, || c.node("/dev/screen").is_some_and(|node| node == format!("c {number} 5:77 0640")));
        let link = format!("/proc/{}/root/dev/by/one", c.pid());
        wait_for("the link", || std::fs::read_link(&link).is_ok());
        assert!(c.opens("<>", "/dev/by/one"), "{number}");
    };
    let both =
        |number: &str| ["by/one", "by/two", "screen"].map(|path| format!("/dev/{path} /dev/vcsa{number} rule:x"));
    let (first, third) = (console(51), "/dev/vcsa53");
    leads_to(&c, "7:179");
    by_hand(&c, "c 7 179");
    assert_eq!(listed(&c), both("51"));
    wait_for("the reader's", || listed(&reader) == ["/dev/look /dev/vcsa51 rule:look"]);
    assert_eq!((reader.open("<", "/dev/look"), reader.open(">", "/dev/look")), (Ok(()), REFUSED.map_err(Into::into)));
    assert_eq!(reader.node("/dev/nobody"), None);
    let log = &agent.log()[before..];
    assert!(log.contains("/dev/vcsa51 not granted by nobody: its /etc/group has no group 'wizards'"), "{log}");

    // The second one waits, and is told of once.
    let second = console(52);
    let waiting = "/dev/vcsa52 not granted at /dev/screen: /dev/screen is /dev/vcsa51 there";
    wait_for("a line about the second", || agent.log()[before..].contains(waiting));
    leads_to(&c, "7:179");
    first.unplug();
    leads_to(&c, "7:180");
    assert!(refused(&c));
    assert_eq!(listed(&c), both("52"));
    wait_for("the reader's", || listed(&reader) == ["/dev/look /dev/vcsa52 rule:look"]);
    by_hand(&c, "c 7 180");
    second.unplug();
    wait_for("all to go", || grants().is_empty());
    assert!(c.look("/dev/screen").is_none() && c.look("/dev/by").is_none() && refused(&c));
    assert_eq!(agent.log()[before..].matches(waiting).count(), 1);

    let _third = console(53);
    leads_to(&c, "7:181");
    assert_eq!(listed(&c).last(), Some(&format!("/dev/screen {third} rule:x")));
    agent.stop();
    std::fs::remove_file(place().join("rootfs/etc/group")).unwrap();
}

fn a_fixed_name_from_the_start_on(runtime: &str) {
    make_group();
    let (asked, given) = (tap_with("02:00:00:00:00:51"), console(52));
    let numbers = asked.numbers();
    let x = asks("x", &format!("subsystem=macvtap;attrs.address=02:00:00:00:00:51;{SCREEN}"));
    let c = start_with_hook(runtime, "qmh-first", &[&x, "--device=/dev/vcsa52:/dev/mine"]);
    let node = format!("c {} 5:77 0640", numbers[2..].replace(' ', ":"));
    assert_eq!((c.node("/dev/screen"), c.node("/dev/by/one")), (Some(node.clone()), Some(node.clone())));
    by_hand(&c, &numbers);
    let opens = |paths: &[&str]| paths.iter().all(|path| c.opens("<>", path));
    assert!(opens(&["/dev/screen", "/dev/by/one", "/dev/mine"]));
    assert_nothing_left();

    let agent = Agent::start();
    let path = &asked.path;
    assert_eq!(listed(&c), [format!("/dev/by/one {path} start"), format!("/dev/screen {path} start")]);
    assert!(grants().iter().all(|grant| grant["node"] == "container's"), "{:?}", grants());
    asked.unplug();
    wait_for("all to go", || grants().is_empty() && c.look("/dev/screen").is_none());
    assert!(c.look("/dev/by/one").is_none() && refused(&c) && opens(&["/dev/mine"]));

    // Another device with that number is not what was asked for.
    let other = tap_with("02:00:00:00:00:52");
    assert_eq!(other.numbers(), numbers, "the kernel uses the number again");
    qm(&["status"]).ok();
    assert!(refused(&c) && c.look("/dev/screen").is_none() && grants().is_empty());
    agent.stop();
    let agent = Agent::start();
    assert!(refused(&c) && opens(&["/dev/mine"]) && grants().is_empty());
    other.unplug();

    // What was asked for comes back under its name.
    let again = tap_with("02:00:00:00:00:51");
    assert_eq!(again.numbers(), numbers);
    wait_for("the node", || listed(&c).len() == 2 && c.node("/dev/screen") == Some(node.clone()));
    assert!(opens(&["/dev/screen", "/dev/by/one", "/dev/byhand", "/dev/mine"]));
    given.unplug();
    agent.stop();
    std::fs::remove_file(place().join("rootfs/etc/group")).unwrap();
}

/// Has podman start a container, which fails, and returns what podman said.
fn fails(runtime: &str, name: &str, annotation: &str) -> Said {
    let rootfs = format!("{}:O", place().join("rootfs").display());
    let root = ["--rootfs", rootfs.as_str()];
    let said =
        Container::try_start(&["--hooks-dir", &hooks()], runtime, name, &[annotation], &root, &["sleep", "1000"]);
    podman(&["rm", "-f", name]).ok();
    said.err().unwrap_or_else(|| panic!("{name} with {annotation} does not start"))
}

/// journald's socket, in this mount namespace.
struct Journal(UnixDatagram);

impl Journal {
    fn open() -> Journal {
        std::fs::create_dir_all("/run/systemd").unwrap();
        mount(Some("none"), "/run/systemd", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        std::fs::create_dir("/run/systemd/journal").unwrap();
        let socket = UnixDatagram::bind("/run/systemd/journal/socket").unwrap();
        socket.set_nonblocking(true).unwrap();
        Journal(socket)
    }

    /// The messages since it was read last.
    fn read(&self) -> Vec<String> {
        let mut buffer = [0; 65_536];
        std::iter::from_fn(|| {
            let length = self.0.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
        })
        .collect()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = umount2("/run/systemd", MntFlags::MNT_DETACH);
    }
}

fn without_what_is_required_there_is_no_start(runtime: &str) {
    let (key, journal) = ("org.containers.qm.hotplug.x", Journal::open());
    for (selector, code, reason) in [
        ("devname=vcsa51;required", 4, "it is required, and no device that matches 'devname=vcsa51' is plugged in"),
        ("devname=vcsa51;required;wait=200ms", 4, "matches 'devname=vcsa51' is plugged in after 200ms"),
        ("devname=vcsa;gid=wizards;required", 5, "it is required, and what x asks for is not granted: its /etc/group"),
        ("devname=vcsa;nonsense;required", 2, "column 14: there is no category 'nonsense'"),
    ] {
        let name = format!("qmh-required-{runtime}");
        let said = fails(runtime, &name, &asks("x", selector));
        assert!(said.stderr.contains(&format!("precreate]: exit status {code}")), "{said:?}");
        // Podman throws away what its hook wrote to stderr.
        let log = std::fs::read_to_string(HOOK_LOG).unwrap();
        for text in [log.lines().last().unwrap(), journal.read().last().unwrap()] {
            assert!(text.contains(reason) && text.contains(key), "{selector}: {reason} in {text}");
            assert!(text.contains(&format!("container '{name} (")), "{text}");
        }
    }
    drop(journal);

    // Its start waits for it.
    let started = Instant::now();
    let device = std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(1));
        console(51)
    });
    let c = start_with_hook(runtime, "qmh-awaited", &[&asks("x", "devname=vcsa51;required;wait=30s;as=/dev/screen")]);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert!(c.opens("<>", "/dev/screen"));
    drop(device.join().unwrap());

    // What is not required is passed over, and the other annotations count.
    let name = format!("qmh-typo-{runtime}");
    let options = [asks("typo", "devname=vcsa; nonsense"), asks("one", "devname=vcsa;as=/dev/screen")];
    let c = start_with_hook(runtime, &name, &options.each_ref().map(String::as_str));
    assert!(c.node("/dev/screen").is_some() && c.node("/dev/vcsa").is_none());
    let typo = "annotation org.containers.qm.hotplug.typo";
    let log = std::fs::read_to_string(HOOK_LOG).unwrap();
    assert!(log.contains(&format!("Skipping {typo}: column 15: there is no category 'nonsense'")), "{log}");
    let agent = Agent::start();
    assert!(agent.log().contains(&format!("{typo} ignored: column 15: there is no category")), "{}", agent.log());
    assert_eq!(listed(&c), ["/dev/screen /dev/vcsa start"]);
}

fn who_has_it_exclusively_has_it_alone(runtime: &str) {
    let (x, mine, device) = (asks("x", "devname=vcsa51;exclusive"), "/dev/vcsa51", console(51));
    let names = ["first", "second", "shares", "late"].map(|name| format!("qmh-alone-{name}-{runtime}"));
    // Without an agent nobody knows who has it. The agent leaves it to the one that was first.
    let first = start_with_hook(runtime, &names[0], &[&x]);
    let second = start_with_hook(runtime, &names[1], &[&x]);
    assert!(first.node(mine).is_some() && second.node(mine).is_some());
    by_hand(&second, "c 7 179");
    let agent = Agent::start();
    assert!(first.opens("<>", mine) && second.look(mine).is_none() && refused(&second));
    device.unplug();
    wait_for("it to go", || grants().is_empty() && first.look(mine).is_none());
    device.again();
    let told = |who: &str| format!("container {who} has it, and only one may: it is free when that ends");
    wait_for("the grant", || first.node(mine).is_some());
    wait_for("a line", || agent.log().contains(&format!("{mine} not granted at {mine}: {}", told(&names[0]))));
    assert!(first.opens("<>", mine) && second.look(mine).is_none() && refused(&second));
    assert_eq!(grants().len(), 1);

    // Nobody else gets it: by hand, by a rule that would share it, or at its start.
    let alone = format!("container {} has {mine}, and only one may", names[0]);
    for c in [&names[1], &second.id] {
        qm(&["attach", c, mine, "/dev/other"]).fails(5, &alone);
    }
    let third = start_with_hook(runtime, &names[2], &[&asks("y", "devname=vcsa51;as=/dev/other")]);
    let fourth = start_with_hook(runtime, &names[3], &[&x]);
    let log = std::fs::read_to_string(HOOK_LOG).unwrap();
    let lines = log.matches(&format!("Not adding device: {mine}: {}", told(&names[0]))).count();
    assert_eq!((lines, third.look("/dev/other").is_none(), fourth.look(mine).is_none()), (2, true, true), "{log}");
    by_hand(&fourth, "c 7 179");
    assert!(refused(&fourth));

    // The one that has waited for longest is next.
    drop(first);
    wait_for("the second's turn", || second.node(mine).is_some());
    assert!(second.opens("<>", mine));
    assert_eq!((grants().len(), &grants()[0]["container"]), (1, &names[1].as_str().into()));
    assert!(agent.log().contains(&told(&names[1])), "{}", agent.log());
    // Shared with nobody, it is withdrawn from nobody: what a person gives counts before it.
    drop((second, fourth));
    wait_for("the third's turn", || third.node("/dev/other").is_some());
    assert!(third.opens("<>", "/dev/other"));
}

fn names_that_begin_alike_and_number_zero() {
    configure("enable = ['block']\n");
    let agent = Agent::start();
    let free = !std::path::Path::new("/sys/block/loop0/loop").exists();
    type Asked<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)]);
    let cases: [Asked<'_>; 3] = [
        // Also with console 1 there, console 11 is another one.
        ("qmh-alike", &["devname=vcs1", "devname=vcsa1?;as=/dev/other"], &[("/dev/vcs1", "7:1")]),
        (
            "qmh-zero",
            &["devname=vcs", "devname=/dev/tty0;as=/dev/screen"],
            &[("/dev/vcs", "7:0"), ("/dev/screen", "4:0")],
        ),
        ("qmh-disk", &["block;devname=loop0;as=/dev/disk"], if free { &[("/dev/disk", "7:0")] } else { &[] }),
    ];
    let containers = cases.map(|(name, selectors, expected)| {
        let options: Vec<String> = selectors.iter().enumerate().map(|(n, s)| asks(&format!("r{n}"), s)).collect();
        let c = Container::start("crun", name, &options.iter().map(String::as_str).collect::<Vec<_>>());
        wait_for(name, || listed(&c).len() == expected.len());
        for (path, number) in expected {
            let node = c.node(path).unwrap();
            assert_eq!(node.split(' ').nth(1), Some(*number), "{name} {path}");
            assert!(c.opens("<", path), "{name} {path}");
        }
        c
    });
    let [alike, zero, disk] = &containers;
    let inode = |c: &Container, path: &str| std::os::unix::fs::MetadataExt::ino(&c.look(path).unwrap());
    let before = inode(alike, "/dev/vcs1");
    let eleven = console(11);
    wait_for("console 11", || alike.node("/dev/other").is_some_and(|node| node.starts_with("c 7:139 ")));
    assert_eq!(listed(alike).len(), 2, "{:?}", listed(alike));
    assert!(alike.look("/dev/vcs11").is_none());
    eleven.unplug();
    wait_for("console 11 to go", || listed(alike).len() == 1);
    assert!(alike.opens("<", "/dev/vcs1"));
    assert_eq!((inode(alike, "/dev/vcs1"), listed(zero).len()), (before, 2));
    // A number with another kind is another device.
    zero.past_the_filter("mknod /dev/byhand b 7 0").ok();
    assert!(refused(zero));
    by_hand(disk, "c 7 0");
    assert!(refused(disk));
    agent.stop();
}

/// podman 4.3 takes what follows a comma for another annotation.
fn a_selector_that_podman_has_cut_stands_for_nothing() {
    let cut = "--annotation=org.containers.qm.hotplug.x=devname=vcsa?*,as=/dev/screen";
    let c = start_with_hook("crun", "qmh-cut", &[cut, "--annotation=org.containers.qm.device.ttys=true"]);
    let agent = Agent::start();
    assert!(c.node("/dev/tty3").is_some());
    let version = podman(&["--version"]).ok();
    if !version.contains("version 4.3.") {
        return;
    }
    let advice = "podman had cut a selector at its commas: write ';' in their place, org.containers.qm.hotplug.x=devname=vcsa?*;as=";
    assert!(std::fs::read_to_string(HOOK_LOG).unwrap().contains(advice));
    assert!(agent.log().contains(advice), "{}", agent.log());
    assert_eq!((listed(&c).len(), c.look("/dev/vcsa1").is_none()), (8, true));
}

fn of_two_at_start_the_first_has_the_name() {
    let devices = [console(52), console(51)];
    let x = asks("x", "devname=vcsa5[12];as=/dev/screen;access=r");
    let c = start_with_hook("runc", "qmh-two-at-start", &[&x]);
    let is_read_only = |number: &str| {
        assert!(c.node("/dev/screen").is_some_and(|node| node.starts_with(&format!("c {number} "))), "{number}");
        assert_eq!((c.open("<", "/dev/screen"), c.open(">", "/dev/screen")), (Ok(()), REFUSED.map_err(Into::into)));
    };
    is_read_only("7:179");
    let log = std::fs::read_to_string(HOOK_LOG).unwrap();
    assert!(log.contains("Not adding device: /dev/vcsa52: /dev/screen is another device's already"), "{log}");
    let agent = Agent::start();
    let waiting = "/dev/vcsa52 not granted at /dev/screen: /dev/screen is /dev/vcsa51 there";
    assert!(agent.log().contains(waiting), "{}", agent.log());
    assert_eq!(listed(&c), ["/dev/screen /dev/vcsa51 start"]);
    devices[1].unplug();
    wait_for("the other one", || listed(&c) == ["/dev/screen /dev/vcsa52 rule:x"]);
    is_read_only("7:180");
    agent.stop();
}

fn what_went_before_the_agent_came_is_withdrawn() {
    let device = tap_with("02:00:00:00:00:51");
    let numbers = device.numbers();
    let x = asks("x", "subsystem=macvtap;attrs.address=02:00:00:00:00:51;as=/dev/screen;link=/dev/by/one");
    let gone = start_with_hook("crun", "qmh-went-early", &[&x]);
    assert!(gone.opens("<>", "/dev/by/one"));
    by_hand(&gone, &numbers);
    device.unplug();
    let agent = Agent::start();
    assert!(gone.look("/dev/screen").is_none() && gone.look("/dev/by/one").is_none() && refused(&gone));
    agent.stop();
    // The same where another device has its number.
    let device = tap_with("02:00:00:00:00:51");
    let other = start_with_hook("runc", "qmh-went-early-2", &[&x]);
    assert!(other.opens("<>", "/dev/by/one"));
    by_hand(&other, &numbers);
    device.unplug();
    let device = tap_with("02:00:00:00:00:52");
    let agent = Agent::start();
    assert_eq!(device.numbers(), numbers);
    for c in [&gone, &other] {
        assert!(c.look("/dev/screen").is_none() && c.look("/dev/by/one").is_none() && refused(c), "{}", c.name);
    }
    agent.stop();
}
