//! Selectors: each kind of key finds its device among others that are much like it, whatever number that has.

use serde_json::json;

use crate::Case;
use crate::agent::{Agent, grants_of};
use crate::container::Container;
use crate::gadget::{Function, Gadget};
use crate::hook::Packaged;
use crate::plug::FIRST_PLUG;
use crate::vm::{Plugged, SOON, Vm};

pub(crate) const CASES: &[Case] =
    &[("select::each_key_finds_its_device_whatever_its_number", each_key_finds_its_device_whatever_its_number)];

/// The stick with serial number B2, wherever it is plugged in.
const B2: &str = "/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_B2-if00-port0";
/// A braille display, which has another product id, above 8000.
const BRAILLE: &str = "/dev/serial/by-id/usb-QEMU_QEMU_USB_BAUM_BRAILLE_BR-if00-port0";
/// Whatever is plugged into the hub's second port.
const ON_HUB: &str = "/dev/serial/by-path/pci-0000:00:02.0-usb-0:6.2:1.0-port0";
const KEYBOARD: &str = "/dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_K1-event-kbd";
const MODEM: &str = "/dev/ttyACM0";
const CAMERA: &str = "/dev/video0";
pub(crate) const NOTHING: &str = "/dev/no-such-device";

/// Selectors, each with a name for its annotation and with the host's path of the one device that it stands for.
/// The first by device path among those much like it is never that one.
const KEYS: &[(&str, &str, &str)] = &[
    ("subsystem", "subsystem=hidraw", "/dev/hidraw0"),
    ("devname", "devname=/dev/ttyUSB1", "/dev/ttyUSB1"),
    ("devname-short", "devname=ttyACM0", MODEM),
    ("devname-link", "devname=/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_B2-if00-port0", B2),
    ("driver", "driver=cdc_acm", MODEM),
    ("usb", "usb=0403:6001:B2:00", B2),
    ("usb-case", "usb=2E8a:F00D", MODEM),
    ("serial", "serial=B2", B2),
    ("model", "model=QEMU_USB_BAUM_BRAILLE", BRAILLE),
    ("vendor", "vendor=Lab", MODEM),
    ("id-path", "id_path=pci-0000:00:02.0-usb-0:6.2:1.0", ON_HUB),
    ("port", "port=1-6.2", ON_HUB),
    ("port-front", "port=1-5", "/dev/serial/by-path/pci-0000:00:02.0-usb-0:5:1.0-port0"),
    ("pci", "pci=0000:00:1d.0", "/dev/ttyS1"),
    ("pci-short", "pci=00:1d.0", "/dev/ttyS1"),
    ("pci-path", "pci=1d", "/dev/ttyS1"),
    ("parent", "parent=usb=0409:55aa,usb=0403:6001", ON_HUB),
    ("parent-several", "parent=(usb=0409:*,port=1-6),usb=0403:6001", ON_HUB),
    ("parent-sibling", "parent=serial=BR,usb=0403:6001", ON_HUB),
    ("seat", "seat=seat0,attr.name=vivid-000-vid-cap", CAMERA),
    ("tag", "tag=power-switch,port=1-7", KEYBOARD),
    ("category", "category=ttyACM", MODEM),
    ("word", "hidraw", "/dev/hidraw0"),
    ("word-and-key", "serial,usb=2e8a:*", MODEM),
    ("env", "env.ID_INPUT_KEYBOARD=1,env.ID_BUS=usb", KEYBOARD),
    ("attr", "attr.name=vivid-000-vid-cap", CAMERA),
    ("attrs", "attrs.idProduct=fe72", BRAILLE),
    ("quoted", r#"attrs.product="Boot loader, v2""#, MODEM),
    ("not", "usb=0403:6001,serial!=A1", B2),
    ("glob", "usb=04?3:60*:[BC]2", B2),
    ("not-serial", "serial=B", NOTHING),
    ("not-interface", "usb=0403:6001:B2:01", NOTHING),
    ("not-port", "port=1-6", NOTHING),
    ("not-devname", "devname=ttyUSB", NOTHING),
    ("not-driver", "driver=ftdi", NOTHING),
    ("not-seat", "seat=seat1", NOTHING),
    ("not-pci", "pci=00:1d.1", NOTHING),
    ("not-not", "hidraw,driver!=usbhid", NOTHING),
    // These have to be enabled.
    ("not-raw", "subsystem=usb", NOTHING),
    ("not-disk", "subsystem=block", NOTHING),
];

/// An argument for Podman: what a container asks for with a selector.
pub(crate) fn asks(vm: &Vm, name: &str, selector: &str) -> String {
    let annotation = format!("org.containers.qm.hotplug.{name}={selector}");
    // Podman 4.3 reads the option as a line of CSV; later ones do not.
    let annotation =
        if vm.release() == "bookworm" { format!("\"{}\"", annotation.replace('"', "\"\"")) } else { annotation };
    format!("--annotation '{annotation}' ")
}

/// Plugs a serial stick into a port, and waits until the host has it with its final owner and mode.
#[track_caller]
pub(crate) fn stick<'vm>(vm: &'vm Vm, serial: &str, port: &str) -> Plugged<'vm> {
    let plugged = vm.plug(serial, "usb-serial", json!({ "serial": serial, "port": port }));
    let link = format!("/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_{serial}-if00-port0");
    vm.wait_ok(&format!("stick {serial}"), FIRST_PLUG, &format!("test $(stat -L -c %G {link}) = dialout"));
    plugged
}

