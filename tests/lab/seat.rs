//! Seats: what logind counts to one reaches the containers that name it, and nothing else does.

use std::time::Duration;

use serde_json::json;

use crate::Case;
use crate::container::Container;
use crate::everything::{nodes_of_host, nodes_seen};
use crate::hook::{LOG, Packaged, logged, nothing_else_opens};
use crate::vm::Vm;

pub(crate) const CASES: &[Case] = &[("seat::a_container_gets_its_seats_devices", a_container_gets_its_seats_devices)];

/// Loading drivers and their firmware tables for the first time takes long on an emulated machine.
const FIRST_PLUG: Duration = Duration::from_secs(90);

/// Assigns the sound card and the keyboard. udevd looks for changed rules every 3 s only, so that it may not yet know
/// of the second assignment when logind triggers it.
const ATTACH: &str = "\
    event=$(readlink -f /dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_*-event-kbd) && \
    loginctl attach seat1 $(readlink -f /sys/class/sound/card0) && \
    loginctl attach seat1 $(readlink -f /sys/class/input/${event##*/}/..) && \
    udevadm control --reload && udevadm trigger --settle --subsystem-match=sound --subsystem-match=input && \
    udevadm info $event | grep -q ID_SEAT=seat1 && echo $event";

/// Assignments of devices; taken back on drop.
struct Seats<'vm>(&'vm Vm);

impl Drop for Seats<'_> {
    fn drop(&mut self) {
        let output = self.0.sh("loginctl flush-devices && udevadm control --reload && udevadm settle");
        if !output.success() {
            eprintln!("could not take devices from their seats: {}", output.stderr);
        }
    }
}

fn asks_for_seat(value: &str) -> String {
    format!("--annotation $'org.containers.qm.wayland.seat={value}'")
}

fn a_container_gets_its_seats_devices(vm: &Vm) {
    let _installed = Packaged::install(vm);
    vm.ok("modprobe --all snd-seq snd-timer");
    let _keyboard = vm.plug("keyboard", "usb-kbd", json!({}));
    let _sound = vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" }));
    let nodes = ["/dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_*-event-kbd", "/dev/snd/controlC0", "/dev/snd/pcmC0D0p"];
    vm.wait_ok("the devices", FIRST_PLUG, &nodes.map(|path| format!("test -c {path}")).join(" && "));
    vm.ok("udevadm settle");
    let _seats = Seats(vm);
    let event = vm.ok(ATTACH);

    // In the shell's $'' this is a line break.
    let audio_as_well = "\\norg.containers.qm.device.audio=true";
    // Podman 4.3 reads the option as a line of CSV, of which a line break is only part in quotes; later ones do not.
    let quote = if vm.release() == "bookworm" { "\"" } else { "" };
    let smuggled = format!("--annotation $'{quote}org.containers.qm.wayland.seat=seat1{audio_as_well}{quote}'");
    let (seat1, seat0) = (asks_for_seat("seat1"), asks_for_seat("seat0"));
    let containers = Container::run_all(
        vm,
        &[("crun", "seat1-crun", &seat1), ("runc", "seat1-runc", &seat1), ("runc", "seat0-runc", &seat0)],
    );
    let [seat1_crun, seat1_runc, seat0] = &containers[..] else { unreachable!() };

    let of_seat1 = nodes_of_host(vm, &format!("/dev/snd/controlC0 /dev/snd/pcmC0D0p {event}"));
    assert_eq!(of_seat1.len(), 3);
    for container in [seat1_crun, seat1_runc] {
        assert_eq!(container.nodes(), of_seat1, "{}", container.name);
        let paths: Vec<&str> = of_seat1.iter().map(|node| node.path.as_str()).collect();
        assert_eq!(container.open_all(&paths), ["opens"; 3], "{}: {paths:?}", container.name);
        let added = format!("Added 3 Wayland seat devices for seat1 to container {}", container.name);
        assert!(is_logged(vm, &container.name, &added), "{added}");
        nothing_else_opens(container, &nodes_of_host(vm, "/dev/input/event0 /dev/snd/seq"), &[]);
    }
    let has: Vec<String> = seat0.nodes().into_iter().map(|node| node.path).collect();
    // A keyboard of the machine itself, and the sequencer that all sound cards share.
    assert!(["/dev/input/event0", "/dev/snd/seq"].iter().all(|path| has.iter().any(|it| it == path)), "{has:?}");
    assert!(!of_seat1.iter().any(|node| has.contains(&node.path)), "{has:?}");
    nothing_else_opens(seat0, &of_seat1, &[]);

    let seat = "Skipping annotation org.containers.qm.wayland.seat: ";
    for (name, annotation, line) in [
        ("option", asks_for_seat("--host=evil"), format!("{seat}'--host=evil' is no name of a seat")),
        ("path", asks_for_seat("../x"), format!("{seat}'../x' is no name of a seat")),
        ("unknown", asks_for_seat("seat7"), "No devices found for seat seat7 or seat does not exist".into()),
        ("smuggler", smuggled, format!("{seat}'seat1{audio_as_well}' is no name of a seat")),
    ] {
        // It ends at once, which saves much time; what is no device in its specification is not allowed either.
        let run = |command: &str| {
            format!(
                "lab-rootfs /var/tmp/{name} && podman --runtime crun run --rm --name {name} --network=none {annotation} \
                 --rootfs /var/tmp/{name} {command}; status=$?; rm -rf /var/tmp/{name}; exit $status"
            )
        };
        assert_eq!(nodes_seen(vm, run), [], "{name}");
        for line in [line.as_str(), "Total devices in spec: 0"] {
            assert!(is_logged(vm, name, line), "{line:?} is missing for {name}");
        }
    }
}

#[track_caller]
fn is_logged(vm: &Vm, container: &str, message: &str) -> bool {
    logged(vm, LOG, container).iter().any(|line| line.contains(message))
}
