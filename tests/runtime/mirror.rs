//! What programs inside see of udev: the database at `/run/udev`, links, and messages to libudev.

use crate::Case;
use crate::plug::{block, console};
use crate::precreate;
use crate::support::podman::Container;
use crate::support::udev::{Group, Listener, Udevd, devpath};
use crate::support::{Agent, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("mirror::a_plug_is_heard_inside", a_plug_is_heard_inside),
    ("mirror::what_is_attached_is_heard_too", what_is_attached_is_heard_too),
    ("mirror::a_container_sees_it_from_its_start", a_container_sees_it_from_its_start),
    ("mirror::those_who_share_a_network_hear_it_once", those_who_share_a_network_hear_it_once),
    ("mirror::the_next_agent_goes_on", the_next_agent_goes_on),
    ("mirror::who_does_not_want_it_has_none_of_it", who_does_not_want_it_has_none_of_it),
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
    assert!(inside.is_silent() && outside.is_silent(), "the host's own network hears udevd itself, not us");
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
