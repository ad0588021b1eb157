//! Categories that a host has to enable first, and which disks a container gets then.

use serde_json::json;

use crate::Case;
use crate::container::Container;
use crate::everything::{Node, nodes_of_host};
use crate::hook::{LOG, Packaged, TUN, logged, nothing_else_opens};
use crate::vm::{Plugged, SOON, Vm};

pub(crate) const CASES: &[Case] = &[("enable::a_host_enables_categories", a_host_enables_categories)];

/// What is withheld unless a file enables it, and one that only a file knows of.
const ASKED: [&str; 4] = ["usb", "uinput", "block", "lab"];

const CONFIG: &str = r#"
enable = ["usb", "uinput", "block"]

[category.lab]
nodes = ["/dev/cpu_dma_latency", "/dev/ttyS[1-2]"]
"#;

/// The nodes that stand for these on the host, as patterns of the shell.
const CHARACTER_NODES: &str = "/dev/bus/usb/*/* /dev/uinput /dev/cpu_dma_latency /dev/ttyS[1-2]";
const DISKS: &str = "/dev/vd* /dev/sd* /dev/loop[0-9]*";

/// A file in `/etc/qm-hotplug/config.d`; removed on drop.
struct Config<'vm>(&'vm Vm);

impl<'vm> Config<'vm> {
    const FILE: &'static str = "/etc/qm-hotplug/config.d/50-lab.toml";

    #[track_caller]
    fn write(vm: &'vm Vm, text: &str) -> Self {
        let config = Self(vm);
        vm.ok(&format!("mkdir -p /etc/qm-hotplug/config.d && echo '{text}' >{}", Self::FILE));
        config
    }
}

impl Drop for Config<'_> {
    fn drop(&mut self) {
        self.0.sh(&format!("rm -f {}; rmdir /etc/qm-hotplug/config.d /etc/qm-hotplug", Self::FILE));
    }
}

/// Disks that are free, and disks of which the host uses something; all gone on drop.
struct Disks<'vm> {
    vm: &'vm Vm,
    stick: Option<Plugged<'vm>>,
    /// Paths of those that nobody uses.
    free: Vec<String>,
    /// Paths of those that are in use, each with what for.
    used: Vec<(String, &'static str)>,
}

/// Makes a file into a loop device for each name and prints their paths. One has a table with one partition of 4 MiB.
const MAKE_LOOPS: &str = r"
    cd /var/tmp
    for name in free mounted parted swap held; do truncate -s 16M lab-$name.img; done
    printf '\0\0\2\0\203\0\0\0\0\10\0\0\0\40\0\0' | dd of=lab-parted.img bs=1 seek=446 conv=notrunc status=none
    printf '\125\252' | dd of=lab-parted.img bs=1 seek=510 conv=notrunc status=none
    for name in free mounted parted swap held; do losetup --partscan --find --show lab-$name.img || exit; done
";

const FREE_LOOPS: &str = r"
    systemctl stop lab-holder
    umount /mnt/lab-mounted /mnt/lab-parted
    rmdir /mnt/lab-mounted /mnt/lab-parted
    for name in swap free mounted parted held; do
        device=$(losetup --noheadings --output NAME --associated /var/tmp/lab-$name.img)
        test $name = swap && swapoff $device
        losetup --detach $device
        rm -f /var/tmp/lab-$name.img
    done
";

