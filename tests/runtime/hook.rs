//! The hook as it is installed: when it runs, under which names, and what it writes down.

use std::path::Path;

use crate::Case;
use crate::agent::assert_has_no_ttys;
use crate::attach::REFUSED;
use crate::plug::console;
use crate::support::podman::{Container, place};
use crate::support::{Agent, BINARY, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("hook::one_run_a_container_and_its_log", one_run_a_container_and_its_log),
    ("hook::under_the_names_of_containers_qm", under_the_names_of_containers_qm),
    ("hook::what_asks_for_nothing_is_said_and_starts", what_asks_for_nothing_is_said_and_starts),
    ("hook::test_variables_do_nothing", test_variables_do_nothing),
    ("hook::what_others_have_alone_is_not_guessed", what_others_have_alone_is_not_guessed),
];

const MANAGER_LOG: &str = "/var/log/qm-device-manager.log";
const CLIENT_LOG: &str = "/var/log/qm-wayland-client-devices.log";

/// Starts a container with these files in its hooks directory.
fn start(runtime: &str, name: &str, hooks: &[(&str, String)], options: &[&str]) -> Container {
    let directory = place().join("hooks");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    for (file, text) in hooks {
        std::fs::write(directory.join(file), text).unwrap();
    }
    Container::start_under(&["--hooks-dir", directory.to_str().unwrap()], runtime, name, options, &["sleep", "1000"])
}

/// The hook as `scripts/install.sh` installs it, but for the program's place.
fn installed() -> (&'static str, String) {
    let text = std::fs::read_to_string("hooks/qm-hotplug.json").unwrap();
    assert!(text.contains("\"/usr/bin/qm-hotplug\""), "{text}");
    ("qm-hotplug.json", text.replace("\"/usr/bin/qm-hotplug\"", &format!("\"{BINARY}\"")))
}

fn lines(log: &str, container: &str) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .filter(|line| line.contains(&format!(" container {container} (")))
        .map(|line| line[20..].to_owned())
        .collect()
}

fn one_run_a_container_and_its_log(runtime: &str) {
    let options = [
        "--annotation=org.containers.qm.device.ttys=true",
        "--annotation=org.containers.qm.device.dvb=yes",
        "--annotation=org.containers.qm.device.tape=1",
        "--annotation=org.containers.qm.wayland.seat=seat9",
        "--annotation=org.containers.qm.wayland-client.gpu=TRUE",
    ];
    let name = format!("qmh-many-{runtime}");
    let c = start(runtime, &name, &[installed()], &options);
    assert!(c.opens("<>", "/dev/tty3"));
    let mut logged = lines(MANAGER_LOG, &name);
    logged.iter_mut().for_each(|line| *line = line.split(" (").next().unwrap().to_owned());
    logged.sort();
    assert_eq!(
        logged,
        [
            format!("- qm-device-manager - INFO - Added 0 Wayland seat devices for seat9 to container {name}"),
            format!("- qm-device-manager - INFO - Added 0 dvb devices to container {name}"),
            format!("- qm-device-manager - INFO - Added 8 ttys devices to container {name}"),
            format!("- qm-device-manager - INFO - Processing QM device annotations of container {name}"),
        ]
    );
    assert_eq!(lines(CLIENT_LOG, &name).len(), 2, "one run there too");
    // No annotation of ours, no run.
    let plain = format!("qmh-plain-{runtime}");
    let before = std::fs::read_to_string(MANAGER_LOG).unwrap();
    assert_has_no_ttys(&start(runtime, &plain, &[installed()], &["--annotation=org.containers.qmx=true"]));
    assert_eq!(std::fs::read_to_string(MANAGER_LOG).unwrap(), before);
}

fn under_the_names_of_containers_qm(runtime: &str) {
    let mut hooks = vec![installed()];
    for (program, file, key) in [
        ("oci-qm-device-manager", "device.json", "device"),
        ("oci-qm-device-manager", "seat.json", "wayland\\\\.seat"),
        ("oci-qm-wayland-client-devices", "client.json", "wayland-client"),
    ] {
        let link = place().join(program);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(BINARY, &link).unwrap();
        let text = format!(
            r#"{{"version":"1.0.0","hook":{{"path":"{}"}},"when":{{"annotations":{{"^org\\.containers\\.qm\\.{key}":"^.*$"}}}},"stages":["precreate"]}}"#,
            link.display(),
        );
        hooks.push((file, text));
    }
    let options =
        ["--annotation=org.containers.qm.device.ttys=true", "--annotation=org.containers.qm.wayland.seat=seat9"];
    let only_theirs = format!("qmh-theirs-{runtime}");
    let c = start(runtime, &only_theirs, &hooks[1..], &options);
    assert!(c.opens("<>", "/dev/tty3"));
    let with_ours = format!("qmh-both-{runtime}");
    let both = start(runtime, &with_ours, &hooks, &options);
    assert!(both.opens("<>", "/dev/tty3"));
    for c in [&c, &both] {
        assert_eq!(c.sh("cd /dev && ls -d tty[0-9]*").ok().split_whitespace().count(), 8, "nothing is double");
        c.past_the_filter("mknod /dev/byhand c 4 9").ok();
        assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into), "and no device more");
    }
    let runs = |name: &str| lines(MANAGER_LOG, name).iter().filter(|line| line.contains("Processing")).count();
    assert_eq!((runs(&only_theirs), runs(&with_ours)), (2, 3), "containers/qm's configuration runs it twice");
}

