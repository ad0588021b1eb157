//! The options of a selector: where the node is, what links to it, who may open it, and what comes with it.

use serde_json::json;

use crate::Case;
use crate::agent::Agent;
use crate::container::Container;
use crate::everything::nodes_of_host;
use crate::gadget::{Function, Gadget};
use crate::hook::Packaged;
use crate::plug::FIRST_PLUG;
use crate::select::{NOTHING, asks, assert_has, stick};
use crate::vm::{Plugged, Vm};

pub(crate) const CASES: &[Case] = &[
    ("select_options::sticks_by_name_link_and_owner", sticks_by_name_link_and_owner),
    ("select_options::a_board_that_comes_back_as_another", a_board_that_comes_back_as_another),
];

/// The stick that most is asked of.
const A1: &str = "/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_A1-if00-port0";
const B2: &str = "/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_B2-if00-port0";
/// One of the ports of a device that has several.
const PORT_06: &str = "/dev/serial/by-id/usb-Lab_Eight_ports_G1-if06-port0";

fn sticks_by_name_link_and_owner(vm: &Vm) {
    let asked = [
        (
            "zigbee",
            "usb=0403:6001:A1,as=/dev/app/zigbee,link=/dev/by/name/stick,link=/dev/z2,links=udev,mode=0640,uid=1234,gid=lab",
        ),
        ("one", "usb=0403:6001,as=/dev/one"),
        ("second", "devname=ttyUSB1,as=/dev/second"),
        ("eleventh", "devname=/dev/ttyUSB10,as=/dev/eleventh"),
        ("port", "usb=2e8a:a000:G1:06,as=/dev/port"),
    ];
    let asked: String = asked.iter().map(|(name, selector)| asks(vm, name, selector)).collect();
    let _installed = Packaged::install(vm);
    let agent = Agent::start(vm);
    let mut containers = vec![Container::run(vm, "crun", "options-crun", &asked)];
    // A name of its own for a number, which the host has not.
    vm.ok("cd /var/tmp/options-crun/etc && echo lab:x:4321: >>group");
    let pairs = |one: &'static str, zigbee: &'static str, second: &'static str, eleventh: &'static str, port| {
        let wanted = [("one", one), ("app/zigbee", zigbee), ("second", second), ("eleventh", eleventh), ("port", port)];
        wanted.map(|(name, host)| (format!("/dev/{name}"), host))
    };

    let b2 = stick(vm, "B2", "6");
    assert_has(vm, &containers[0], &pairs(B2, NOTHING, NOTHING, NOTHING, NOTHING), "with one stick");
    let a1 = stick(vm, "A1", "5");
    // By device path this one would be the first, but the other has the name.
    let both = pairs(B2, A1, A1, NOTHING, NOTHING);
    assert_has(vm, &containers[0], &both, "with two sticks");
    has_links(vm, &containers[0], false);
    let told = vm.ok("journalctl --sync; journalctl -u qmh-agent -o cat | grep /dev/one");
    assert!(told.lines().any(|line| line.contains("/dev/ttyUSB1")), "nothing tells of the second match: {told}");
    agent.restart();
    assert_has(vm, &containers[0], &both, "after a restart of the agent");

    a1.unplug();
    assert_has(vm, &containers[0], &pairs(B2, NOTHING, NOTHING, NOTHING, NOTHING), "when the second was gone");
    // Of the second stick nothing, of the first the links that udev has made on the host.
    let left =
        vm.ok(&containers[0].outside("busybox find /dev/app /dev/by /dev/serial /dev/z2 ! -type d 2>/dev/null; true"));
    assert_eq!(sorted(&left), sorted(&links_of(vm, "/dev/ttyUSB0")), "left over");
    vm.ok(&containers[0].outside("busybox test ! -e /dev/app -a ! -e /dev/by"));
    let a1 = stick(vm, "A1", "5");

    Container::restart_all(vm, &mut containers);
    let container = &containers[0];
    assert_has(vm, container, &pairs(A1, A1, A1, NOTHING, NOTHING), "after a restart of the container");
    has_links(vm, container, true);

    let more: Vec<Plugged<'_>> = [("C3", "7"), ("D4", "8"), ("E5", "9")]
        .map(|(serial, port)| vm.plug(serial, "usb-serial", json!({ "serial": serial, "port": port })))
        .into();
    vm.wait_ok("five sticks", FIRST_PLUG, "test -c /dev/ttyUSB4 && udevadm settle");
    let ports = Gadget::plug(vm, Function::Ports, 0xa000, "Eight ports");
    assert_has(vm, container, &pairs(A1, A1, "/dev/ttyUSB1", "/dev/ttyUSB10", PORT_06), "with eleven");

    a1.unplug();
    assert_has(vm, container, &pairs(B2, NOTHING, NOTHING, "/dev/ttyUSB10", PORT_06), "when the first was gone");
    let left =
        vm.ok(&container.outside("busybox find /dev/app /dev/by /dev/serial /dev/z2 ! -type d 2>/dev/null; true"));
    let kept = ["/dev/ttyUSB0", "/dev/ttyUSB10", PORT_06].map(|node| links_of(vm, node)).concat();
    assert_eq!(sorted(&left), sorted(&kept), "left over");

    drop((b2, more, ports));
    assert_has(vm, container, &pairs(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING), "when all were gone");
    agent.print_times("options");
}

