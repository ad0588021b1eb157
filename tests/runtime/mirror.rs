//! What programs inside see of udev: the database at `/run/udev`, links, and messages to libudev.

use crate::Case;
use crate::plug::{block, console};
use crate::precreate;
use crate::support::podman::Container;
use crate::support::udev::{Group, Listener, Udevd, devpath};
use crate::support::{Agent, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("mirror::a_plug_is_heard_inside", a_plug_is_heard_inside),
    ("mirror::what_is_attached_is_heard_too", what_is_attached_is_heard_too),
    ("mirror::a_container_sees_it_from_its_start", a_container_sees_it_from_its_start),
    ("mirror::those_who_share_a_network_hear_it_once", those_who_share_a_network_hear_it_once),
    (
        "mirror::one_with_a_udevd_in_the_same_network_takes_nothing_from_the_others",
        one_with_a_udevd_in_the_same_network_takes_nothing_from_the_others,
    ),
    ("mirror::the_next_agent_goes_on", the_next_agent_goes_on),
    ("mirror::who_does_not_want_it_has_none_of_it", who_does_not_want_it_has_none_of_it),
    ("mirror::a_udevd_of_its_own_has_its_way", a_udevd_of_its_own_has_its_way),
    ("mirror::in_a_user_namespace_root_tells", in_a_user_namespace_root_tells),
    ("mirror::what_is_forged_tells_nobody_anything", what_is_forged_tells_nobody_anything),
    ("mirror::who_does_not_read_harms_nobody", who_does_not_read_harms_nobody),
    ("mirror::who_makes_it_deep_harms_nobody", who_makes_it_deep_harms_nobody),
];

const RULE: [&str; 2] = ["--annotation", "org.containers.qm.hotplug.console=devname=/dev/vcsa43"];
const RECORD: &str = "S:qmh-by-id/console\nI:1234\nE:ID_MODEL=Console\nE:ID_SERIAL=43\nG:qmh\nQ:qmh\nV:1\n";

fn event(action: &str, node: &str) -> Option<(String, String)> {
    Some((action.to_owned(), node.to_owned()))
}

fn a_plug_is_heard_inside(runtime: &str) {
    let udevd = Udevd::start();
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-hears", &RULE);
    let other = Container::start(runtime, "qmh-hears-not", &["--annotation", "org.containers.qm.device.ttyUSB=true"]);
    wait_for("/run/udev in it", || c.sh("test -e /run/udev/control").code == 0);
    let all = Listener::start(c.pid(), Group::Udev(&[]));
    let some = Listener::start(c.pid(), Group::Udev(&["vc", "sound"]));
    let none = Listener::start(c.pid(), Group::Udev(&["block"]));
    let foreign = Listener::start(other.pid(), Group::Udev(&[]));
    let device = console(43);
    assert!(all.is_silent(), "udevd has not spoken");
    udevd.record("c7:171", RECORD);
    let link = device.link("console");
    let devpath = devpath(&device.path);
    udevd.tell("add", &devpath);
    let heard = all.next().expect("the plug is heard");
    for (key, value) in [
        ("ACTION", "add"),
        ("DEVNAME", "/dev/vcsa43"),
        ("DEVPATH", &devpath),
        ("SUBSYSTEM", "vc"),
        ("MAJOR", "7"),
        ("MINOR", "171"),
        ("ID_MODEL", "Console"),
        ("ID_SERIAL", "43"),
        ("TAGS", ":qmh:"),
        ("DEVLINKS", &link),
    ] {
        assert_eq!(heard.get(key).map(String::as_str), Some(value), "{key} in {heard:?}");
    }
    assert!(c.opens("<>", &device.path), "what is told of can be opened");
    assert_eq!(c.sh("cat /run/udev/data/c7:171").ok(), RECORD);
    assert_eq!(
        c.sh("cd /run/udev; find . -type f | sort; readlink /dev/qmh-by-id/console").ok(),
        "./control\n./data/c7:171\n./tags/qmh/c7:171\n../vcsa43\n"
    );
    assert_ne!(c.past_the_filter("touch /run/udev/data/x || rm /run/udev/control").code, 0, "it is read-only");
    assert_eq!(some.event(), event("add", "/dev/vcsa43"));

    udevd.record("c7:171", &RECORD.replace("=Console", "=Changed"));
    udevd.tell("change", &devpath);
    let heard = all.next().expect("the change is heard");
    assert_eq!((&*heard["ACTION"], &*heard["ID_MODEL"]), ("change", "Changed"));
    assert_eq!(some.event(), event("change", "/dev/vcsa43"));
    assert!(c.sh("cat /run/udev/data/c7:171").ok().contains("Changed"));

    device.unplug();
    udevd.forget("c7:171");
    for listener in [&all, &some] {
        let heard = listener.next().expect("the unplug is heard");
        assert_eq!((&*heard["ACTION"], &*heard["DEVPATH"], &*heard["ID_MODEL"]), ("remove", &*devpath, "Changed"));
    }
    udevd.tell("remove", &devpath);
    assert_eq!(
        c.sh("cd /run/udev; find . -type f; ls /dev/qmh-by-id 2>&1 | grep -o No.*").ok(),
        "./control\nNo such file or directory\n"
    );
    for listener in [&all, &some, &none, &foreign] {
        assert!(listener.is_silent(), "each once, and nobody else");
    }
}

