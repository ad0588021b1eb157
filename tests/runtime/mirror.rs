//! What programs inside see of udev: the database at `/run/udev`, links, and messages to libudev.

use crate::Case;
use crate::plug::{block, console};
use crate::support::podman::Container;
use crate::support::udev::{Group, Listener, Udevd, devpath};
use crate::support::{Agent, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("mirror::a_plug_is_heard_inside", a_plug_is_heard_inside),
    ("mirror::what_is_attached_is_heard_too", what_is_attached_is_heard_too),
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