/// What the devices at those paths are, or `nothing`: kind and numbers.
fn numbers_script(paths: &[String]) -> String {
    let paths = paths.join(" ");
    format!("sh -c 'for path in {paths}; do test -e $path && stat -L -c \"%F %t:%T\" $path || echo nothing; done'")
}

/// Waits until each of the container's paths is a node with the numbers of the host's path (`nothing` where the host has
/// none), and all of them open.
#[track_caller]
pub(crate) fn assert_has(vm: &Vm, container: &Container<'_>, pairs: &[(String, &str)], when: &str) {
    let on_host: Vec<String> = pairs.iter().map(|(_, host)| (*host).to_owned()).collect();
    let inside: Vec<String> = pairs.iter().map(|(path, _)| path.clone()).collect();
    let expected = vm.ok(&numbers_script(&on_host));
    let look = container.outside(&numbers_script(&inside));
    let mut found = vm.ok(&look);
    for _ in 0..100 {
        if found == expected {
            break;
        }
        found = vm.ok(&look);
    }
    let wrong: Vec<String> = pairs
        .iter()
        .zip(expected.lines().zip(found.lines()))
        .filter(|(_, (expected, found))| expected != found)
        .map(|((path, host), (expected, found))| format!("{path} is {found}, but {host} is {expected}"))
        .collect();
    assert!(wrong.is_empty(), "{} {when}:\n{}", container.name, wrong.join("\n"));

    let there: Vec<&str> =
        pairs.iter().zip(expected.lines()).filter(|(_, it)| *it != "nothing").map(|((path, _), _)| &**path).collect();
    for (opened, path) in container.open_all(&there).iter().zip(there) {
        assert_eq!(opened, "opens", "{} {when}: {path}", container.name);
    }
}

