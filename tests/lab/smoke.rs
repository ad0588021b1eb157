//! The machine itself: whatever the other cases rely on is shown to work here, without qm-hotplug.

use std::time::Duration;

use serde_json::json;

use crate::Case;
use crate::container::{Container, RUNTIMES};
use crate::vm::{SOON, Vm};

/// Loading drivers and their firmware tables for the first time takes long on an emulated machine.
const FIRST_PLUG: Duration = Duration::from_secs(90);

pub(crate) const CASES: &[Case] = &[
    ("smoke::commands_come_back_whole", commands_come_back_whole),
    ("smoke::systemd_and_udevd_run", systemd_and_udevd_run),
    ("smoke::serial_sticks_come_and_go", serial_sticks_come_and_go),
    ("smoke::sound_and_input_devices_come_and_go", sound_and_input_devices_come_and_go),
    ("smoke::virtual_cameras", virtual_cameras),
    ("smoke::podman_runs_containers", podman_runs_containers),
    ("smoke::binary_and_repository_are_shared", binary_and_repository_are_shared),
];

fn commands_come_back_whole(vm: &Vm) {
    let output = vm.sh("printf 'DONE 0 1 1\\nx'; printf 'e\\n\\n' >&2; exit 7");
    assert_eq!((output.status, output.stdout.as_str(), output.stderr.as_str()), (7, "DONE 0 1 1\nx", "e\n\n"));
    assert_eq!(vm.ok("head -c 200000 /dev/zero").len(), 200_000);
    assert_eq!(vm.sh("kill -KILL $$").status, 137);
    assert_eq!(vm.sh_within(Duration::from_secs(1), "sleep 100 & wait").status, 124);
    // A process that is left running neither blocks the answer nor spoils a later one.
    assert!(vm.sh("(sleep 0.2; echo late) & echo early").stdout.starts_with("early"));
    assert_eq!(vm.ok("sleep 0.4; echo next"), "next");
}

fn systemd_and_udevd_run(vm: &Vm) {
    let failed = vm.ok("systemctl list-units --failed --plain --no-legend");
    assert_eq!(failed, "", "units failed");
    assert_eq!(vm.sh("systemctl is-system-running").stdout.trim(), "running");
    assert_eq!(vm.ok(". /etc/os-release && echo $VERSION_CODENAME"), vm.release());
    vm.ok("udevadm control --ping --timeout=10");
    // Only version 2 of the cgroup file system, from the root on.
    assert_eq!(vm.ok("stat -f -c %T /sys/fs/cgroup"), "cgroup2fs");
}

fn serial_sticks_come_and_go(vm: &Vm) {
    let link = |serial| format!("/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_{serial}-if00-port0");
    let [first, second] = ["LAB1", "LAB2"].map(link);
    let one = vm.plug("stick1", "usb-serial", json!({ "serial": "LAB1" }));
    vm.wait_ok("the first stick's link", FIRST_PLUG, &format!("test -c {first}"));
    let two = vm.plug("stick2", "usb-serial", json!({ "serial": "LAB2" }));
    vm.wait_ok("the second stick's link", SOON, &format!("test -c {second}"));
    assert_eq!(vm.ok(&format!("readlink -f {first} {second}")), "/dev/ttyUSB0\n/dev/ttyUSB1");
    // 188 in hexadecimal: the driver's own number.
    assert_eq!(vm.ok("stat -c %t:%T /dev/ttyUSB1"), "bc:1");

    one.unplug();
    vm.wait_ok("the first stick to go", SOON, &format!("! test -e /dev/ttyUSB0 && ! test -e {first}"));
    vm.ok(&format!("test -c {second}"));
    two.unplug();
    vm.wait_ok("the second stick to go", SOON, "! test -e /dev/ttyUSB1 && ! test -e /dev/serial");

    // The same id and number can be used again.
    let again = vm.plug("stick1", "usb-serial", json!({ "serial": "LAB1" }));
    vm.wait_ok("the first stick to be back", SOON, &format!("test -c {first}"));
    assert_eq!(vm.ok(&format!("readlink -f {first}")), "/dev/ttyUSB0");
    again.unplug();
    vm.wait_ok("it to go again", SOON, "! test -e /dev/ttyUSB0");
}

fn sound_and_input_devices_come_and_go(vm: &Vm) {
    let keyboard = "/dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_*-event-kbd";
    let plugged = vm.plug("keyboard", "usb-kbd", json!({}));
    vm.wait_ok("the keyboard", FIRST_PLUG, &format!("test -c {keyboard}"));
    plugged.unplug();
    vm.wait_ok("the keyboard to go", SOON, &format!("! test -e {keyboard}"));

    let plugged = vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" }));
    vm.wait_ok("the sound card", FIRST_PLUG, "test -c /dev/snd/controlC0 && test -c /dev/snd/pcmC0D0p");
    plugged.unplug();
    vm.wait_ok("the sound card to go", SOON, "! test -e /dev/snd/controlC0");
}

fn virtual_cameras(vm: &Vm) {
    vm.ok("modprobe vivid n_devs=2");
    let nodes = vm.wait("the cameras", FIRST_PLUG, |vm| {
        let listed = vm.sh("ls /dev/video*").stdout;
        (listed.lines().count() >= 2).then_some(listed)
    });
    assert!(nodes.starts_with("/dev/video0\n/dev/video1\n"), "{nodes}");
    vm.wait_ok("udev to let go of them", FIRST_PLUG, "modprobe -r vivid");
    vm.wait_ok("the cameras to go", SOON, "! test -e /dev/video0");
}

fn podman_runs_containers(vm: &Vm) {
    for runtime in RUNTIMES {
        let container = Container::run(vm, runtime, &format!("smoke-{runtime}"), "--annotation lab.smoke=yes");
        assert_eq!(container.id.len(), 64);
        let cgroup = vm.ok(&format!("cat /proc/{}/cgroup", container.pid));
        let scope = format!("0::/machine.slice/libpod-{}.scope", container.id);
        assert!(cgroup.starts_with(&scope), "{runtime}: {cgroup} and not {scope}");
        assert_eq!(vm.ok(&container.inside("readlink /bin/sh")), "busybox");
        // The container's own filter is in force for what is run this way: a device that it did not ask for.
        vm.ok(&container.inside("mknod /dev/probe c 1 11 2>/dev/null || true"));
        assert_ne!(vm.sh(&container.inside("dd if=/dev/probe count=1")).status, 0, "{runtime}: /dev/kmsg opens");
    }
}

fn binary_and_repository_are_shared(vm: &Vm) {
    vm.ok("test -x /usr/local/bin/qm-hotplug");
    vm.ok("cmp /usr/local/bin/qm-hotplug /mnt/bin/qm-hotplug");
    vm.ok("test -f /mnt/repo/Cargo.toml");
    assert_ne!(vm.sh("touch /mnt/repo/written").status, 0, "the repository is writable from the guest");
}
