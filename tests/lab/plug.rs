//! The main job: what is plugged in appears and opens in the containers that ask for it, and goes when it is unplugged.

use std::time::Duration;

use serde_json::json;

use crate::Case;
use crate::agent::{Agent, grants_of, status};
use crate::container::{Container, RUNTIMES, node};
use crate::vm::{Plugged, SOON, Vm};

/// Loading drivers and their firmware tables for the first time takes long on an emulated machine.
pub(crate) const FIRST_PLUG: Duration = Duration::from_secs(90);

pub(crate) const CASES: &[Case] = &[
    ("plug::serial_sticks_reach_those_who_ask", serial_sticks_reach_those_who_ask),
    ("plug::sound_input_and_cameras", sound_input_and_cameras),
    ("plug::without_udevd", without_udevd),
    ("plug::without_podman", without_podman),
];

/// What a container asks for a serial stick with.
pub(crate) const ASKS_FOR_STICKS: &str = "--annotation org.containers.qm.device.ttyUSB=true";

/// Plugs a serial stick in, and waits until the host has it at that path with its final owner and mode.
#[track_caller]
pub(crate) fn plug_stick<'vm>(vm: &'vm Vm, name: &str, path: &str) -> Plugged<'vm> {
    let stick = vm.plug(name, "usb-serial", json!({ "serial": name }));
    // Group 20 is dialout, which only udev's rules know of.
    let is_ready = format!("test -c {path} && test $(stat -c %g {path}) = 20");
    vm.wait_ok(&format!("{name} at {path}"), FIRST_PLUG, &is_ready);
    stick
}

fn serial_sticks_reach_those_who_ask(vm: &Vm) {
    let mut asking =
        Container::run_all(vm, &[("crun", "before-crun", ASKS_FOR_STICKS), ("runc", "before-runc", ASKS_FOR_STICKS)]);
    let agent = Agent::start(vm);
    let started = Container::run_all(
        vm,
        &[
            ("crun", "after-crun", ASKS_FOR_STICKS),
            ("runc", "after-runc", ASKS_FOR_STICKS),
            ("crun", "plain-crun", "--annotation org.containers.qm.device.ttyUSB=false"),
            ("runc", "plain-runc", ""),
        ],
    );
    let (after, plain): (Vec<_>, Vec<_>) = started.into_iter().partition(|c| c.name.starts_with("after"));
    asking.extend(after);
    assert_eq!(status(vm)["events"], "udev");
    assert_eq!(status(vm)["grants"], 0);

    appears_where_asked_for(vm, &asking, &plain);
    follows_a_number_that_changes(vm, &asking);
    // One that was there before the agent, and one that came after it.
    is_there_after_a_restart(vm, &mut asking[1..3]);
    agent.print_times("serial sticks");
}

fn appears_where_asked_for(vm: &Vm, asking: &[Container<'_>], plain: &[Container<'_>]) {
    for container in asking {
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{} before", container.name);
    }
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for container in asking {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:20 660", "{}", container.name);
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
        assert_eq!(grants_of(vm, &container.name), [("/dev/ttyUSB0".into(), "rule:ttyUSB".into())]);
    }
    for container in plain {
        assert_eq!(container.node("/dev/ttyUSB0"), "nothing", "{}", container.name);
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}", container.name);
    }
    assert_eq!(node(vm, "/dev/ttyUSB0"), "character special file bc:0 0:20 660", "the host's own");

    stick.unplug();
    for container in asking {
        container.wait_for_no("/dev/ttyUSB0");
        // Without the right it is EPERM; with it, it would be ENXIO.
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{} after", container.name);
        assert_eq!(grants_of(vm, &container.name), [], "{}", container.name);
    }
    assert_eq!(status(vm)["entries"], 0);
}

