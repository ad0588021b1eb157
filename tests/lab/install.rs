//! What `scripts/install.sh` puts on a machine, and what is left when it has taken it away again.

use std::time::Instant;

use serde_json::Value;

use crate::Case;
use crate::agent::{grants_of, status};
use crate::container::Container;
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("install::service_hook_and_removal", service_hook_and_removal)];

const FILES: [&str; 12] = [
    "/usr/bin/qm-hotplug",
    "/usr/share/containers/oci/hooks.d/qm-hotplug.json",
    "/usr/lib/systemd/system/qm-hotplug.service",
    "/usr/lib/systemd/system/qm-hotplug.socket",
    "/usr/lib/sysusers.d/qm-hotplug.conf",
    "/usr/share/man/man1/qm-hotplug.1",
    "/usr/share/man/man1/qm-hotplug-explain.1",
    "/usr/share/man/man5/qm-hotplug.toml.5",
    "/usr/share/man/man7/qm-hotplug-selectors.7",
    "/usr/share/bash-completion/completions/qm-hotplug",
    "/usr/share/zsh/vendor-completions/_qm-hotplug",
    "/usr/share/fish/vendor_completions.d/qm-hotplug.fish",
];

/// The installation; uninstalled on drop.
pub(crate) struct Installed<'vm>(&'vm Vm);

impl<'vm> Installed<'vm> {
    #[track_caller]
    pub(crate) fn new(vm: &'vm Vm) -> Self {
        let installed = Self(vm);
        vm.ok("/mnt/repo/scripts/install.sh --binary /usr/local/bin/qm-hotplug");
        installed
    }

    #[track_caller]
    fn remove(self) {
        let output = self.0.sh("/mnt/repo/scripts/install.sh --uninstall");
        assert!(output.success(), "{}", output.stderr);
        // Nothing is left for drop to do.
        std::mem::forget(self);
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        let output = self.0.sh("/mnt/repo/scripts/install.sh --uninstall");
        if !output.success() {
            eprintln!("could not uninstall: {}", output.stderr);
        }
    }
}

fn service_hook_and_removal(vm: &Vm) {
    let installed = Installed::new(vm);
    the_unit_is_sound(vm);
    vm.ok("systemctl enable --now --quiet qm-hotplug");
    the_service_runs(vm);
    the_host_is_well(vm);
    // Through the hook, which lets them pass as there is nothing plugged in.
    let mut containers =
        Container::run_all(vm, &[("crun", "unit-crun", ASKS_FOR_STICKS), ("runc", "unit-runc", ASKS_FOR_STICKS)]);
    plugging_works(vm, &containers, "the service");
    refusals_are_told(vm, &containers);
    a_killed_agent_is_started_again(vm);
    plugging_works(vm, &containers, "the service, killed and started again");
    containers.extend(the_hook_gives_what_is_there_at_start(vm));
    after_the_removal_nothing_is_left(vm, installed, &containers);
}

fn the_unit_is_sound(vm: &Vm) {
    for file in FILES {
        vm.ok(&format!("test -f {file}"));
    }
    let output = vm.sh("systemd-analyze verify qm-hotplug.service 2>&1");
    assert!(output.success() && !output.stdout.contains("qm-hotplug"), "{}", output.stdout);
}

fn the_service_runs(vm: &Vm) {
    let fields =
        "Type,ActiveState,SubState,Result,NotifyAccess,WatchdogUSec,Restart,RestartUSec,OOMScoreAdjust,UnitFileState";
    let shown = vm.ok(&format!("systemctl show qm-hotplug -p {fields}"));
    for expected in [
        "Type=notify",
        "ActiveState=active",
        "SubState=running",
        "Result=success",
        "UnitFileState=enabled",
        "Restart=always",
        "RestartUSec=100ms",
    ] {
        assert!(shown.lines().any(|line| line == expected), "{expected} is missing in\n{shown}");
    }
    assert!(!shown.contains("WatchdogUSec=0") && !shown.contains("WatchdogUSec=infinity"), "no watchdog:\n{shown}");
    assert!(!shown.contains("OOMScoreAdjust=0"), "{shown}");
    let bounding = vm.ok("systemctl show qm-hotplug -p CapabilityBoundingSet --value");
    assert!(bounding.contains("cap_mknod") && !bounding.contains("cap_sys_module"), "{bounding}");
    // What the kernel says, not systemd.
    let pid = vm.ok("systemctl show qm-hotplug -p MainPID --value");
    let of_process = vm.ok(&format!("grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/{pid}/status"));
    assert!(of_process.contains("NoNewPrivs:\t1") && of_process.contains("Seccomp:\t2"), "{of_process}");
    assert!(!of_process.contains("CapBnd:\t000001ffffffffff"), "{of_process}");
    assert_eq!(status(vm)["agent"], true);
    assert_eq!(status(vm)["events"], "udev");

    let exposure = vm.ok("systemd-analyze security --no-pager qm-hotplug.service | tail -n 1");
    let memory = vm.ok(&format!("grep VmRSS /proc/{pid}/status"));
    let memory: String = memory.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
    let exposure: String = exposure.chars().filter(|c| c.is_ascii()).collect();
    eprintln!("    {}:{exposure}; capabilities: {bounding}; resident memory: {memory}", vm.release());
}