fn each_key_finds_its_device_whatever_its_number(vm: &Vm) {
    let asked: String =
        KEYS.iter().map(|(name, selector, _)| asks(vm, name, &format!("{selector},as=/dev/k-{name}"))).collect();
    let pairs: Vec<(String, &str)> = KEYS.iter().map(|(name, _, host)| (format!("/dev/k-{name}"), *host)).collect();
    let _installed = Packaged::install(vm);
    let before = Container::run(vm, "crun", "keys-crun", &asked);
    let agent = Agent::start(vm);
    let others = Others::plug(vm);

    let a1 = stick(vm, "A1", "5");
    let b2 = stick(vm, "B2", "6.2");
    let braille = vm.plug("braille", "usb-braille", json!({ "serial": "BR", "port": "6.3" }));
    vm.wait_ok("the braille display", SOON, &format!("test $(readlink -f {BRAILLE}) = /dev/ttyUSB2"));
    assert_eq!(vm.ok(&format!("readlink -f {B2}")), "/dev/ttyUSB1");
    assert_has(vm, &before, &pairs, "at first");
    let devices = pairs.iter().filter(|(_, host)| *host != NOTHING).count();
    assert_eq!(grants_of(vm, &before.name).len(), devices, "nothing else");

    // Each into the other's port, and in the other order.
    drop((a1, b2));
    let b2 = stick(vm, "B2", "5");
    let a1 = stick(vm, "A1", "6.2");
    assert_eq!(vm.ok(&format!("readlink -f {B2}")), "/dev/ttyUSB0");
    assert_has(vm, &before, &pairs, "after each came into the other's port");

    agent.stop();
    let after = Container::run(vm, "runc", "keys-runc", &asked);
    assert_has(vm, &after, &pairs, "from its start");
    let second = Agent::start(vm);

    // The same ports, with each other's numbers.
    drop((a1, b2));
    let a1 = stick(vm, "A1", "6.2");
    let b2 = stick(vm, "B2", "5");
    assert_eq!(vm.ok(&format!("readlink -f {B2}")), "/dev/ttyUSB1");
    for container in [&before, &after] {
        assert_has(vm, container, &pairs, "after each got the other's number");
        assert_eq!(grants_of(vm, &container.name).len(), devices, "{}: nothing else", container.name);
    }

    drop((a1, b2, braille, others));
    // The host has a /dev/ttyS1 still, for a port that it might have itself.
    let nothing: Vec<(String, &str)> = pairs.into_iter().map(|(path, _)| (path, NOTHING)).collect();
    for container in [&before, &after] {
        assert_has(vm, container, &nothing, "after all was unplugged");
        for opened in container.open_all_by_hand(&["c 188 0", "c 188 1", "c 188 2", "c 166 0", "c 81 0", "c 4 65"]) {
            assert_eq!(opened, "Operation not permitted", "{}", container.name);
        }
    }
    second.print_times("selectors");
}

/// All but what has a number that changes; unplugged on drop.
struct Others<'vm> {
    vm: &'vm Vm,
    _plugged: [Plugged<'vm>; 3],
    _modem: Gadget<'vm>,
}

impl<'vm> Others<'vm> {
    #[track_caller]
    fn plug(vm: &'vm Vm) -> Self {
        let others = Self {
            vm,
            _plugged: [
                vm.plug("hub", "usb-hub", json!({ "port": "6" })),
                vm.plug("serial-port", "pci-serial", json!({ "addr": "1d.0" })),
                vm.plug("keyboard", "usb-kbd", json!({ "port": "7", "serial": "K1" })),
            ],
            _modem: Gadget::plug(vm, Function::Modem, 0xf00d, "Boot loader, v2"),
        };
        // The driver does not know the braille display by itself.
        vm.ok("modprobe --all ftdi_sio && echo 0403 fe72 >/sys/bus/usb-serial/drivers/ftdi_sio/new_id && \
               modprobe vivid n_devs=1");
        let nodes = [KEYBOARD, "/dev/hidraw0", CAMERA, MODEM];
        vm.wait_ok("all nodes", FIRST_PLUG, &nodes.map(|path| format!("test -c {path}")).join(" && "));
        vm.wait_ok("the serial port", SOON, "readlink /sys/class/tty/ttyS1 | grep -q 0000:00:1d.0");
        vm.ok("udevadm settle");
        others
    }
}

impl Drop for Others<'_> {
    fn drop(&mut self) {
        let undo = "echo 0403 fe72 >/sys/bus/usb-serial/drivers/ftdi_sio/remove_id; udevadm settle; modprobe -r vivid";
        let output = self.vm.sh(undo);
        if !output.success() {
            eprintln!("could not unload drivers: {}", output.stderr);
        }
    }
}
