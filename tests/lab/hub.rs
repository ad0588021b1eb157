//! A hub with twenty devices behind it, unplugged at once.

use serde_json::json;

use crate::Case;
use crate::agent::{Agent, status};
use crate::container::Container;
use crate::plug::{ASKS_FOR_STICKS, FIRST_PLUG};
use crate::vm::{Plugged, Vm};

pub(crate) const CASES: &[Case] = &[("hub::twenty_sticks_go_and_come_at_once", twenty_sticks_go_and_come_at_once)];

const STICKS: usize = 20;
/// The hub on the machine's own port, as the kernel names it.
const AUTHORIZED: &str = "/sys/bus/usb/devices/1-6/authorized";

fn twenty_sticks_go_and_come_at_once(vm: &Vm) {
    let hub = |id: &str, port: &str| vm.plug(id, "usb-hub", json!({ "port": port, "ports": 8 }));
    // Fields are dropped in their order: sticks before their hubs, and those before the one that they are at.
    struct Tree<'vm> {
        sticks: Vec<Plugged<'vm>>,
        _inner: Vec<Plugged<'vm>>,
        _outer: Plugged<'vm>,
    }
    let outer = hub("hub", "6");
    let inner = (1..=3).map(|n| hub(&format!("hub{n}"), &format!("6.{n}"))).collect();
    let mut tree = Tree { sticks: Vec::new(), _inner: inner, _outer: outer };
    vm.wait_ok("the hubs", FIRST_PLUG, "test -e /sys/bus/usb/devices/1-6.3");
    for n in 0..STICKS {
        let port = format!("6.{}.{}", n / 7 + 1, n % 7 + 1);
        tree.sticks.push(vm.plug(
            &format!("STICK{n}"),
            "usb-serial",
            json!({ "serial": format!("STICK{n}"), "port": port }),
        ));
    }
    let all = format!("test $(ls -d /dev/ttyUSB* | wc -l) = {STICKS} && udevadm settle");
    vm.wait_ok("all sticks", FIRST_PLUG * 2, &all);
    let agent = Agent::start(vm);
    let container = Container::run(vm, "crun", "hub", ASKS_FOR_STICKS);
    let has = |count: usize| {
        vm.wait("the grants", FIRST_PLUG, |vm| (status(vm)["entries"] == count).then_some(()));
        let nodes = container.nodes();
        assert_eq!(nodes.len(), count, "{nodes:?}");
    };
    has(STICKS);
    let paths: Vec<String> = (0..STICKS).map(|n| format!("/dev/ttyUSB{n}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    assert_eq!(container.open_all(&paths), vec!["opens"; STICKS]);

    vm.ok(&format!("echo 0 >{AUTHORIZED}"));
    has(0);
    let numbers: Vec<String> = (0..STICKS).map(|n| format!("c 188 {n}")).collect();
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    assert_eq!(container.open_all_by_hand(&numbers), vec!["Operation not permitted"; STICKS]);

    vm.ok(&format!("echo 1 >{AUTHORIZED}"));
    vm.wait_ok("all sticks again", FIRST_PLUG * 2, &all);
    has(STICKS);
    assert_eq!(container.open_all(&paths), vec!["opens"; STICKS]);
    agent.print_times("twenty sticks at once");
}