fn what_asks_for_nothing_is_said_and_starts(runtime: &str) {
    let name = format!("qmh-bad-{runtime}");
    let options = [
        "--annotation=org.containers.qm.device.ttys=on",
        "--annotation=org.containers.qm.device.usb=true",
        "--annotation=org.containers.qm.wayland.seat=--host=evil",
    ];
    let c = start(runtime, &name, &[installed()], &options);
    assert_has_no_ttys(&c);
    let log = std::fs::read_to_string(MANAGER_LOG).unwrap();
    for expected in [
        "Skipping annotation org.containers.qm.device.ttys: 'on' is none of true, 1 and yes",
        "Skipping annotation org.containers.qm.device.usb: a file in /etc/qm-hotplug/config.d has to enable it",
        "Skipping annotation org.containers.qm.wayland.seat: '--host=evil' is no name of a seat",
    ] {
        assert!(log.contains(expected), "{expected} is missing in\n{log}");
    }
}

/// What the mock for test rigs obeys is nothing to the hook itself.
fn test_variables_do_nothing(runtime: &str) {
    let log = place().join("test.log");
    let mock = format!("{{\"TEST_LOGFILE\":{:?},\"TEST_MOCK_TTYS_DEVICES\":\"/dev/tty9\"}}", log.display().to_string());
    let variables: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&mock).unwrap();
    let env: Vec<String> =
        variables.iter().map(|(name, value)| format!("{name}={}", value.as_str().unwrap())).collect();
    let mut hook: serde_json::Value = serde_json::from_str(&installed().1).unwrap();
    hook["hook"]["env"] = serde_json::json!(env);
    let options = ["--annotation=org.containers.qm.device.ttys=true"];
    let c = start(runtime, &format!("qmh-env-{runtime}"), &[("hook.json", hook.to_string())], &options);
    assert_eq!(c.sh("cd /dev && ls -d tty[0-9]*").ok().split_whitespace().count(), 8);
    assert!(c.node("/dev/tty9").is_none() && !Path::new(&log).exists());
}

/// A ledger that the hook cannot read, as where SELinux keeps it from it.
fn what_others_have_alone_is_not_guessed(runtime: &str) {
    let (device, shared) = (console(52), console(53));
    let ledger = Path::new("/run/qm-hotplug/ledger");
    let _ = std::fs::remove_dir(ledger);
    std::fs::create_dir_all(ledger.parent().unwrap()).unwrap();
    std::fs::write(ledger, "").unwrap();
    let name = format!("qmh-unknown-{runtime}");
    let options = [
        "--annotation=org.containers.qm.hotplug.alone=devname=vcsa52;exclusive",
        "--annotation=org.containers.qm.hotplug.shared=devname=vcsa53",
    ];
    let c = start(runtime, &name, &[installed()], &options);
    std::fs::remove_file(ledger).unwrap();
    assert!(c.opens("<>", &shared.path), "what is shared needs no ledger");
    assert_eq!(c.node(&device.path), None);
    // Nor of one page in it.
    std::fs::create_dir(ledger).unwrap();
    std::fs::write(ledger.join("c-other.json"), "no page").unwrap();
    let of_page = start(runtime, &format!("qmh-no-page-{runtime}"), &[installed()], &options);
    std::fs::remove_file(ledger.join("c-other.json")).unwrap();
    assert!(of_page.opens("<>", &shared.path) && of_page.node(&device.path).is_none());
    drop(of_page);
    let logged = std::fs::read_to_string(MANAGER_LOG).unwrap();
    assert!(logged.contains("which devices other containers have alone is not known"), "{logged}");
    // The agent knows.
    let _agent = Agent::start();
    wait_for("the agent's grant", || c.node(&device.path).is_some());
}
