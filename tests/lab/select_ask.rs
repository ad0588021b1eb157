//! A device for one container at a time, devices that a start needs, and selectors on the command line.

use std::time::Duration;

use serde_json::{Value, json};

use crate::Case;
use crate::agent::Agent;
use crate::channel::Output;
use crate::container::Container;
use crate::everything::nodes_of_host;
use crate::hook::Packaged;
use crate::select::{NOTHING, asks, assert_has, stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[
    ("select_ask::one_container_at_a_time", one_container_at_a_time),
    ("select_ask::a_start_that_needs_a_device", a_start_that_needs_a_device),
    ("select_ask::by_command", by_command),
];

/// How long Podman may take to start a container and to remove it, when the host has much else to do.
const A_START: Duration = Duration::from_secs(60);

const A1: &str = "/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_A1-if00-port0";

fn one_container_at_a_time(vm: &Vm) {
    let asked = asks(vm, "zigbee", "usb=0403:6001:A1,as=/dev/zigbee,exclusive");
    let has = |container: &Container<'_>, what: &'static str, when: &str| {
        assert_has(vm, container, &[("/dev/zigbee".into(), what)], when);
    };
    let _installed = Packaged::install(vm);
    let _agent = Agent::start(vm);
    let first = Container::run(vm, "crun", "first-crun", &asked);
    let a1 = stick(vm, "A1", "5");
    has(&first, A1, "alone");

    let second = Container::run(vm, "runc", "second-runc", &asked);
    let held = vm.wait_ok(
        "the journal to name the holder",
        SOON,
        "journalctl --sync; journalctl -o json SYSLOG_IDENTIFIER=qm-hotplug | grep second-runc | \
         grep -o '\"MESSAGE\":\"[^\"]*container first-crun[^\"]*'",
    );
    eprintln!("    told: {held}");
    has(&second, NOTHING, "beside another");
    assert_eq!(second.open_by_hand("c 188 0"), "Operation not permitted");
    has(&first, A1, "beside another");

    drop(first);
    has(&second, A1, "when the first one ended");
    a1.unplug();
    has(&second, NOTHING, "when it was unplugged");
    let _a1 = stick(vm, "A1", "6");
    has(&second, A1, "when it was back");
}

/// Starts a container in the background that tells whether it can open `/dev/needed`; what Podman says goes to `log`.
fn start(vm: &Vm, asked: &str, log: &str) {
    let opens = "(exec 3<>/dev/needed) && echo opens";
    vm.ok(&format!(
        "rm -f {log}; lab-rootfs /var/tmp/needs && (podman --runtime crun run --rm --name needs --network=none {asked} \
         --rootfs /var/tmp/needs sh -c '{opens}'; echo status $?; rm -rf /var/tmp/needs) >{log} 2>&1 &",
    ));
}

fn a_start_that_needs_a_device(vm: &Vm) {
    let _installed = Packaged::install(vm);
    let log = "/run/lab-needs.log";
    start(vm, &asks(vm, "needed", "usb=0403:6001:Z9,as=/dev/needed,required,wait=30s"), log);
    vm.wait_ok("the hook", SOON, "grep -ls [p]recreate /proc/[0-9]*/cmdline");
    let _z9 = stick(vm, "Z9", "5");
    let told = vm.wait_ok("the container's end", A_START, &format!("grep ^status {log} && cat {log}"));
    assert!(told.contains("opens") && told.contains("status 0"), "{told}");

    start(vm, &asks(vm, "needed", "serial=nobody,as=/dev/needed,required,wait=1s"), log);
    let told = vm.wait_ok("the container's end", A_START, &format!("grep ^status {log} && cat {log}"));
    eprintln!("    told: {told}");
    assert!(!told.contains("opens") && !told.contains("status 0"), "{told}");
    vm.ok("journalctl --sync; journalctl -o json SYSLOG_IDENTIFIER=qm-hotplug | grep needs | grep serial=nobody");
}

fn by_command(vm: &Vm) {
    let agent = Agent::start(vm);
    let container = Container::run(vm, "crun", "told-crun", "");
    let run = |command: &str, status: i32| -> Output {
        let output = vm.sh(&format!("qm-hotplug {command}"));
        assert_eq!(output.status, status, "{command}: {}{}", output.stdout, output.stderr);
        output
    };

    let log = "/run/lab-attach.log";
    vm.ok(&format!(
        "(qm-hotplug attach told-crun usb=0403:6001:C3 /dev/told --wait 30s; echo status $?) >{log} 2>&1 &",
    ));
    vm.wait_ok("attach to wait", SOON, "grep -ls [a]ttach /proc/[0-9]*/cmdline");
    let _other = stick(vm, "D4", "6");
    assert_eq!(vm.ok(&format!("cat {log}")), "", "it waits for another one");
    let c3 = stick(vm, "C3", "5");
    let told = vm.wait_ok("attach", A_START, &format!("grep ^status {log} && cat {log}"));
    assert!(told.contains("status 0"), "{told}");
    assert_has(vm, &container, &[("/dev/told".into(), "/dev/ttyUSB1")], "that a person gave it to");
    run("detach told-crun /dev/told", 0);

    let late = run("attach told-crun serial=nobody /dev/told --wait 1s", 6);
    assert!(late.stderr.contains("serial=nobody"), "{}", late.stderr);
    run("attach told-crun serial=nobody /dev/told", 4);
    run("attach told-crun serial= /dev/told", 2);
    let several = vm.sh("qm-hotplug attach told-crun usb=0403:6001 /dev/told");
    assert!([2, 4].contains(&several.status), "{several:?}");
    for candidate in ["/dev/ttyUSB0", "/dev/ttyUSB1", "C3", "D4"] {
        assert!(several.stderr.contains(candidate), "{candidate} is not named: {}", several.stderr);
    }
    assert_eq!(container.nodes(), [], "after what was refused");
    run("attach told-crun usb=0403:6001 --all", 0);
    let sticks = nodes_of_host(vm, "/dev/ttyUSB*");
    assert_eq!(container.nodes(), sticks);
    assert_eq!(container.open_all(&["/dev/ttyUSB0", "/dev/ttyUSB1"]), ["opens"; 2]);

    let listed = run("devices usb=0403:6001:[CD]? --json", 0);
    let listed: Value = serde_json::from_str(&listed.stdout).expect("JSON");
    let nodes: Vec<&Value> = listed.as_array().expect("an array").iter().map(|device| &device["device"]).collect();
    assert_eq!(nodes, [&json!("/dev/ttyUSB0"), &json!("/dev/ttyUSB1")], "{listed}");
    run("devices serial=nobody", 0);

    let printed = run("devices --annotation /dev/ttyUSB1", 0).stdout;
    eprintln!("    printed: {printed}");
    let by_print = Container::run(vm, "runc", "printed-runc", &format!("--annotation '{}'", printed.trim()));
    by_print.wait_for("/dev/ttyUSB1");
    assert_eq!(by_print.nodes(), nodes_of_host(vm, "/dev/ttyUSB1"));

    drop(c3);
    by_print.wait_for_no("/dev/ttyUSB1");
    container.wait_for_no("/dev/ttyUSB1");
    assert_eq!(by_print.nodes(), [], "the other one is not meant");
    agent.print_times("by command");
}