/// What `doctor` says of it, with the service and without.
fn the_host_is_well(vm: &Vm) {
    let look = || -> Vec<Value> { serde_json::from_str(&vm.ok("/usr/bin/qm-hotplug doctor --json")).expect("JSON") };
    let checks = look();
    for topic in ["rights", "kernel", "cgroup", "filter", "udev", "hook", "agent", "engines", "security"] {
        assert!(checks.iter().any(|check| check["topic"] == topic), "{topic} is missing in {checks:#?}");
    }
    assert!(checks.iter().all(|check| check["state"] == "ok"), "{checks:#?}");
    vm.ok("systemctl stop qm-hotplug");
    let checks = look();
    let agent = checks.iter().find(|check| check["topic"] == "agent").expect("its line");
    let remedy = agent["remedy"].as_str().expect("what to do").trim_start_matches("sudo ");
    assert_eq!(agent["state"], "warning", "{agent}");
    // It is a command line that does what it says.
    vm.ok(remedy);
    assert!(look().iter().all(|check| check["state"] == "ok"), "after {remedy}");
}

#[track_caller]
fn plugging_works(vm: &Vm, containers: &[Container<'_>], by: &str) {
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for container in containers {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:20 660", "{}, {by}", container.name);
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}, {by}", container.name);
    }
    stick.unplug();
    for container in containers {
        container.wait_for_no("/dev/ttyUSB0");
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}, {by}", container.name);
    }
}

