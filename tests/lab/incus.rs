//! Incus, whose containers have a user namespace and no device filter: what they may open is what they have a node for.

use crate::Case;
use crate::agent::{Agent, grants_of, status};
use crate::container::Container;
use crate::mapped::open;
use crate::plug::plug_stick;
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("incus::sticks_reach_unprivileged_containers", sticks_reach_them)];

/// No network, and directories for storage.
const PRESEED: &str = "\
storage_pools: [{ name: default, driver: dir }]
profiles: [{ name: default, devices: { root: { type: disk, path: /, pool: default } } }]";

const RULE: &str = "[[container]]\nmatch = 'incus:asks-*'\ndevices = ['ttyUSB']";

/// A running Incus with an image of busybox; on drop it is stopped and its rule is gone.
struct Incus<'vm>(&'vm Vm);

impl<'vm> Incus<'vm> {
    #[track_caller]
    fn start(vm: &'vm Vm) -> Self {
        let incus = Self(vm);
        vm.ok(&format!(
            "set -e; mkdir -p /etc/qm-hotplug/config.d /var/tmp/image; cd /var/tmp/image
            echo \"{RULE}\" >/etc/qm-hotplug/config.d/50-lab.toml
            lab-rootfs rootfs; mkdir rootfs/sbin
            printf '#!/bin/sh\\nexec sleep 100000\\n' >rootfs/sbin/init; chmod +x rootfs/sbin/init
            printf 'architecture: x86_64\\ncreation_date: 1\\n' >metadata.yaml; tar -cf ../image.tar .
            systemctl start incus",
        ));
        vm.ok(&format!(
            "echo '{PRESEED}' | incus admin init --preseed && incus image import -q /var/tmp/image.tar --alias lab",
        ));
        incus
    }

    #[track_caller]
    fn launch(&self, name: &str) -> Container<'vm> {
        let mut container = Container::of_other_engine(self.0, name, format!("incus delete --force {name}"));
        self.0.ok(&format!("incus launch -q lab {name} 2>&1"));
        self.look_up(&mut container);
        container
    }

    /// Waits until its own program runs, and notes its pid.
    #[track_caller]
    fn look_up(&self, container: &mut Container<'_>) {
        let look = format!(
            "pid=$(head -n 1 /sys/fs/cgroup/lxc.payload.{}/cgroup.procs) && \
             test \"$(readlink /proc/$pid/exe)\" = /bin/busybox && echo $pid",
            container.name,
        );
        let printed = self.0.wait_ok(&format!("{} to run", container.name), SOON * 3, &look);
        container.pid = printed.parse().expect("a number");
    }
}

impl Drop for Incus<'_> {
    fn drop(&mut self) {
        self.0.sh(
            "systemctl stop incus.service incus.socket lxcfs; rm -rf /etc/qm-hotplug /var/tmp/image /var/tmp/image.tar",
        );
    }
}

fn sticks_reach_them(vm: &Vm) {
    let incus = Incus::start(vm);
    let mut asks = incus.launch("asks-incus");
    let _agent = Agent::start(vm);
    let plain = incus.launch("plain-incus");
    vm.wait_ok("both to be found", SOON, "test $(qm-hotplug ps | grep -c ' incus:[ap].*-incus ') = 2");

    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    asks.wait_for("/dev/ttyUSB0");
    assert_eq!(asks.node("/dev/ttyUSB0"), "character special file bc:0 1000000:1000020 660");
    assert_eq!(open(vm, &asks, "/dev/ttyUSB0"), "opens");
    assert_eq!(grants_of(vm, "incus:asks-incus"), [("/dev/ttyUSB0".into(), "rule:ttyUSB".into())]);

    // Without a rule there is no node, and root inside makes none.
    assert_eq!(plain.node("/dev/ttyUSB0"), "nothing");
    let made = vm.sh("incus exec plain-incus -- mknod /dev/by-hand c 188 0");
    assert!(!made.success() && made.stderr.contains("Operation not permitted"), "{}", made.stderr);
    vm.ok("qm-hotplug attach incus:plain-incus /dev/ttyUSB0 /dev/by-person && qm-hotplug verify incus:plain-incus");
    assert_eq!(open(vm, &plain, "/dev/by-person"), "opens");
    let by_its_own = "incus exec plain-incus -- sh -c 'exec 3<>/dev/by-person && echo opens'";
    assert_eq!(vm.ok(by_its_own), "opens");
    vm.ok("qm-hotplug detach incus:plain-incus /dev/ttyUSB0");
    assert_eq!(plain.node("/dev/by-person"), "nothing");

    stick.unplug();
    asks.wait_for_no("/dev/ttyUSB0");
    assert_eq!(status(vm)["entries"], 0);

    let _stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    asks.wait_for("/dev/ttyUSB0");
    vm.ok("incus restart -q --force asks-incus");
    incus.look_up(&mut asks);
    asks.wait_for("/dev/ttyUSB0");
    assert_eq!(open(vm, &asks, "/dev/ttyUSB0"), "opens", "after its restart");
}