fn what_is_attached_is_heard_too(runtime: &str) {
    let _agent = Agent::start();
    let device = block(43);
    let c = Container::start(runtime, "qmh-attached", &[]);
    let early = Listener::start(c.pid(), Group::Udev(&[]));
    let run = c.sh("find /run").ok();
    qm(&["attach", &c.name, &device.path, "/dev/disk"]).ok();
    let late = Listener::start(c.pid(), Group::Udev(&["block"]));
    assert!(c.opens("<", "/dev/disk"));
    qm(&["detach", &c.name, "/dev/disk"]).ok();
    assert_eq!(late.event(), event("remove", &device.path));
    qm(&["attach", &c.name, &device.path]).ok();
    assert_eq!(late.event(), event("add", &device.path));
    // A second node of the same device is no news.
    qm(&["attach", &c.name, &device.path, "/dev/disk"]).ok();
    qm(&["detach", &c.name, &device.path]).ok();
    assert!(late.is_silent());
    qm(&["detach", &c.name, "/dev/disk"]).ok();
    assert_eq!(late.event(), event("remove", &device.path));
    assert_eq!((c.sh("find /run").ok(), views()), (run, 0), "nothing is left");
    assert!(early.is_silent(), "libudev hears nothing where there was no sign of udev when it began");
}

/// The names of what is in its database.
fn entries_in(c: &Container) -> String {
    c.sh("cd /run/udev && find . -type f | sort").stdout
}

/// The directories of the host's that containers are shown.
fn views() -> usize {
    std::fs::read_dir("/run/qm-hotplug/udev").map_or(0, Iterator::count)
}

fn a_container_sees_it_from_its_start(runtime: &str) {
    let udevd = Udevd::start();
    let device = console(43);
    udevd.record("c7:171", RECORD);
    let c = precreate::start(runtime, "qmh-view", &RULE);
    // Without an agent.
    assert_eq!(entries_in(&c), "./control\n./data/c7:171\n./tags/qmh/c7:171\n");
    assert_eq!((c.sh("cat /run/udev/data/c7:171").ok().as_str(), views()), (RECORD, 1));
    let listener = Listener::start(c.pid(), Group::Udev(&["vc"]));
    let agent = Agent::start();
    assert_eq!(listener.event(), event("add", &device.path));
    assert_eq!((entries_in(&c).lines().count(), views()), (3, 1), "the agent goes on with that one");
    agent.stop();
    let _agent = Agent::start();
    device.unplug();
    assert_eq!(listener.event(), event("remove", &device.path));
    assert_eq!(entries_in(&c), "./control\n");
    assert!(listener.is_silent());
    drop(c);
    wait_for("the view to go with the container", || views() == 0);
}

fn those_who_share_a_network_hear_it_once(runtime: &str) {
    let udevd = Udevd::start();
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-pod-a", &RULE);
    let network = format!("container:{}", c.name);
    let other = Container::start(runtime, "qmh-pod-b", &[&RULE[..], &["--network", &network]].concat());
    let host = Container::start(runtime, "qmh-host", &[&RULE[..], &["--network", "host"]].concat());
    [&c, &other, &host].iter().for_each(|c| wait_for("/run/udev", || c.sh("test -e /run/udev/control").code == 0));
    let inside = Listener::start(other.pid(), Group::Udev(&["vc"]));
    let outside = Listener::start(host.pid(), Group::Udev(&["vc"]));
    let device = console(43);
    udevd.record("c7:171", RECORD);
    let devpath = devpath(&device.path);
    for action in ["add", "change"] {
        udevd.tell(action, &devpath);
        assert_eq!(inside.event(), event(action, &device.path));
        assert!(inside.is_silent(), "each once for the network");
    }
    wait_for("all to have it", || [&c, &other, &host].iter().all(|c| c.opens("<>", &device.path)));
    // The first one's is gone, the other's is still there: nobody in the network hears of an unplug.
    qm(&["detach", &c.name, &device.path]).fails(5, "rule");
    device.unplug();
    assert_eq!(inside.event(), event("remove", &device.path));
    assert!(inside.is_silent());
    let heard: Vec<_> = std::iter::from_fn(|| outside.event()).map(|(action, _)| action).collect();
    assert_eq!(heard, ["add", "change"], "the host's own network hears udevd itself, each once, and not us");
}