/// Within the bounds that the unit sets, on a host with udevd and where systemd has filters of its own.
fn refusals_are_told(vm: &Vm, containers: &[Container<'_>]) {
    vm.ok("systemd-run --quiet --unit=qmh-told --collect sh -c 'exec qm-hotplug monitor >/run/qmh-told 2>&1'");
    vm.wait_ok("the monitor", SOON, "grep waiting /run/qmh-told");
    for container in containers {
        assert_eq!(container.open_by_hand("c 4 3"), "Operation not permitted", "{}", container.name);
        let line = format!(
            "container {} was refused c 4:3 /dev/tty3 (rw); the annotation org.containers.qm.device.ttys=true would allow it",
            container.name
        );
        vm.wait_ok("it to be told", SOON, &format!("grep -F '{line}' /run/qmh-told"));
        let fields = format!("_SYSTEMD_UNIT=qm-hotplug.service F_CONTAINER={}", container.name);
        let journal = vm.ok(&format!("journalctl --sync; journalctl -o cat {fields}"));
        assert!(journal.contains("refused c 4:3 /dev/tty3 (rw)"), "{journal}");
    }
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    let lines =
        ["/dev/ttyUSB0 (c 188:0) was plugged in, for unit-crun, unit-runc ", "was granted /dev/ttyUSB0 (rule:ttyUSB, "];
    for line in lines {
        vm.wait_ok(line, SOON, &format!("grep -F '{line}' /run/qmh-told"));
    }
    eprintln!("{}", vm.ok("grep ttyUSB0 /run/qmh-told"));
    stick.unplug();
    vm.wait_ok("the end to be told", SOON, "grep -F '/dev/ttyUSB0 (c 188:0) was unplugged, from ' /run/qmh-told");
    containers.iter().for_each(|container| container.wait_for_no("/dev/ttyUSB0"));
    vm.ok("systemctl stop qmh-told; rm /run/qmh-told");
}

fn a_killed_agent_is_started_again(vm: &Vm) {
    let before = vm.ok("systemctl show qm-hotplug -p MainPID --value");
    let killed = Instant::now();
    vm.ok("systemctl kill --signal=KILL qm-hotplug");
    let again = format!(
        "pid=$(systemctl show qm-hotplug -p MainPID --value); test $pid != 0 -a $pid != {before} && systemctl is-active --quiet qm-hotplug"
    );
    vm.wait_ok("the agent to be back", SOON, &again);
    // A second on hardware. Here systemd alone takes most of one to start anything, so RestartUSec is what counts.
    eprintln!("    {}: killed and ready again after {:.1} s", vm.release(), killed.elapsed().as_secs_f64());
    assert_eq!(vm.ok("systemctl show qm-hotplug -p NRestarts --value"), "1");
}

/// Containers that started with a stick plugged in.
fn the_hook_gives_what_is_there_at_start(vm: &Vm) -> Vec<Container<'_>> {
    vm.ok("systemctl stop qm-hotplug");
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    let started = Container::run_all(
        vm,
        &[
            ("crun", "hook-crun", ASKS_FOR_STICKS),
            ("runc", "hook-runc", ASKS_FOR_STICKS),
            ("crun", "hookless", "--annotation org.containers.qm.device.ttyUSB=false"),
        ],
    );
    let (hookless, hooked): (Vec<_>, Vec<_>) = started.into_iter().partition(|c| c.name == "hookless");
    for container in &hooked {
        assert_eq!(container.node("/dev/ttyUSB0"), "character special file bc:0 0:20 660", "{}", container.name);
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}: without an agent", container.name);
    }
    assert_eq!(hookless[0].node("/dev/ttyUSB0"), "nothing");
    assert_eq!(hookless[0].open_by_hand("c 188 0"), "Operation not permitted");
    // What the hook gave goes with the stick, even if the agent comes to know of both only later.
    stick.unplug();
    vm.wait_ok("the host's node to go", SOON, "! test -e /dev/ttyUSB0");
    vm.ok("systemctl start qm-hotplug");
    for container in &hooked {
        container.wait_for_no("/dev/ttyUSB0");
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}: never seen", container.name);
    }
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for container in &hooked {
        container.wait_for("/dev/ttyUSB0");
        assert_eq!(grants_of(vm, &container.name), [("/dev/ttyUSB0".into(), "rule:ttyUSB".into())]);
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}: with the agent", container.name);
    }
    // Started with the agent: `list` tells what came from where.
    let started =
        Container::run_all(vm, &[("crun", "late-crun", ASKS_FOR_STICKS), ("runc", "late-runc", ASKS_FOR_STICKS)]);
    for container in &started {
        assert_eq!(container.open("/dev/ttyUSB0"), "opens", "{}", container.name);
        vm.wait("the agent to know of it", SOON, |vm| (!grants_of(vm, &container.name).is_empty()).then_some(()));
        assert_eq!(grants_of(vm, &container.name), [("/dev/ttyUSB0".into(), "start".into())]);
    }
    stick.unplug();
    for container in hooked.iter().chain(&started) {
        container.wait_for_no("/dev/ttyUSB0");
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}", container.name);
    }
    hooked.into_iter().chain(started).collect()
}

fn after_the_removal_nothing_is_left(vm: &Vm, installed: Installed<'_>, containers: &[Container<'_>]) {
    let _stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for container in containers {
        container.wait_for("/dev/ttyUSB0");
        vm.ok(&format!("qm-hotplug attach {} /dev/vda /dev/made/for/disk", container.name));
        assert_eq!(container.open("/dev/made/for/disk"), "opens", "{}", container.name);
    }
    assert!(vm.ok("bpftool cgroup tree").contains("qmhp_"));
    installed.remove();

    let programs = vm.ok("bpftool cgroup tree");
    assert!(!programs.contains("qmhp_"), "{programs}");
    // Programs that are attached nowhere would not be in the tree.
    let loaded = vm.ok("bpftool prog list; bpftool map list");
    assert!(!loaded.contains("qmhp_"), "{loaded}");
    for container in containers {
        assert_eq!(container.node("/dev/ttyUSB0"), "nothing", "{}", container.name);
        assert_eq!(container.node("/dev/made"), "nothing", "{}", container.name);
        assert_eq!(container.open_by_hand("b 254 0"), "Operation not permitted", "{}", container.name);
    }
    for file in
        FILES.into_iter().chain(["/run/qm-hotplug", "/etc/systemd/system/multi-user.target.wants/qm-hotplug.service"])
    {
        vm.ok(&format!("! test -e {file} && ! test -L {file}"));
    }
    assert_eq!(vm.ok("systemctl show qm-hotplug -p LoadState --value"), "not-found");
}