fn follows_a_number_that_changes(vm: &Vm, asking: &[Container<'_>]) {
    let first = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    let second = plug_stick(vm, "LAB2", "/dev/ttyUSB1");
    for container in asking {
        container.wait_for("/dev/ttyUSB1");
        assert_eq!(container.open_all(&["/dev/ttyUSB0", "/dev/ttyUSB1"]), ["opens", "opens"], "{}", container.name);
    }
    let inode = |container: &Container<'_>| vm.ok(&container.outside("stat -c %i /dev/ttyUSB1"));
    let inodes: Vec<String> = asking.iter().map(inode).collect();

    first.unplug();
    for (container, before) in asking.iter().zip(inodes) {
        container.wait_for_no("/dev/ttyUSB0");
        assert_eq!(inode(container), before, "{}: the other stick's node was touched", container.name);
        assert_eq!(container.open("/dev/ttyUSB1"), "opens", "{}", container.name);
    }
    second.unplug();
    for container in asking {
        container.wait_for_no("/dev/ttyUSB1");
    }
    // The second stick has the first one's number now.
    let second = plug_stick(vm, "LAB2", "/dev/ttyUSB0");
    for container in asking {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
        assert_eq!(container.open_by_hand("c 188 1"), "Operation not permitted", "{}", container.name);
        assert_eq!(grants_of(vm, &container.name).len(), 1, "{}", container.name);
    }
    second.unplug();
    for container in asking {
        container.wait_for_no("/dev/ttyUSB0");
    }
}

fn is_there_after_a_restart(vm: &Vm, asking: &mut [Container<'_>]) {
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    asking.iter().for_each(|container| container.wait_for("/dev/ttyUSB0"));
    Container::restart_all(vm, asking);
    for container in &*asking {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
        assert_eq!(grants_of(vm, &container.name).len(), 1, "{}: the former run's is gone", container.name);
    }
    // Of the two that were not restarted, and of the two new runs; none of the former ones.
    vm.wait("the grants of the former runs to go", SOON, |vm| (status(vm)["entries"] == 4).then_some(()));
    stick.unplug();
    asking.iter().for_each(|container| container.wait_for_no("/dev/ttyUSB0"));
}

fn sound_input_and_cameras(vm: &Vm) {
    // Before they are loaded, their nodes are there without a device (systemd makes them, to load them on opening).
    vm.ok("modprobe --all snd-seq snd-timer");
    let annotations = ["audio=true", "input=1", "video=yes", "radio=true"];
    let asks: String = annotations.map(|asks| format!("--annotation org.containers.qm.device.{asks} ")).concat();
    let containers = Container::run_all(vm, &[("crun", "media-crun", &asks), ("runc", "media-runc", &asks)]);
    let agent = Agent::start(vm);
    // What was there before the agent (a keyboard of the machine itself) counts as well.
    let before = devices_of_categories(vm);
    assert!(before.contains("/dev/input/event0 "), "{before}");
    assert_same_inside(vm, &containers);

    let keyboard = vm.plug("keyboard", "usb-kbd", json!({}));
    vm.wait_ok("the keyboard", FIRST_PLUG, "test -c /dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_*-event-kbd");
    let event = vm.ok("readlink -f /dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_*-event-kbd");
    let sound = vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" }));
    vm.wait_ok("the sound card", FIRST_PLUG, "test -c /dev/snd/controlC0 && test -c /dev/snd/pcmC0D0p");
    vm.sh_within(FIRST_PLUG, "modprobe vivid n_devs=1");
    let cameras = ["/dev/video0", "/dev/media0", "/dev/radio0"];
    vm.wait_ok("the camera", FIRST_PLUG, &cameras.map(|path| format!("test -c {path}")).join(" && "));
    vm.ok("udevadm settle");

    assert_same_inside(vm, &containers);
    for container in &containers {
        let paths = [event.as_str(), "/dev/snd/controlC0", "/dev/video0", "/dev/media0", "/dev/radio0"];
        assert_eq!(container.open_all(&paths), ["opens"; 5], "{}: {paths:?}", container.name);
        // A sound card's stream goes one way.
        assert_eq!(container.open_as(">", "/dev/snd/pcmC0D0p"), "opens", "{}", container.name);
        // vivid makes more than was asked for: /dev/vbi0, /dev/swradio0.
        assert_eq!(container.node("/dev/vbi0"), "nothing", "{}", container.name);
    }

    keyboard.unplug();
    sound.unplug();
    vm.wait_ok("udev to let go of the camera", FIRST_PLUG, "modprobe -r vivid");
    vm.wait("everything to go", SOON, |vm| (devices_of_categories(vm) == before).then_some(()));
    assert_same_inside(vm, &containers);
    for container in &containers {
        for numbers in ["c 81 0", "c 116 2"] {
            assert_eq!(container.open_by_hand(numbers), "Operation not permitted", "{}: {numbers}", container.name);
        }
    }
    agent.print_times("sound, input and cameras");
}

/// A line for each device of those categories on the host, with numbers, owner and mode.
fn devices_of_categories(vm: &Vm) -> String {
    vm.ok(LIST_DEVICES)
}

/// Shell patterns are enough, so that busybox without `find` does.
const LIST_DEVICES: &str = "sh -c 'for path in /dev/snd/* /dev/input/* /dev/video* /dev/media* /dev/radio*; do \
    test -c $path && stat -c \"%n %t:%T %u:%g %a\" $path; done; true'";

#[track_caller]
fn assert_same_inside(vm: &Vm, containers: &[Container<'_>]) {
    for container in containers {
        let mut last = (String::new(), String::new());
        for _ in 0..100 {
            last = (vm.ok(LIST_DEVICES), vm.ok(&container.outside(LIST_DEVICES)));
            if last.0 == last.1 {
                break;
            }
        }
        assert_eq!(last.0, last.1, "{} has not what the host has", container.name);
    }
}

const UDEVD: &str = "systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service";

/// Starts udevd again, also when the case fails.
struct UdevdStopped<'vm>(&'vm Vm);

impl Drop for UdevdStopped<'_> {
    fn drop(&mut self) {
        let output = self.0.sh(&format!("systemctl start {UDEVD} && udevadm control --ping --timeout=10"));
        if !output.success() {
            eprintln!("could not start udevd: {}", output.stderr);
        }
    }
}

fn without_udevd(vm: &Vm) {
    // Nobody loads drivers without udevd.
    vm.ok("modprobe ftdi_sio");
    let containers = RUNTIMES.map(|runtime| (runtime, format!("udevless-{runtime}")));
    let wanted: Vec<_> = containers.iter().map(|(runtime, name)| (*runtime, &**name, ASKS_FOR_STICKS)).collect();
    let containers = Container::run_all(vm, &wanted);
    let agent = Agent::start(vm);
    assert_eq!(status(vm)["events"], "udev");

    vm.ok(&format!("systemctl stop {UDEVD} && ! test -e /run/udev/control"));
    let stopped = UdevdStopped(vm);
    assert_eq!(status(vm)["events"], "kernel");
    let stick = vm.plug("LAB1", "usb-serial", json!({ "serial": "LAB1" }));
    for container in &containers {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:0 600", "as the kernel made it");
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
    }
    stick.unplug();
    for container in &containers {
        container.wait_for_no("/dev/ttyUSB0");
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}", container.name);
    }
    // The agent may start without udevd as well.
    agent.restart();
    let stick = vm.plug("LAB1", "usb-serial", json!({ "serial": "LAB1" }));
    containers.iter().for_each(|container| container.wait_for("/dev/ttyUSB0"));

    // udevd is back: its rules give the stick its group, and the containers' nodes follow.
    drop(stopped);
    assert_eq!(status(vm)["events"], "udev");
    vm.ok("udevadm trigger --settle --action=add /dev/ttyUSB0");
    assert_eq!(node(vm, "/dev/ttyUSB0"), "character special file bc:0 0:20 660");
    for container in &containers {
        let ready = "test $(stat -c %g /dev/ttyUSB0) = 20";
        vm.wait_ok("the group inside", SOON, &container.outside(&format!("sh -c '{ready}'")));
        assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:20 660", "{}", container.name);
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
    }
    stick.unplug();
    containers.iter().for_each(|container| container.wait_for_no("/dev/ttyUSB0"));

    // A mere restart of udevd changes nothing.
    vm.ok("systemctl restart systemd-udevd.service");
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for container in &containers {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:20 660", "{}", container.name);
    }
    stick.unplug();
    containers.iter().for_each(|container| container.wait_for_no("/dev/ttyUSB0"));
}

/// Podman back in its place, also when the case fails.
struct PodmanAway<'vm>(&'vm Vm);

impl Drop for PodmanAway<'_> {
    fn drop(&mut self) {
        self.0.sh("mv /usr/bin/podman.away /usr/bin/podman");
    }
}

fn without_podman(vm: &Vm) {
    let containers =
        Container::run_all(vm, &[("crun", "alone-crun", ASKS_FOR_STICKS), ("runc", "alone-runc", ASKS_FOR_STICKS)]);
    vm.ok("mv /usr/bin/podman /usr/bin/podman.away");
    let away = PodmanAway(vm);
    let _agent = Agent::start(vm);
    let names = vm.ok("qm-hotplug ps");
    assert!(names.contains("alone-crun") && names.contains("alone-runc"), "{names}");
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for container in &containers {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
    }
    stick.unplug();
    containers.iter().for_each(|container| container.wait_for_no("/dev/ttyUSB0"));
    drop(away);
}