/// It hears its own udevd, and is told nothing of udev's; the other one is.
fn one_with_a_udevd_in_the_same_network_takes_nothing_from_the_others(runtime: &str) {
    let udevd = Udevd::start();
    let own = place_with_control();
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-pod-c", &RULE);
    let network = format!("container:{}", c.name);
    let volume = format!("{own}:/run/udev");
    let with_own = [&RULE[..], &["--network", &network, "-v", &volume]].concat();
    let other = Container::start(runtime, "qmh-pod-d", &with_own);
    wait_for("/run/udev", || c.sh("test -e /run/udev/control").code == 0);
    let inside = Listener::start(c.pid(), Group::Udev(&["vc"]));
    let device = console(43);
    // Early, since it has a udevd.
    wait_for("the early one", || other.opens("<>", &device.path));
    udevd.record("c7:171", RECORD);
    let devpath = devpath(&device.path);
    for action in ["add", "change"] {
        udevd.tell(action, &devpath);
        assert_eq!(inside.event(), event(action, &device.path));
        assert!(inside.is_silent(), "each once");
    }
    // Said again, as by `udevadm trigger --action=add`, it is there all the same.
    udevd.tell("add", &devpath);
    assert!(inside.is_silent(), "added once");
    device.unplug();
    assert_eq!(inside.event(), event("remove", &device.path));
    assert!(inside.is_silent());
}

fn the_next_agent_goes_on(runtime: &str) {
    let udevd = Udevd::start();
    let agent = Agent::start();
    let c = Container::start(runtime, "qmh-goes-on", &RULE);
    wait_for("/run/udev", || c.sh("test -e /run/udev/control").code == 0);
    let listener = Listener::start(c.pid(), Group::Udev(&["vc"]));
    let device = console(43);
    udevd.record("c7:171", RECORD);
    udevd.tell("add", &devpath(&device.path));
    assert_eq!(listener.event(), event("add", &device.path));
    agent.stop();
    let agent = Agent::start();
    assert!(listener.is_silent(), "that is known");
    agent.stop();
    udevd.record("c7:171", &RECORD.replace("=Console", "=Changed"));
    let agent = Agent::start();
    assert_eq!(listener.next().map(|heard| heard["ID_MODEL"].clone()), Some("Changed".into()));
    agent.stop();
    device.unplug();
    udevd.forget("c7:171");
    let last = Agent::start();
    assert_eq!(listener.event(), event("remove", &device.path));
    assert_eq!((entries_in(&c), views()), ("./control\n".into(), 1));
    last.stop();
    qm(&["agent", "--release"]).ok();
    assert_eq!((entries_in(&c), views()), (String::new(), 0), "and nothing of it is left");
}

fn who_does_not_want_it_has_none_of_it(runtime: &str) {
    let udevd = Udevd::start();
    let device = console(43);
    udevd.record("c7:171", RECORD);
    let _agent = Agent::start();
    let with = |value: &str| {
        [&RULE[..], &["--annotation", value]].concat().iter().map(|it| it.to_string()).collect::<Vec<_>>()
    };
    let start = |name: &str, options: Vec<String>| {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        precreate::start(runtime, name, &options)
    };
    let no = start("qmh-no", with("org.containers.qm.udev=false"));
    // One that has a udevd of its own, or the host's database.
    let own = place_with_control();
    let own_udevd = start("qmh-own", [with("x=y"), vec!["-v".into(), format!("{own}:/run/udev")]].concat());
    let hosts = start("qmh-hosts", [with("x=y"), vec!["-v".into(), "/run/udev:/run/udev:ro".into()]].concat());
    for (c, expected) in [(&no, ""), (&own_udevd, "./control\n"), (&hosts, "./control\n./data/c7:171\n")] {
        wait_for("the grant", || c.opens("<>", &device.path));
        assert_eq!(entries_in(c), expected, "{}", c.name);
    }
    let listeners = [&own_udevd, &hosts].map(|c| Listener::start(c.pid(), Group::Udev(&["vc"])));
    udevd.tell("change", &devpath(&device.path));
    assert!(listeners[0].is_silent(), "its udevd tells those inside");
    assert_eq!(
        listeners[1].event(),
        event("change", &device.path),
        "the host's database is there, its messages are not"
    );
}

