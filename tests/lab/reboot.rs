//! The machine is started anew without having been shut down, and what was attached for good is there again.

use crate::Case;
use crate::agent::{Agent, grants_of, programs};
use crate::container::Container;
use crate::plug::{FIRST_PLUG, plug_stick};
use crate::vm::Vm;

pub(crate) const CASES: &[Case] = &[("reboot::what_was_attached_for_good_is_there_again", attached_for_good)];

fn attached_for_good(vm: &Vm) {
    let _stick = plug_stick(vm, "LAB9", "/dev/ttyUSB0");
    let link = vm.ok("ls /dev/serial/by-id/*LAB9*");
    let mut containers = Container::run_all(vm, &[("crun", "kept-crun", ""), ("runc", "plain-runc", "")]);
    let _before = Agent::start(vm);
    let attach = |arguments: &str| vm.ok(&format!("qm-hotplug attach kept-crun {arguments}"));
    attach("/dev/ttyUSB0 /dev/for-now");
    attach(&format!("{link} /dev/zigbee --persist --access rw --mode 0640"));
    // The lab's file system has no journal: there fsync(2) of single files and directories does not outlive a cut.
    vm.ok("sync");
    vm.cut_power();

    vm.ok("test ! -e /run/qm-hotplug/ledger");
    vm.wait_ok("the stick", FIRST_PLUG, &format!("test -e {link}"));
    vm.ok("podman start kept-crun plain-runc");
    containers.iter_mut().for_each(Container::look_again);
    let _after = Agent::start(vm);
    let (kept, plain) = (&containers[0], &containers[1]);
    kept.wait_for("/dev/zigbee");
    assert_eq!(kept.open_all(&["/dev/zigbee", "/dev/for-now"]), ["opens", "nothing is there"]);
    assert_eq!(kept.node("/dev/zigbee"), "character special file bc:0 0:20 640");
    assert_eq!(grants_of(vm, "kept-crun"), [("/dev/zigbee".to_owned(), "manual".to_owned())]);
    assert_eq!(plain.open_by_hand("c 188 0"), "Operation not permitted");
    vm.ok("qm-hotplug detach kept-crun /dev/zigbee && test -z \"$(ls /var/lib/qm-hotplug/attached)\"");
    assert_eq!(kept.open_by_hand("c 188 0"), "Operation not permitted");
    assert!(!programs(vm, &kept.cgroup()).iter().any(|name| name.starts_with("qmhp")));
}
