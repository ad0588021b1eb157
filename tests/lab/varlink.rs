//! The agent's interface as systemd's own client sees it, and as the unit confines it.

use serde_json::{Value, json};

use crate::Case;
use crate::container::Container;
use crate::install::Installed;
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("varlink::systemds_client_talks_to_it", systemds_client_talks_to_it)];

const SOCKET: &str = "/run/qm-hotplug/io.qmhotplug";

#[track_caller]
fn call(vm: &Vm, method: &str, parameters: Value) -> Value {
    let text = vm.ok(&format!("varlinkctl call --json=short {SOCKET} io.qmhotplug.{method} '{parameters}'"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{method}: {error}: {text}"))
}

fn systemds_client_talks_to_it(vm: &Vm) {
    let installed = Installed::new(vm);
    vm.ok("systemctl start qm-hotplug");
    let container = Container::run(vm, "crun", "spoken", ASKS_FOR_STICKS);
    let name = &container.name;

    // It reads the description, and shows it again in its own words.
    let shown = vm.ok(&format!("varlinkctl introspect {SOCKET} io.qmhotplug"));
    for line in ["interface io.qmhotplug", "method Attach(", "method Monitor(", "type Grant(", "error Refused("] {
        assert!(shown.contains(line), "{line} is missing in {shown}");
    }
    vm.ok("varlinkctl validate-idl /mnt/repo/src/core/io.qmhotplug.varlink");
    let info = vm.ok(&format!("varlinkctl info --json=short {SOCKET}"));
    assert!(info.contains("io.qmhotplug") && info.contains("org.varlink.service"), "{info}");
    assert_eq!(vm.ok(&format!("varlinkctl list-interfaces {SOCKET}")), "io.qmhotplug\norg.varlink.service");

    let events = "/run/lab-varlink-events";
    vm.ok(&format!(
        "systemd-run --quiet --collect --unit=lab-varlink -p StandardOutput=file:{events} \
         varlinkctl call --more --json=short {SOCKET} io.qmhotplug.Monitor '{{}}'"
    ));
    vm.wait_ok("the stream to begin", SOON, &format!("grep -q ready {events}"));
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    container.wait_for("/dev/ttyUSB0");
    vm.wait_ok("the event", SOON, &format!("grep granted {events} | grep -q {name}"));
    vm.ok(&format!("systemctl stop lab-varlink; rm {events}"));

    assert_eq!(call(vm, "List", json!({}))["grants"][0]["path"], "/dev/ttyUSB0");
    assert_eq!(call(vm, "Containers", json!({}))["containers"][0]["has"], json!(["/dev/ttyUSB0"]));
    let sticks = json!({ "selector": "ttyUSB" });
    assert_eq!(call(vm, "Devices", sticks)["devices"][0]["serial"], "LAB1");
    // What asks joins cgroup and mount namespace of the container as its user, from within the unit.
    let asked = json!({ "container": name, "device": "/dev/ttyUSB0" });
    let explained = &call(vm, "Explain", asked.clone())["explanation"];
    assert_eq!(explained["accessible"], true, "{explained}");
    let proof = &call(vm, "Verify", json!({ "container": name, "open": true }))["proofs"][0];
    assert_eq!((&proof["accessible"], &proof["opened"]), (&json!(true), &json!(true)), "{proof}");
    let attach = json!({ "container": name, "device": "/dev/tty9", "access": "rw" });
    assert_eq!(call(vm, "Attach", attach)["grant"]["access"], "rw");
    assert_eq!(container.node("/dev/tty9").split(' ').nth(3), Some("4:9"));
    call(vm, "Detach", json!({ "container": name, "device": "/dev/tty9" }));
    call(vm, "Reload", json!({}));
    let refused = vm.sh(&format!("varlinkctl call {SOCKET} io.qmhotplug.List '{{\"container\":\"nobody\"}}' 2>&1"));
    assert!(!refused.success() && refused.stdout.contains("io.qmhotplug.NoSuchContainer"), "{}", refused.stdout);

    // Who calls while it is started anew waits.
    vm.ok("systemctl kill --signal=KILL qm-hotplug");
    assert_eq!(call(vm, "Status", json!({}))["grants"], 1);
    vm.ok("systemctl restart --no-block qm-hotplug");
    assert_eq!(call(vm, "Status", json!({}))["grants"], 1);
    vm.wait_ok("the agent to be back", SOON, "systemctl is-active --quiet qm-hotplug");
    // Others by the group.
    let as_user = format!("runuser -u lab-reader -- varlinkctl call {SOCKET} io.qmhotplug.Status '{{}}' 2>&1");
    vm.ok("useradd --create-home lab-reader");
    assert!(!vm.sh(&as_user).success(), "not in the group");
    vm.ok("usermod --append --groups qm-hotplug lab-reader");
    vm.ok(&as_user);
    let denied = vm.sh(&as_user.replace("Status", "Reload"));
    assert!(
        denied.stdout.contains("Permission denied") || denied.stdout.contains("PermissionDenied"),
        "{}",
        denied.stdout
    );
    vm.ok("userdel --remove lab-reader 2>/dev/null");

    // Root's own commands do not start it again, and whoever calls does.
    vm.ok("systemctl stop qm-hotplug");
    assert!(!vm.ok("qm-hotplug status --json; qm-hotplug doctor; qm-hotplug list; true").contains("\"agent\":true"));
    assert_eq!(vm.sh("systemctl is-active qm-hotplug.service qm-hotplug.socket").stdout.trim(), "inactive\nactive");
    assert_eq!(call(vm, "Status", json!({}))["agent"], true);
    stick.unplug();
    drop(container);
    who_calls_on_an_unfit_host_is_hung_up_on(vm);
    drop(installed);
}

/// And has it started once, not for ever.
#[track_caller]
fn who_calls_on_an_unfit_host_is_hung_up_on(vm: &Vm) {
    let directory = "/run/systemd/system/qm-hotplug.service.d";
    vm.ok("systemctl stop qm-hotplug");
    vm.ok(&format!(
        "mkdir -p {directory} && printf '[Service]\\nCapabilityBoundingSet=\\nCapabilityBoundingSet=CAP_MKNOD\\n' \
         >{directory}/unfit.conf && systemctl daemon-reload"
    ));
    let cursor = vm.ok("journalctl --sync; journalctl -n 0 --show-cursor");
    let cursor = cursor.rsplit("cursor: ").next().unwrap_or_default().trim();
    let called = vm.sh(&format!("timeout 60 varlinkctl call {SOCKET} io.qmhotplug.Status '{{}}'"));
    assert!(!called.success() && called.status != 124, "{} {}", called.status, called.stdout);
    vm.wait_ok("the service to have failed", SOON, "systemctl is-failed --quiet qm-hotplug.service");
    vm.ok("sleep 3");
    let journal = format!("journalctl --sync; journalctl -o cat -u qm-hotplug.service --after-cursor='{cursor}'");
    let journal = vm.ok(&journal);
    assert_eq!(journal.matches("Starting").count(), 1, "{journal}");
    assert!(journal.contains("CAP_SYS_ADMIN"), "it says what is missing: {journal}");
    assert_eq!(vm.ok("systemctl is-active qm-hotplug.socket"), "active");
    vm.ok(&format!("rm -r {directory} && systemctl daemon-reload && systemctl reset-failed qm-hotplug.service"));
    assert_eq!(call(vm, "Status", json!({}))["agent"], true, "fit again, the next caller has it started");
}