/// Those that the container asked for and those that udev has made on the host. What is there from the start has nodes
/// in the place of links, because its specification knows no others.
#[track_caller]
fn has_links(vm: &Vm, container: &Container<'_>, from_start: bool) {
    let links = links_of(vm, "/dev/ttyUSB1");
    assert!(links.contains("/dev/serial/by-path/"), "{links}");
    let links: Vec<&str> = links.split_whitespace().chain(["/dev/by/name/stick", "/dev/z2"]).collect();
    let node = "1234:4321 640 bc:1";
    let (shown, expected) = if from_start { ("-c '%u:%g %a %t:%T'", node) } else { ("-c %N", "-> '/dev/app/zigbee'") };
    let found = vm.ok(&container.outside(&format!("stat {shown} /dev/app/zigbee {}", links.join(" "))));
    for (found, path) in found.lines().skip(1).zip(&links) {
        assert!(found.ends_with(expected), "{path}: {found}");
    }
    assert_eq!(container.open_all(&links), vec!["opens"; links.len()], "{links:?}");
    assert_eq!(container.node("/dev/app/zigbee"), "character special file bc:1 1234:4321 640");
}

/// What udev has made on the host for this node, apart by blanks, with one more at the end.
#[track_caller]
fn links_of(vm: &Vm, node: &str) -> String {
    vm.ok(&format!("udevadm info --query=symlink --root {node}")) + " "
}

fn sorted(paths: &str) -> Vec<&str> {
    let mut paths: Vec<&str> = paths.split_whitespace().collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// A program of the host that keeps a modem's number from being used again; ended on drop.
struct Holder<'vm>(&'vm Vm);

impl<'vm> Holder<'vm> {
    #[track_caller]
    fn start(vm: &'vm Vm, path: &str) -> Self {
        let holder = Self(vm);
        let open = format!(r#"use Fcntl; sysopen(F, "{path}", O_RDWR | O_NOCTTY) or die $!; sleep 100000"#);
        vm.ok(&format!("systemd-run --quiet --collect --unit=lab-holder perl -e '{open}'"));
        let is_held = format!("ls -l /proc/$(systemctl show -p MainPID --value lab-holder)/fd | grep -q {path}");
        vm.wait_ok("a program to hold it", FIRST_PLUG, &is_held);
        holder
    }
}

impl Drop for Holder<'_> {
    fn drop(&mut self) {
        self.0.sh("systemctl stop lab-holder");
    }
}

fn a_board_that_comes_back_as_another(vm: &Vm) {
    let asked = [
        ("board", "usb=2e8a:000a,as=/dev/board"),
        ("loader", "usb=2e8a:8003,as=/dev/loader,access=r"),
        ("keyboard", "subsystem=input,usb=0627:0001:K1,children"),
        ("sound", "subsystem=sound,usb=46f4:0002"),
    ];
    let asked: String = asked.iter().map(|(name, selector)| asks(vm, name, selector)).collect();
    let agent = Agent::start(vm);
    let container = Container::run(vm, "runc", "board-runc", &asked);
    let is = |board: &'static str| [("/dev/board".to_owned(), board)];

    let gadget = Gadget::plug(vm, Function::Modem, 0x000a, "Board");
    assert_has(vm, &container, &is("/dev/ttyACM0"), "at first");
    assert_eq!(container.node("/dev/loader"), "nothing");
    let holder = Holder::start(vm, "/dev/ttyACM0");
    gadget.come_back_as(0x8003, "Boot loader");
    assert_has(vm, &container, &is(NOTHING), "as a boot loader");
    container.wait_for("/dev/loader");
    assert_eq!(container.node("/dev/loader").split(' ').nth(3), Some("a6:1"));
    assert_eq!(container.open_as("<", "/dev/loader"), "opens");
    assert_eq!(container.open("/dev/loader"), "Operation not permitted");
    drop(holder);
    gadget.come_back_as(0x000a, "Board");
    assert_has(vm, &container, &is("/dev/ttyACM0"), "as a board again");
    container.wait_for_no("/dev/loader");

    let sound = vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" }));
    let keyboards = ["K1", "K2"].map(|serial| vm.plug(serial, "usb-kbd", json!({ "serial": serial })));
    let event = "/dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_K1-event-kbd";
    let nodes =
        ["/dev/hidraw0", "/dev/hidraw1", "/dev/snd/controlC0", "/dev/snd/pcmC0D0p", event, &event.replace("K1", "K2")];
    vm.wait_ok("the devices", FIRST_PLUG, &nodes.map(|path| format!("test -c {path}")).join(" && "));
    vm.ok("udevadm settle");
    let raw =
        vm.ok(&format!("event=$(readlink -f {event}) && ls /sys/class/input/${{event##*/}}/device/device/hidraw"));
    let expected =
        nodes_of_host(vm, &format!("$(readlink -f {event}) /dev/{raw} /dev/snd/controlC0 /dev/snd/pcmC0D0p"));
    assert_eq!(expected.len(), 4, "{expected:?}");
    let has = || container.nodes().into_iter().filter(|node| node.path != "/dev/board").collect::<Vec<_>>();
    let last = (0..20).map(|_| has()).find(|nodes| *nodes == expected).unwrap_or_else(has);
    assert_eq!(last, expected, "the keyboard's and the sound card's");
    let paths: Vec<&str> = expected.iter().map(|node| &*node.path).filter(|path| !path.contains("pcm")).collect();
    assert_eq!(container.open_all(&paths), ["opens"; 3], "{paths:?}");

    drop((keyboards, sound, gadget));
    for node in &expected {
        container.wait_for_no(&node.path);
    }
    assert_has(vm, &container, &is(NOTHING), "at the end");
    agent.print_times("a board");
}
