//! A container with a systemd and a udevd of its own, as a QM partition has them: what they do stays as they did it.

use crate::Case;
use crate::agent::Agent;
use crate::container::Container;
use crate::debian::DebianRoot;
use crate::hook::Packaged;
use crate::plug::{ASKS_FOR_STICKS, FIRST_PLUG, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("inner_systemd::keeps_working", keeps_working)];

/// What a udevd of its own needs: a writable `/sys`. The device filter is the runtime's, unlike with `--privileged`.
const OF_ITS_OWN: &str = "--systemd=always --cap-add=all --volume /sys:/sys";

/// Starts with the stick and ends with it.
const UNIT: &str = "\
[Unit]
BindsTo=dev-ttyUSB0.device
After=dev-ttyUSB0.device
[Service]
ExecStart=sleep 100000
[Install]
WantedBy=dev-ttyUSB0.device";

/// A rule inside that is unlike the host's: group 29 is audio.
const RULE: &str = r#"KERNEL=="ttyUSB*", GROUP="audio", MODE="0604""#;

fn keeps_working(vm: &Vm) {
    let _installed = Packaged::install(vm);
    let root = DebianRoot::make(vm, "systemd");
    root.write("/etc/systemd/system/bound.service", UNIT);
    root.write("/etc/udev/rules.d/99-own.rules", RULE);
    // What is of no use inside and takes long.
    vm.ok(&format!(
        "chroot {0} systemctl --quiet enable bound.service 2>/dev/null; cd {0}/etc/systemd/system && \
         for unit in podman.service netavark-dhcp-proxy.socket systemd-logind.service; do ln -sf /dev/null $unit; done",
        root.path(),
    ));
    let agent = Agent::start(vm);
    let arguments = format!("{OF_ITS_OWN} {ASKS_FOR_STICKS}");
    let container = root.run_all(&[("crun", "systemd-crun", &arguments)], "/sbin/init").remove(0);
    let exec = |command: &str| format!("podman exec {} {command}", container.name);
    // systemd inside listens to nobody where this is missing when it starts, and its udevd comes later: nothing of ours.
    vm.wait_ok("udevd inside", FIRST_PLUG * 3, &exec("udevadm control --ping --timeout=5"));
    vm.wait_ok("systemd inside", FIRST_PLUG * 3, &exec("systemctl is-system-running | grep -E 'running|degraded'"));
    assert_eq!(vm.ok(&container.outside("stat -c %F /run/udev/control")), "socket", "its own");
    vm.ok(&exec("systemctl daemon-reexec"));
    vm.ok(&format!("podman exec --detach {} sh -c 'udevadm monitor --udev >/out/events'", container.name));
    vm.wait_ok("the monitor inside", SOON * 3, &format!("grep -q '^UDEV - ' {}/out/events", root.path()));

    for round in ["first", "second"] {
        let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
        container.wait_for("/dev/ttyUSB0");
        let is_up = "systemctl --quiet is-active dev-ttyUSB0.device bound.service";
        vm.wait_ok("the device's unit and the one bound to it", SOON * 2, &exec(is_up));
        assert_eq!(container.open("/dev/ttyUSB0"), "opens");
        stays_as_it_is(vm, &container, &agent);
        stick.unplug();
        container.wait_for_no("/dev/ttyUSB0");
        vm.wait_ok("the units to end", SOON * 2, &format!("! {}", exec(is_up)));
        container.wait_for_no("/dev/serial");

        let events = vm.ok(&format!("grep -E 'ttyUSB0 \\(tty\\)' {}/out/events", root.path()));
        let count = |action: &str| events.lines().filter(|line| line.contains(action)).count();
        let times = if round == "first" { 1 } else { 2 };
        assert_eq!((count(" add "), count(" remove ")), (times, times), "{round}: {events}");
    }
}

/// Owner, mode and node: what its udevd made of them, over some seconds and a restart of the agent.
#[track_caller]
fn stays_as_it_is(vm: &Vm, container: &Container<'_>, agent: &Agent<'_>) {
    vm.ok("udevadm settle");
    vm.ok(&format!("podman exec {} udevadm settle", container.name));
    let look = container.outside("stat -c '%i %Z %u:%g %a' /dev/ttyUSB0 /run/udev/data/c188:0");
    assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:29 604", "its own udevd's");
    let before = vm.ok(&look);
    vm.ok("sleep 3");
    assert_eq!(vm.ok(&look), before, "somebody changes it again and again");
    agent.restart();
    vm.ok("sleep 3");
    assert_eq!(vm.ok(&look), before, "a restart of the agent changes it");
}
