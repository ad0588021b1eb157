//! `detach` on running containers, without an agent.

use crate::Case;
use crate::attach::REFUSED;
use crate::plug::{block, console, one_of_each};
use crate::state::{entries, observe, refused};
use crate::support::podman::Container;
use crate::support::{assert_nothing_left, grants, qm};

pub(crate) const CASES: &[Case] = &[
    ("detach::by_destination_by_device_and_by_link", by_destination_by_device_and_by_link),
    ("detach::an_unplugged_device", an_unplugged_device),
    ("detach::what_the_container_put_in_its_place_stays", what_the_container_put_in_its_place_stays),
    ("detach::a_node_of_the_containers_own_stays", a_node_of_the_containers_own_stays),
    ("detach::who_has_it_open_still_is_named", who_has_it_open_still_is_named),
    ("detach::what_is_not_attached_is_named", what_is_not_attached_is_named),
    ("detach::the_last_one_takes_the_programs_along", the_last_one_takes_the_programs_along),
];

fn by_destination_by_device_and_by_link(runtime: &str) {
    let device = block(41);
    let link = device.link("first");
    let c = Container::start(runtime, "qmh-detach", &[]);
    let before = observe(&[c.pid()]);
    for name in ["/dev/zigbee", &device.path, &link] {
        qm(&["attach", &c.name, &device.path, "/dev/zigbee"]).ok();
        c.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
        assert!(c.opens("<>", "/dev/zigbee") && c.opens("<>", "/dev/byhand"), "{name}");
        assert_eq!(qm(&["detach", &c.name, name]).ok(), "qmh-detach: /dev/zigbee is gone\n");
        assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into), "{name}");
        c.sh("rm /dev/byhand").ok();
        assert_eq!(observe(&[c.pid()]), before, "{name}: everything is as it was");
    }
}

fn who_has_it_open_still_is_named(runtime: &str) {
    let device = block(43);
    let c = Container::start(runtime, "qmh-holder", &[]);
    qm(&["attach", &c.name, &device.path]).ok();
    c.sh(&format!("sleep 77 3<{} >/dev/null 2>&1 &", device.path)).ok();
    let said = qm(&["detach", &c.name, &device.path]).ok();
    assert!(said.contains("is gone; still open in ") && said.contains("(sleep), where it stays usable"), "{said}");
    assert_eq!(c.open("<", &device.path), Err("no device node".into()));
}

fn an_unplugged_device(runtime: &str) {
    let c = Container::start(runtime, "qmh-unplugged", &[]);
    let before = observe(&[c.pid()]);
    for device in one_of_each(42) {
        qm(&["attach", &c.name, &device.path]).ok();
        device.unplug();
        // Nobody follows unplugs without an agent, but `list` sees them.
        assert_eq!(grants()[0]["note"], "the device is unplugged");
        qm(&["detach", &c.name, &device.path]).ok();
        assert_eq!(observe(&[c.pid()]), before, "{}", device.path);
    }
    // Another device of that number takes the place of one that is gone.
    let device = block(42);
    qm(&["attach", &c.name, &device.path]).ok();
    device.unplug();
    device.again();
    qm(&["attach", &c.name, &device.path]).ok();
    assert_eq!((grants().len(), grants()[0].get("note")), (1, None));
    assert!(c.opens("<>", &device.path));
}

fn what_the_container_put_in_its_place_stays(runtime: &str) {
    let device = block(43);
    let c = Container::start(runtime, "qmh-inplace", &[]);
    qm(&["attach", &c.name, &device.path, "/dev/a/x"]).ok();
    c.sh("rm /dev/a/x && echo mine >/dev/a/x").ok();
    qm(&["detach", &c.name, "/dev/a/x"]).ok();
    assert_eq!(c.sh("cat /dev/a/x").ok(), "mine\n");
    assert_eq!(entries(), []);
}

fn a_node_of_the_containers_own_stays(runtime: &str) {
    let device = console(43);
    let c = Container::start(runtime, "qmh-own", &[]);
    c.past_the_filter(&format!("mknod -m 604 {} {}", device.path, device.numbers())).ok();
    qm(&["attach", &c.name, &device.path, "--mode", "0666"]).ok();
    assert!(c.opens("<>", &device.path));
    assert_eq!(grants()[0]["node"], "container's");
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.node(&device.path).unwrap(), "c 7:171 0:0 0604", "it was there before and is left as it was");
    assert_eq!(c.open("<>", &device.path), REFUSED.map_err(Into::into));
}

fn what_is_not_attached_is_named(runtime: &str) {
    let (device, other) = (block(44), block(45));
    let (c, d) = (Container::start(runtime, "qmh-named", &[]), Container::start(runtime, "qmh-named-2", &[]));
    qm(&["attach", &c.name, &device.path]).ok();
    let pids = [c.pid(), d.pid()];
    for (name, path) in [
        (&c.name, &other.path[..]),
        (&c.name, "/dev/nothing"),
        (&c.name, "loop44"),
        (&c.name, "/dev/null"),
        (&d.name, &device.path),
    ] {
        let line = refused(&pids, || qm(&["detach", name, path]), 4, path);
        assert!(line.contains(&format!("'{name}'")), "{line}");
    }
    assert!(c.opens("<>", &device.path));
}

fn the_last_one_takes_the_programs_along(runtime: &str) {
    let (first, second) = (block(46), block(47));
    let c = Container::start(runtime, "qmh-last", &[]);
    qm(&["attach", &c.name, &first.path]).ok();
    qm(&["attach", &c.name, &second.path]).ok();
    qm(&["detach", &c.name, &first.path]).ok();
    assert!(c.opens("<>", &second.path));
    qm(&["detach", &c.name, &second.path]).ok();
    assert_nothing_left();
}
