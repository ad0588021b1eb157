//! A container that forks without end, as far as its limit lets it.

use crate::Case;
use crate::agent::{Agent, grants_of, status};
use crate::container::Container;
use crate::plug::{ASKS_FOR_STICKS, FIRST_PLUG, plug_stick};
use crate::vm::Vm;

pub(crate) const CASES: &[Case] = &[("forks::a_container_that_forks_without_end", a_container_that_forks_without_end)];

fn a_container_that_forks_without_end(vm: &Vm) {
    let _agent = Agent::start(vm);
    let container = Container::run(vm, "runc", "forks", &format!("--pids-limit=100 --cpus=0.5 {ASKS_FOR_STICKS}"));
    let cgroup = container.cgroup();
    vm.ok("podman exec --detach forks sh -c 'while :; do sh -c \"sleep 1000 & sleep 1000\" & done 2>/dev/null'");
    let is_full = format!("test $(cat /sys/fs/cgroup{cgroup}/pids.current) -ge 99");
    vm.wait_ok("the limit", FIRST_PLUG, &is_full);
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    container.wait_for("/dev/ttyUSB0");
    assert_eq!(grants_of(vm, "forks"), [("/dev/ttyUSB0".into(), "rule:ttyUSB".into())]);
    vm.ok("qm-hotplug verify forks /dev/ttyUSB0");
    vm.ok(&is_full);
    stick.unplug();
    container.wait_for_no("/dev/ttyUSB0");
    assert_eq!(status(vm)["entries"], 0);
}
