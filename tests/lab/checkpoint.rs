//! A container that is frozen to disk and brought back by CRIU: another init, the same name. In bookworm, whose
//! Podman, runc and CRIU fit together.

use crate::Case;
use crate::agent::{Agent, grants_of, status};
use crate::container::Container;
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("checkpoint::a_container_from_disk_has_what_it_asks_for", from_disk)];

fn from_disk(vm: &Vm) {
    // CRIU takes no mount along that the runtime does not know.
    let asks = format!("{ASKS_FOR_STICKS} --annotation org.containers.qm.udev=false");
    let mut container = Container::run(vm, "runc", "check", &asks);
    let _agent = Agent::start(vm);
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    container.wait_for("/dev/ttyUSB0");
    let first = container.pid;
    vm.ok("podman container checkpoint check");
    vm.wait("its grants to go", SOON, |vm| (status(vm)["entries"] == 0).then_some(()));
    vm.ok("podman container restore check");
    container.look_again();
    assert_ne!(container.pid, first);
    container.wait_for("/dev/ttyUSB0");
    vm.wait("its grant", SOON, |vm| (status(vm)["entries"] == 1).then_some(()));
    assert_eq!(container.open("/dev/ttyUSB0"), "opens");
    assert_eq!(grants_of(vm, "check"), [("/dev/ttyUSB0".into(), "rule:ttyUSB".into())]);
    // The node came back from disk; it goes with its device all the same.
    stick.unplug();
    container.wait_for_no("/dev/ttyUSB0");
    assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted");
}
