//! `qm-hotplug agent` as a systemd service in the guest.

use serde_json::Value;

use crate::vm::{SOON, Vm};

/// The transient unit.
const UNIT: &str = "qmh-agent";

/// A running agent. When it is dropped, it and everything that it left in force are taken out.
#[derive(Debug)]
pub(crate) struct Agent<'vm> {
    vm: &'vm Vm,
    /// Where the journal was when this was started.
    cursor: String,
}

impl<'vm> Agent<'vm> {
    /// Starts it. When this returns it has said that it is ready.
    #[track_caller]
    pub(crate) fn start(vm: &'vm Vm) -> Self {
        let shown = vm.ok("journalctl --sync; journalctl -n 0 --show-cursor");
        let cursor = shown.rsplit("cursor: ").next().unwrap_or_default().trim().to_owned();
        vm.ok(&format!(
            "systemd-run --quiet --unit={UNIT} --service-type=notify --collect \
             /usr/local/bin/qm-hotplug agent",
        ));
        Self { vm, cursor }
    }

    /// Starts it anew, as an update does.
    #[track_caller]
    pub(crate) fn restart(&self) {
        self.vm.ok(&format!("systemctl restart {UNIT}"));
    }

    /// Ends it in good order. What it granted stays.
    #[track_caller]
    pub(crate) fn stop(&self) {
        self.vm.ok(&format!("systemctl stop {UNIT}"));
    }

    /// Holds it up, or lets it go on.
    #[track_caller]
    pub(crate) fn pause(&self, pause: bool) {
        self.vm.ok(&format!("systemctl kill --signal={} {UNIT}", if pause { "STOP" } else { "CONT" }));
    }

    /// Kills it.
    #[track_caller]
    pub(crate) fn kill(&self) {
        self.vm.ok(&format!("systemctl kill --signal=KILL {UNIT}"));
        self.vm.wait_ok("the agent to be dead", SOON, &format!("! systemctl --quiet is-active {UNIT}"));
    }

    /// Prints how long after its event each grant was made and taken back, by the agent's own clock.
    pub(crate) fn print_times(&self, what: &str) {
        let journal =
            self.vm.ok(&format!("journalctl --sync; journalctl -u {UNIT} -o json --after-cursor='{}'", self.cursor));
        for verb in ["granted", "revoked"] {
            let mut micros: Vec<u64> = journal.lines().filter_map(|line| micros(line, verb)).collect();
            micros.sort_unstable();
            if let (Some(least), Some(most)) = (micros.first(), micros.last()) {
                let median = micros[micros.len() / 2];
                eprintln!(
                    "    {} {what}: {verb} {} times, µs after the event: least {least}, median {median}, most {most}",
                    self.vm.release(),
                    micros.len(),
                );
            }
        }
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        let output = self.vm.sh(&format!("systemctl stop {UNIT} 2>/dev/null; qm-hotplug agent --release"));
        if !output.success() {
            eprintln!("could not release the agent's grants: {}", output.stderr);
        }
    }
}

/// The field of a line of the journal that tells of such an act on an event.
fn micros(line: &str, verb: &str) -> Option<u64> {
    let entry: Value = serde_json::from_str(line).ok()?;
    let is_meant = entry["MESSAGE"].as_str()?.starts_with(verb);
    is_meant.then(|| entry["F_MICROS"].as_str()?.parse().ok()).flatten()
}

/// What `qm-hotplug status --json` says.
#[track_caller]
pub(crate) fn status(vm: &Vm) -> Value {
    json(vm, "qm-hotplug status --json")
}

/// What `qm-hotplug list --json` says of a container: paths of the nodes and why they are there, sorted by path.
#[track_caller]
pub(crate) fn grants_of(vm: &Vm, container: &str) -> Vec<(String, String)> {
    let grants = json(vm, &format!("qm-hotplug list {container} --json"));
    let text = |grant: &Value, field: &str| grant[field].as_str().expect("a stable field").to_owned();
    grants.as_array().expect("an array").iter().map(|grant| (text(grant, "path"), text(grant, "origin"))).collect()
}

#[track_caller]
fn json(vm: &Vm, command: &str) -> Value {
    let printed = vm.ok(command);
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{command}: {error}: {printed}"))
}

/// Names of the device programs of a cgroup, in the order in which they run; a runtime's has none.
#[track_caller]
pub(crate) fn programs(vm: &Vm, cgroup: &str) -> Vec<String> {
    // Where there is none at all, it prints nothing.
    let shown = vm.ok(&format!("bpftool --json cgroup show /sys/fs/cgroup{cgroup}"));
    let programs: Vec<Value> = if shown.is_empty() { Vec::new() } else { serde_json::from_str(&shown).expect("JSON") };
    let is_device = |program: &&Value| program["attach_type"].as_str().is_some_and(|kind| kind.ends_with("device"));
    programs.iter().filter(is_device).map(|program| program["name"].as_str().unwrap_or_default().to_owned()).collect()
}