/// A directory that a udevd has its socket in.
fn place_with_control() -> String {
    let place = crate::support::podman::place().join("own-udev");
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join("control"), "").unwrap();
    place.display().to_string()
}

/// It hears of a device from the kernel, gives the node an owner and a mode, and is not disturbed.
fn a_udevd_of_its_own_has_its_way(runtime: &str) {
    let udevd = Udevd::start();
    let start = || Agent::start_with(&[("QM_HOTPLUG_LOG", "debug")]);
    let mut agent = start();
    let own = place_with_control();
    let c = Container::start(runtime, "qmh-udevd", &[&RULE[..], &["-v", &format!("{own}:/run/udev")]].concat());
    let other = Container::start(runtime, "qmh-no-udevd", &RULE);
    let listener = Listener::start(c.pid(), Group::Udev(&[]));
    wait_for("/run/udev", || other.sh("test -e /run/udev/control").code == 0);
    let device = console(43).owned_by(0, 5, 0o660);
    // Before the host's udevd has spoken.
    wait_for("the node", || c.node(&device.path).is_some());
    assert_eq!((c.node(&device.path).unwrap().as_str(), c.opens("<>", &device.path)), ("c 7:171 0:0 0600", true));
    assert_eq!(other.node(&device.path), None, "the others wait for that");
    c.sh("chown 7:8 /dev/vcsa43; chmod 666 /dev/vcsa43").ok();
    let node = || c.sh("stat -c '%i %Z %u:%g %a' /dev/vcsa43").ok();
    let before = node();
    udevd.record("c7:171", RECORD);
    let devpath = devpath(&device.path);
    for action in ["add", "change"] {
        udevd.tell(action, &devpath);
    }
    wait_for("the others to have it", || other.node(&device.path).is_some());
    for _ in 0..2 {
        assert_eq!(node(), before);
        agent.stop();
        agent = start();
    }
    assert!(listener.is_silent(), "its udevd tells those inside");
    assert_eq!(c.sh("ls /run/udev; ls /dev/qmh-by-id").stdout, "control\n", "and makes entries and links");
    device.unplug();
    wait_for("the node to go", || c.node(&device.path).is_none());
    let said = |log: &str| log.lines().rfind(|line| line.contains("udev has spoken of it")).map(str::to_owned);
    assert!(said(&agent.log()).is_some_and(|line| line.contains("before udev")), "{}", agent.log());
    drop(c);
    // Nobody is there any more for whom it counts.
    wait_for("the kernel's word to count no more", || {
        said(&agent.log()).is_some_and(|line| line.contains("once udev"))
    });
    agent.stop();
}

fn in_a_user_namespace_root_tells(runtime: &str) {
    let udevd = Udevd::start();
    let _agent = Agent::start();
    let c = Container::start_mapped(runtime, "qmh-mapped-hears", &RULE);
    wait_for("/run/udev in it", || c.sh("test -e /run/udev/control").code == 0);
    let (listener, kernels) = (Listener::start(c.pid(), Group::Udev(&["vc"])), Listener::start(c.pid(), Group::Kernel));
    let device = console(43);
    udevd.record("c7:171", RECORD);
    let link = device.link("console");
    udevd.tell("add", &devpath(&device.path));
    let heard = listener.next().expect("libudev takes it from root inside");
    assert_eq!((&*heard["ACTION"], &*heard["ID_MODEL"], &*heard["DEVLINKS"]), ("add", "Console", &*link));
    assert_eq!(c.sh("cat /run/udev/data/c7:171; readlink /dev/qmh-by-id/console").ok(), format!("{RECORD}../vcsa43\n"));
    device.unplug();
    assert_eq!(listener.event(), event("remove", &device.path));
    // The kernel's own events: by the kernel where the network namespace is the host's, by us where it is not; once.
    let heard: Vec<_> = std::iter::from_fn(|| kernels.next()).collect();
    let of_device = heard.iter().filter(|heard| heard.get("DEVNAME").is_some_and(|name| name == "vcsa43"));
    assert_eq!(of_device.map(|heard| &*heard["ACTION"]).collect::<Vec<_>>(), ["add", "remove"], "{heard:?}");
    assert_eq!(c.sh("find /run/udev -type f; ls /dev/qmh-by-id 2>/dev/null").stdout, "/run/udev/control\n");
}

