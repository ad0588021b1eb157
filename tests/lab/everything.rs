//! Something of every category that an emulated machine can have, plugged in at once.

use std::time::Duration;

use serde_json::json;

use crate::vm::{Plugged, Vm};

/// Loading drivers and their firmware tables for the first time takes long on an emulated machine.
const FIRST_PLUG: Duration = Duration::from_secs(90);

/// The categories that need no configuration, with what stands for each on the host, as patterns of the shell.
/// There is no driver here that makes a node for `dvb`, `gpio` or `spi`.
pub(crate) const CATEGORIES: [(&str, &str); 16] = [
    ("audio", "/dev/snd/*"),
    ("video", "/dev/video* /dev/media*"),
    ("input", "/dev/input/*"),
    ("ttys", "/dev/tty[0-7]"),
    ("ttyUSB", "/dev/ttyUSB*"),
    ("radio", "/dev/radio*"),
    ("ttyACM", "/dev/ttyACM*"),
    ("serial", "/dev/ttyUSB* /dev/ttyACM*"),
    ("camera", "/dev/video* /dev/media* /dev/v4l-subdev* /dev/dma_heap/*"),
    ("printer", "/dev/usb/lp*"),
    ("hidraw", "/dev/hidraw*"),
    ("dri", "/dev/dri/*"),
    ("kvm", "/dev/kvm"),
    ("fuse", "/dev/fuse"),
    ("tun", "/dev/net/tun"),
    ("i2c", "/dev/i2c-*"),
];

/// A modem and a printer behind a USB controller that the kernel plays itself.
const PLUG_GADGET: &str = "modprobe --all libcomposite usb_f_acm usb_f_printer dummy_hcd && \
    mkdir /sys/kernel/config/usb_gadget/lab && cd /sys/kernel/config/usb_gadget/lab && \
    echo 0x1d6b >idVendor && echo 0x0104 >idProduct && \
    mkdir configs/c.1 functions/acm.0 functions/printer.0 && ln -s functions/acm.0 functions/printer.0 configs/c.1 && \
    echo dummy_udc.0 >UDC";

const UNPLUG_GADGET: &str = "cd /sys/kernel/config/usb_gadget/lab && echo >UDC; \
    rm -f configs/c.1/acm.0 configs/c.1/printer.0; rmdir configs/c.1 functions/* && cd .. && rmdir lab && \
    modprobe -r dummy_hcd";

/// Devices of all categories; unplugged on drop.
pub(crate) struct Everything<'vm> {
    vm: &'vm Vm,
    _plugged: Vec<Plugged<'vm>>,
}

impl<'vm> Everything<'vm> {
    /// Plugs them in. When this returns, the host has the nodes with their final owners and modes.
    #[track_caller]
    pub(crate) fn plug(vm: &'vm Vm) -> Self {
        let plugged = vec![
            vm.plug("LAB1", "usb-serial", json!({ "serial": "LAB1" })),
            vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" })),
            // Has an input device and a raw HID node.
            vm.plug("keyboard", "usb-kbd", json!({})),
        ];
        // Made now, so that what was loaded goes when something is missing.
        let everything = Self { vm, _plugged: plugged };
        vm.ok("modprobe vivid n_devs=1 && modprobe --all vgem i2c-dev snd-seq snd-timer");
        vm.ok(PLUG_GADGET);
        let nodes = [
            "/dev/ttyUSB0",
            "/dev/ttyACM0",
            "/dev/usb/lp0",
            "/dev/snd/controlC0",
            "/dev/snd/pcmC0D0p",
            "/dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard_*-event-kbd",
            "/dev/hidraw0",
            "/dev/video0",
            "/dev/media0",
            "/dev/radio0",
            "/dev/dri/card0",
            "/dev/dri/renderD128",
            "/dev/i2c-0",
        ];
        vm.wait_ok("all nodes", FIRST_PLUG, &nodes.map(|path| format!("test -c {path}")).join(" && "));
        vm.ok("udevadm settle");
        everything
    }
}

impl Drop for Everything<'_> {
    fn drop(&mut self) {
        let output = self.vm.sh(&format!("({UNPLUG_GADGET}); udevadm settle; modprobe -r vivid vgem i2c-dev"));
        if !output.success() {
            eprintln!("could not unload drivers: {}", output.stderr);
        }
    }
}

/// A device node: where it is and all that is to be the same inside as on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node {
    /// Where.
    pub(crate) path: String,
    /// `c 188 0`.
    pub(crate) numbers: String,
    /// User, group and permission bits: `0:20 660`.
    pub(crate) owner_and_mode: String,
}

impl Node {
    /// From a line of [`LIST`].
    fn parse(line: &str) -> Self {
        let fields: Vec<&str> = line.split(' ').collect();
        let [path, major, minor, owner, mode, kind, ..] = fields[..] else { panic!("no node: {line}") };
        let number = |text| u32::from_str_radix(text, 16).expect("a hexadecimal number");
        Self {
            path: path.into(),
            numbers: format!("{} {} {}", &kind[..1], number(major), number(minor)),
            owner_and_mode: format!("{owner} {mode}"),
        }
    }

    /// The number of its group.
    pub(crate) fn group(&self) -> &str {
        self.owner_and_mode.split([':', ' ']).nth(1).expect("user, group and mode")
    }

    /// Whether those of its group, or else all, may read and write.
    pub(crate) fn is_for_its_group(&self) -> bool {
        let (_, mode) = self.owner_and_mode.split_once(' ').expect("an owner and a mode");
        let mode = u32::from_str_radix(mode, 8).expect("an octal mode");
        mode & 0o060 == 0o060 || mode & 0o006 == 0o006
    }
}

/// A command that lists the nodes among its arguments.
const STAT: &str = "stat -c \"%n %t %T %u:%g %a %F\"";

/// The nodes on the host that the shell's patterns stand for, sorted by path.
#[track_caller]
pub(crate) fn nodes_of_host(vm: &Vm, patterns: &str) -> Vec<Node> {
    sorted(&vm.ok(&format!("for path in {patterns}; do test -c $path -o -b $path && {STAT} $path; done; true")))
}

/// What every container has.
const USUAL: [&str; 6] = ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"];

/// All nodes below `/dev` that a script line sees which runs in a container, but for those that every container has.
pub(crate) fn nodes_seen(vm: &Vm, run: impl Fn(&str) -> String) -> Vec<Node> {
    let find = "busybox find /dev -path /dev/pts -prune -o \\( -type c -o -type b \\) -exec";
    let all = sorted(&vm.ok(&run(&format!("{find} {STAT} {{}} +"))));
    let usual = all.iter().filter(|node| USUAL.contains(&&*node.path)).count();
    assert_eq!(usual, USUAL.len(), "{all:?}");
    all.into_iter().filter(|node| !USUAL.contains(&&*node.path)).collect()
}

fn sorted(lines: &str) -> Vec<Node> {
    let mut nodes: Vec<Node> = lines.lines().map(Node::parse).collect();
    nodes.sort();
    nodes.dedup();
    nodes
}