impl<'vm> Disks<'vm> {
    #[track_caller]
    fn make(vm: &'vm Vm) -> Self {
        // Before anything is there, so that a part of it goes too.
        let mut disks = Self { vm, stick: None, free: Vec::new(), used: vec![("/dev/vda".into(), "mounted at /, ")] };
        vm.qmp(
            "blockdev-add",
            json!({ "driver": "null-co", "node-name": "lab", "size": 1 << 24, "read-zeroes": true }),
        );
        disks.stick = Some(vm.plug("disk", "usb-storage", json!({ "drive": "lab" })));

        let loops = vm.ok(MAKE_LOOPS);
        let [free, mounted, parted, swap, held] = loops.lines().collect::<Vec<_>>()[..] else { panic!("{loops}") };
        vm.wait_ok("the partition", SOON, &format!("test -b {parted}p1"));
        vm.ok(&format!(
            "mkdir -p /mnt/lab-mounted /mnt/lab-parted; set -e; \
             for device in {mounted} {parted}p1; do busybox mke2fs -F $device >/dev/null; done; \
             mount {mounted} /mnt/lab-mounted; mount {parted}p1 /mnt/lab-parted; mkswap -q {swap}; swapon {swap}; \
             systemd-run --quiet --collect --unit=lab-holder perl -e \
             'use Fcntl; sysopen(F, \"{held}\", O_RDWR | O_EXCL) or die $!; sleep 100000'"
        ));
        let is_held = format!("ls -l /proc/$(systemctl show -p MainPID --value lab-holder)/fd | grep -q {held}$");
        vm.wait_ok("a program to hold a disk", SOON, &is_held);
        vm.wait_ok("the disk on USB", SOON, "test $(stat -c %G /dev/sda) = disk");
        vm.ok("udevadm settle");

        disks.free = vec![free.into(), "/dev/sda".into()];
        disks.used.extend([
            (mounted.into(), "mounted at /mnt/lab-mounted, "),
            (parted.into(), "mounted at /mnt/lab-parted, "),
            (format!("{parted}p1"), "mounted at /mnt/lab-parted, "),
            (swap.into(), "swap space, "),
            (held.into(), "another program holds it"),
        ]);
        disks
    }
}

impl Drop for Disks<'_> {
    fn drop(&mut self) {
        self.vm.sh(FREE_LOOPS);
        drop(self.stick.take());
        // A machine that refuses this is of use to later cases all the same.
        let delete = || self.vm.qmp("blockdev-del", json!({ "node-name": "lab" }));
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(delete));
    }
}

fn a_host_enables_categories(vm: &Vm) {
    let _installed = Packaged::install(vm);
    let _keyboard = vm.plug("keyboard", "usb-kbd", json!({}));
    let disks = Disks::make(vm);
    let asks: String = ASKED.map(|name| format!("--annotation org.containers.qm.device.{name}=true ")).concat();

    let off = Container::run(vm, "crun", "off-crun", &asks);
    let all = nodes_of_host(vm, &format!("{CHARACTER_NODES} {DISKS}"));
    assert_eq!(off.nodes(), [], "no file enables anything");
    nothing_else_opens(&off, &all, &[TUN]);
    let lines = logged(vm, LOG, "off-crun");
    for name in ASKED {
        let why =
            if name == "lab" { "there is no category 'lab'" } else { "a file in /etc/qm-hotplug/config.d has to" };
        let skipped = format!("- WARNING - Skipping annotation org.containers.qm.device.{name}: {why}");
        assert!(lines.iter().any(|line| line.contains(&skipped)), "{skipped:?} is missing in {lines:#?}");
    }

    let config = Config::write(vm, CONFIG);
    let on = Container::run_all(vm, &[("crun", "on-crun", &asks), ("runc", "on-runc", &asks)]);
    let (used, expected): (Vec<Node>, Vec<Node>) =
        all.into_iter().partition(|node| disks.used.iter().any(|(path, _)| *path == node.path));
    assert_eq!(used.len(), disks.used.len());
    for path in disks.free.iter().map(String::as_str).chain(["/dev/uinput", "/dev/bus/usb/001/", "/dev/ttyS1"]) {
        assert!(expected.iter().any(|node| node.path.starts_with(path)), "the host has no {path}: {expected:?}");
    }
    for container in &on {
        assert_eq!(container.nodes(), expected, "{}", container.name);
        // A serial port that is not there has a node.
        let paths: Vec<&str> = expected.iter().map(|node| &*node.path).filter(|path| !path.contains("ttyS")).collect();
        for (opened, path) in container.open_all(&paths).iter().zip(&paths) {
            assert_eq!(opened, "opens", "{}: {path}", container.name);
        }
        nothing_else_opens(container, &used, &[]);
        let lines = logged(vm, LOG, &container.name);
        for (path, what_for) in &disks.used {
            let withheld = format!("- WARNING - Not adding device: {path}: ");
            let line = lines.iter().find(|line| line.contains(&withheld));
            assert!(line.is_some_and(|line| line.contains(what_for)), "{withheld:?}, {what_for}: {lines:#?}");
        }
    }
    drop(config);
}
