//! The unit as systemd runs it: reloads, the watchdog, its log, and what it may do.

use crate::Case;
use crate::container::Container;
use crate::install::Installed;
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("operation::reload_watchdog_and_log", reload_watchdog_and_log)];

const FILE: &str = "/etc/qm-hotplug/config.d/50-lab.toml";

fn reload_watchdog_and_log(vm: &Vm) {
    let installed = Installed::new(vm);
    let drop_in = DropIn::new(vm);
    vm.ok("systemctl start qm-hotplug");
    let containers = Container::run_all(vm, &[("crun", "operation", ASKS_FOR_STICKS)]);
    let container = &containers[0];
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    container.wait_for("/dev/ttyUSB0");
    status(vm, "1 containers, 1 grants, events from udev");
    fields_of_the_log(vm, &container.name);
    a_reload(vm, container);
    a_stuck_agent_is_started_anew(vm);
    assert_eq!(container.open("/dev/ttyUSB0"), "opens", "after the watchdog");
    stick.unplug();
    container.wait_for_no("/dev/ttyUSB0");
    drop(drop_in);
    drop(installed);
}

/// A watchdog that needs not be waited for so long.
struct DropIn<'vm>(&'vm Vm);

impl<'vm> DropIn<'vm> {
    fn new(vm: &'vm Vm) -> Self {
        let place = "/run/systemd/system/qm-hotplug.service.d";
        vm.ok(&format!("mkdir -p {place}; printf '[Service]\\nWatchdogSec=8\\n' >{place}/lab.conf"));
        vm.ok("systemctl daemon-reload");
        Self(vm)
    }
}

impl Drop for DropIn<'_> {
    fn drop(&mut self) {
        self.0.sh("rm -rf /run/systemd/system/qm-hotplug.service.d /etc/qm-hotplug; systemctl daemon-reload");
    }
}

#[track_caller]
fn status(vm: &Vm, text: &str) {
    let shown = "systemctl show qm-hotplug -p StatusText --value";
    vm.wait(text, SOON, |vm| vm.ok(shown).starts_with(text).then_some(()));
}

fn fields_of_the_log(vm: &Vm, container: &str) {
    let fields = format!("_SYSTEMD_UNIT=qm-hotplug.service F_CONTAINER={container} 'F_DEVICE=c 188:0'");
    let line = vm.ok(&format!("journalctl --sync; journalctl -o cat {fields}"));
    assert_eq!(line, "granted /dev/ttyUSB0");
}

fn a_reload(vm: &Vm, container: &Container<'_>) {
    let pid = vm.ok("systemctl show qm-hotplug -p MainPID --value");
    vm.ok(&format!("mkdir -p /etc/qm-hotplug/config.d; echo \"enable = ['tape']\" >{FILE}"));
    let output = vm.sh("systemctl reload qm-hotplug 2>&1");
    assert!(!output.success(), "{}", output.stdout);
    let problem = format!("{FILE}:1:11: there is no category 'tape' to enable");
    status(vm, &format!("1 containers, 1 grants, events from udev; configuration refused: {problem}"));
    let said = format!("qm-hotplug: the configuration stays as it was: {problem}");
    let journal = vm.ok("journalctl --sync; journalctl -o cat _SYSTEMD_UNIT=qm-hotplug.service");
    assert!(journal.lines().any(|line| line == said), "{journal}");
    assert_eq!(container.open("/dev/ttyUSB0"), "opens", "after a reload that was refused");

    vm.ok(&format!("printf '[[policy]]\\ndeny = [\"ttyUSB\"]\\n' >{FILE}; systemctl reload qm-hotplug"));
    container.wait_for_no("/dev/ttyUSB0");
    status(vm, "1 containers, 0 grants, events from udev");
    vm.ok(&format!("rm {FILE}; systemctl reload qm-hotplug"));
    container.wait_for("/dev/ttyUSB0");
    assert_eq!(vm.ok("systemctl show qm-hotplug -p MainPID --value"), pid);
    assert_eq!(vm.ok("systemctl show qm-hotplug -p SubState --value"), "running");
}

fn a_stuck_agent_is_started_anew(vm: &Vm) {
    let of_unit = |field: &str| vm.ok(&format!("systemctl show qm-hotplug -p {field} --value"));
    let (pid, restarts) = (of_unit("MainPID"), of_unit("NRestarts"));
    vm.ok("sleep 10");
    assert_eq!((of_unit("MainPID"), of_unit("NRestarts")), (pid.clone(), restarts), "one that is at work");
    vm.ok(&format!("kill -STOP {pid}"));
    let again = format!(
        "pid=$(systemctl show qm-hotplug -p MainPID --value); test $pid != 0 -a $pid != {pid} && systemctl is-active --quiet qm-hotplug"
    );
    vm.wait_ok("the watchdog", 4 * SOON, &again);
    let journal = vm.ok("journalctl --sync; journalctl -o cat UNIT=qm-hotplug.service");
    assert!(journal.contains("Watchdog timeout"), "{journal}");
}