fn what_is_forged_tells_nobody_anything(runtime: &str) {
    let udevd = Udevd::start();
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-forged", &RULE);
    wait_for("/run/udev in it", || c.sh("test -e /run/udev/control").code == 0);
    let (listener, host) =
        (Listener::start(c.pid(), Group::Udev(&[])), Listener::start(std::process::id(), Group::Udev(&[])));
    let device = console(43);
    udevd.record("c7:171", RECORD);
    let devpath = devpath(&device.path);
    // Of what was not granted, of what is no action, and of a device whose end was not the kernel's.
    udevd.tell("add", "/devices/virtual/mem/null");
    udevd.tell("explode", &devpath);
    udevd.tell("remove", &devpath);
    assert!(listener.is_silent());
    udevd.tell_as("add", &devpath, "18446744073709551615");
    assert_eq!(listener.event(), event("add", &device.path));
    // Whatever number somebody has made up, what comes after it is heard.
    udevd.tell("change", &devpath);
    assert_eq!(listener.event(), event("change", &device.path));
    // The same message again, and an old one, are no news.
    udevd.tell_as("change", &devpath, "1");
    assert!(listener.is_silent());
    let heard: Vec<_> = std::iter::from_fn(|| host.event()).map(|(action, _)| action).collect();
    assert_eq!(heard, ["add", "remove", "add", "change", "change"], "the host hears its udevd alone, and not us");
}

fn who_does_not_read_harms_nobody(runtime: &str) {
    let udevd = Udevd::start();
    let agent = Agent::start();
    let c = Container::start(runtime, "qmh-deaf", &RULE);
    let other = Container::start(runtime, "qmh-awake", &RULE);
    [&c, &other].iter().for_each(|c| wait_for("/run/udev", || c.sh("test -e /run/udev/control").code == 0));
    let (deaf, awake) = (Listener::start(c.pid(), Group::Udev(&[])), Listener::start(other.pid(), Group::Udev(&[])));
    let device = console(43);
    udevd.record("c7:171", RECORD);
    let devpath = devpath(&device.path);
    udevd.tell("add", &devpath);
    assert_eq!((deaf.event(), awake.event()), (event("add", &device.path), event("add", &device.path)));
    deaf.stop();
    for _ in 0..1000 {
        udevd.tell("change", &devpath);
    }
    for number in 0..1000 {
        assert_eq!(awake.event(), event("change", &device.path), "{number}");
    }
    // An unplug, too, is felt at once.
    device.unplug();
    assert_eq!(awake.event(), event("remove", &device.path));
    assert_eq!(c.node(&device.path), None);
    assert!(grants().is_empty());
    agent.stop();
}

/// With CAP_SYS_ADMIN a container can make its view writable.
fn who_makes_it_deep_harms_nobody(runtime: &str) {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    let agent = Agent::start();
    let c = Container::start(runtime, "qmh-deep", &[&RULE[..], &["--cap-add=all"]].concat());
    wait_for("/run/udev in it", || c.sh("test -e /run/udev/control").code == 0);
    c.sh("mount -o remount,rw,bind /run/udev && ln -s / /run/udev/data/root").ok();
    let open = |at: std::os::fd::BorrowedFd<'_>, path: &str| {
        openat(at, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    let mut at = open(CWD, &format!("/proc/{}/root/run/udev/data", c.pid()));
    for _ in 0..50_000 {
        mkdirat(&at, "d", Mode::RWXU).unwrap();
        at = open(std::os::fd::AsFd::as_fd(&at), "d");
    }
    drop(at);
    let views = || std::fs::read_dir("/run/qm-hotplug/udev").map_or(0, Iterator::count);
    assert_eq!(views(), 1);
    drop(c);
    let other = Container::start(runtime, "qmh-after-deep", &RULE);
    wait_for("/run/udev in the next one", || other.sh("test -e /run/udev/control").code == 0);
    assert!(agent.log().contains("there is too much in it"), "{}", agent.log());
    agent.stop();
    // What was too much goes bit by bit, with each agent.
    wait_for("nothing to be left of it", || {
        Agent::start().stop();
        views() == 1
    });
}
