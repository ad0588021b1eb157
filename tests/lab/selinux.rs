//! SELinux, enforcing, with Debian's policy: what a container gets has the label of its own files, and programs that run as
//! the policy has containers run get at it.

use serde_json::json;

use crate::Case;
use crate::container::Container;
use crate::install::Installed;
use crate::plug::{ASKS_FOR_STICKS, FIRST_PLUG};
use crate::vm::{Image, Vm};

pub(crate) const CASES: &[Case] =
    &[("selinux::nodes_have_the_label_of_the_containers_files", nodes_have_the_label_of_the_containers_files)];

/// The policy is loaded at boot or never. Enforcing comes later: mount(8) may not mount 9p in Debian's.
const KERNEL: &str = "security=selinux selinux=1 enforcing=0";

/// Ids that Podman need not be given.
const MAPPED: &str = "--uidmap 0:100000:65536 --gidmap 0:100000:65536";

const MADE: [&str; 6] = [
    "/dev/ttyUSB0",
    "/dev/serial/by-id",
    "/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_LAB1-if00-port0",
    "/run/udev/control",
    "/run/udev/data/c188:0",
    "/run/udev/tags/systemd/c188:0",
];

fn nodes_have_the_label_of_the_containers_files(_: &Vm) {
    let image = Image::from_environment().expect("the tier does not run without");
    let vm = &Vm::boot_with(&image, "selinux", KERNEL);
    let _installed = Installed::new(vm);
    // What is made in these directories has their type.
    let mut prepare = String::from("set -e; ");
    for name in ["crun", "runc", "mapped"] {
        prepare += &format!("mkdir /var/tmp/{name}; chcon -t container_file_t /var/tmp/{name}; ");
    }
    vm.ok(&format!("{prepare} lab-rootfs /var/tmp/mapped; chown -hR 100000:100000 /var/tmp/mapped; setenforce 1"));
    vm.ok("systemctl start qm-hotplug");
    let mapped = format!("{MAPPED} {ASKS_FOR_STICKS}");
    let containers = Container::run_all(
        vm,
        &[("crun", "crun", ASKS_FOR_STICKS), ("runc", "runc", ASKS_FOR_STICKS), ("crun", "mapped", &mapped)],
    );

    let stick = vm.plug("LAB1", "usb-serial", json!({ "serial": "LAB1" }));
    vm.wait_ok("the stick", FIRST_PLUG, "test -c /dev/ttyUSB0");
    for container in &containers {
        container.wait_for("/run/udev/tags/systemd/c188:0");
        container.wait_for(MADE[2]);
        let expected = label(vm, container, "/dev");
        // Containers are kept apart by their categories: no two have the same.
        assert!(expected.starts_with("system_u:object_r:container_file_t:s0:c"), "{expected}");
        for path in MADE {
            assert_eq!(label(vm, container, path), expected, "{} {path}", container.name);
        }
        let exec = |command: &str| vm.ok(&format!("podman exec {} {command}", container.name));
        let domain = exec("cat /proc/self/attr/current");
        assert!(domain.starts_with("system_u:system_r:container_t:s0:c"), "{domain}");
        assert!(exec("cat /run/udev/data/c188:0").contains("E:ID_SERIAL_SHORT=LAB1"), "{}", container.name);
        assert_eq!(container.open_by_exec(&["/dev/ttyUSB0"]), ["opens"], "{}", container.name);

        let attach = format!("qm-hotplug attach {} /dev/ttyUSB0 /dev/by/person", container.name);
        vm.ok(&attach);
        assert_eq!(label(vm, container, "/dev/by/person"), expected, "{}", container.name);
        vm.ok(&format!("qm-hotplug detach {} /dev/by/person", container.name));
    }
    // Of the containers and of the agent, which runs as what systemd starts and the policy does not know.
    assert_eq!(vm.ok("ps -C qm-hotplug -o label=").lines().next(), Some("system_u:system_r:initrc_t:s0"));
    let denied = vm.ok("dmesg | grep 'avc:  denied' | grep -E 'scontext=[^ ]*:(container_t|initrc_t):' || true");
    assert_eq!(denied, "");

    // So that it is known to be the label. Podman's own /dev is mounted with one for all; that node is on a file system of ours.
    let mapped = &containers[2];
    vm.ok(&format!("chcon -t usbtty_device_t /proc/{}/root/dev/ttyUSB0", mapped.pid));
    // It may not even look.
    assert_eq!(mapped.open_by_exec(&["/dev/ttyUSB0"]), ["nothing is there"]);

    stick.unplug();
    for container in &containers {
        container.wait_for_no("/dev/ttyUSB0");
        container.wait_for_no("/run/udev/data/c188:0");
    }
}

#[track_caller]
fn label(vm: &Vm, container: &Container<'_>, path: &str) -> String {
    vm.ok(&format!("stat -c %C /proc/{}/root{path}", container.pid))
}
