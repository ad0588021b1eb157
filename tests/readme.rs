//! README.md, word for word where it can be: each of its commands is run here, or named as one of another tier. With
//! the demo and the installation. Needs root and podman.

#[path = "readme/completion.rs"]
mod completion;
#[path = "readme/install.rs"]
mod install;
#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{CommandFactory, Parser};
use libtest_mimic::{Arguments, Trial};
use qm_hotplug::cli::Cli;
use qm_hotplug::core::annotation::DEVICE_PREFIX;
use qm_hotplug::core::category::Categories;
use qm_hotplug::core::settings::Settings;
use qm_hotplug::sys::caps::NEEDED;
use support::podman::Container;
use support::{Agent, BINARY, Said, assert_nothing_left, run, wait_for};

const README: &str = include_str!("../README.md");

/// Where a command of the README is run.
enum At {
    /// By a test below.
    Here,
    /// It is what runs this.
    TestScript,
    /// By this file of the lab, where systemd is.
    Lab(&'static str),
}

const COMMANDS: [(&str, At); 30] = [
    ("sudo scripts/demo.sh", At::Here),
    ("sudo scripts/test.sh", At::TestScript),
    ("sudo scripts/install.sh", At::Here),
    ("sudo systemctl enable --now qm-hotplug", At::Lab("systemctl enable --now ")),
    ("sudo scripts/install.sh --uninstall", At::Here),
    ("sudo qm-hotplug doctor", At::Here),
    ("sudo podman run -d --name app --annotation org.containers.qm.device.ttyUSB=true IMAGE", At::Here),
    (
        "sudo podman run -d --name zigbee --annotation 'org.containers.qm.hotplug.stick=tty;usb=10c4:ea60;serial=A1B2;as=/dev/zigbee' IMAGE",
        At::Here,
    ),
    ("sudo qm-hotplug devices", At::Here),
    ("sudo qm-hotplug devices usb=10c4:ea60", At::Here),
    ("sudo qm-hotplug devices --annotation /dev/ttyUSB0", At::Here),
    ("sudo qm-hotplug attach app usb=10c4:ea60 --wait 10s", At::Here),
    ("sudo qm-hotplug ps", At::Here),
    ("sudo qm-hotplug attach app /dev/video1", At::Here),
    ("sudo qm-hotplug attach app /dev/ttyUSB0 /dev/zigbee --access rw --mode 0660", At::Here),
    ("sudo qm-hotplug list app", At::Here),
    ("sudo qm-hotplug verify app", At::Here),
    ("sudo qm-hotplug explain app /dev/video2", At::Here),
    ("sudo qm-hotplug detach app /dev/zigbee", At::Here),
    ("sudo qm-hotplug status", At::Here),
    ("sudo systemctl daemon-reload", At::Lab("sudo systemctl daemon-reload && ")),
    ("sudo systemctl start home-assistant", At::Lab("sudo systemctl start home-assistant ")),
    ("sudo docker compose up -d", At::Lab("docker compose up -d")),
    ("sudo mkdir -p /etc/qm-hotplug/config.d", At::Lab("mkdir -p /etc/qm-hotplug/config.d")),
    ("sudo qm-hotplug reload", At::Lab("qm-hotplug reload")),
    ("sudo usermod --append --groups qm-hotplug alice", At::Lab("usermod --append --groups qm-hotplug ")),
    ("varlinkctl introspect /run/qm-hotplug/io.qmhotplug io.qmhotplug", At::Lab("varlinkctl introspect ")),
    (
        "varlinkctl call /run/qm-hotplug/io.qmhotplug io.qmhotplug.List '{\"container\":\"app\"}'",
        At::Lab("varlinkctl call "),
    ),
    ("sudo ln -sf /usr/bin/qm-hotplug /usr/libexec/oci/hooks.d/oci-qm-device-manager", At::Here),
    ("sudo ln -sf /usr/bin/qm-hotplug /usr/libexec/oci/hooks.d/oci-qm-wayland-client-devices", At::Here),
];

/// Devices that every machine has, in place of those in the README.
const STAND_INS: [(&str, &str); 4] = [
    ("/dev/video1", "/dev/tty21"),
    ("/dev/ttyUSB0", "/dev/tty22"),
    ("/dev/video2", "/dev/tty23"),
    ("usb=10c4:ea60", "devname=tty23"),
];

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    support::enter();
    let trial = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let conclusion = libtest_mimic::run(
        &arguments,
        vec![
            trial("every_command_is_run_somewhere", every_command_is_run_somewhere),
            trial("tables_are_complete", tables_are_complete),
            trial("usage_works_as_written", usage_works_as_written),
            trial("demo_shows_the_main_job_and_leaves_nothing", demo_shows_the_main_job_and_leaves_nothing),
            trial("interrupted_demo_leaves_nothing", interrupted_demo_leaves_nothing),
            trial("demo_ends_before_it_begins_where_it_cannot_work", demo_ends_before_it_begins_where_it_cannot_work),
            trial("installed_files_carry_their_prefix", install::installed_files_carry_their_prefix),
            trial("installed_hook_opens_devices_at_start", install::installed_hook_opens_devices_at_start),
            trial("links_act_as_the_hooks_of_containers_qm", links_act_as_the_hooks_of_containers_qm),
            trial("shells_complete_what_is_there", completion::shells_complete_what_is_there),
            trial("completion_is_silent_and_changes_nothing", completion::completion_is_silent_and_changes_nothing),
            trial("the_configuration_is_valid", the_configuration_is_valid),
            trial("the_recipes_are_those_that_the_lab_starts", the_recipes_are_those_that_the_lab_starts),
            trial("uninstall_takes_everything_out", install::uninstall_takes_everything_out),
            trial("scripts_say_what_they_need", scripts_say_what_they_need),
        ],
    );
    support::podman::clean_up();
    conclusion.exit();
}

/// The lines of the README's shell blocks.
fn commands() -> Vec<&'static str> {
    lines_of("```sh")
}

/// The lines of the blocks that begin so.
fn lines_of(beginning: &str) -> Vec<&'static str> {
    let mut is_inside = false;
    README
        .lines()
        .filter(|line| match *line {
            line if line == beginning => {
                is_inside = true;
                false
            }
            "```" => {
                is_inside = false;
                false
            }
            _ => is_inside,
        })
        .collect()
}

fn every_command_is_run_somewhere() {
    let written: BTreeSet<_> = commands().into_iter().collect();
    let known: BTreeSet<_> = COMMANDS.iter().map(|(line, _)| *line).collect();
    assert_eq!(written, known);
    for line in written.iter().filter_map(|line| line.strip_prefix("sudo qm-hotplug ")) {
        Cli::try_parse_from(["qm-hotplug"].into_iter().chain(line.split(' '))).unwrap();
    }
    let lab: String = std::fs::read_dir("tests/lab")
        .unwrap()
        .map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap_or_default())
        .collect();
    for (line, at) in &COMMANDS {
        if let At::Lab(text) = at {
            assert!(lab.contains(text), "no lab test runs: {line}");
        }
    }
}

fn tables_are_complete() {
    for command in Cli::command().get_subcommands().map(|command| command.get_name().to_owned()) {
        let row = |end: &str| README.contains(&format!("\n| `{command}{end}"));
        assert!(row("` |") || row(" "), "no row for {command}");
    }
    for category in Categories::default().iter() {
        assert!(README.contains(&format!("\n| `{DEVICE_PREFIX}{}` |", category.name)), "no row for {}", category.name);
    }
    let unit = std::fs::read_to_string("units/qm-hotplug.service").unwrap();
    let mut bounds: BTreeSet<String> = BTreeSet::new();
    for line in unit.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet=")) {
        bounds.extend(line.split(' ').map(str::to_owned));
    }
    // SO_RCVBUFFORCE, which the agent can do without.
    let mut needed: BTreeSet<String> = ["CAP_NET_ADMIN".to_owned()].into();
    for (capability, why) in NEEDED {
        assert!(
            README.replace('`', "").contains(&format!("\n| {capability} | {why} |")),
            "no row for {capability}: {why}"
        );
        needed.insert(capability.to_string());
    }
    assert_eq!(bounds, needed);
}

/// Runs a command of the README, with the binary under test and devices that are there.
fn as_written(line: &str) -> Said {
    assert!(commands().contains(&line), "{line} is not in the README");
    let words = line.strip_prefix("sudo qm-hotplug ").unwrap().split(' ');
    let stand_in = |word| STAND_INS.iter().find(|(from, _)| *from == word).map_or(word, |(_, to)| *to);
    run(BINARY, &words.map(stand_in).collect::<Vec<_>>())
}

fn usage_works_as_written() {
    let line = commands().into_iter().find(|line| line.starts_with("sudo podman run ")).unwrap();
    let options: Vec<&str> = line.strip_prefix("sudo podman run -d --name app ").unwrap().split(' ').collect();
    let (image, options) = options.split_last().unwrap();
    assert_eq!(*image, "IMAGE");

    let agent = Agent::start();
    let app = Container::start("runc", "app", options);
    wait_for("the agent to find the container", || as_written("sudo qm-hotplug ps").ok().contains("ttyUSB"));
    let zigbee = commands().into_iter().find(|line| line.contains("--name zigbee")).unwrap();
    let zigbee = zigbee.split("--annotation '").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
    let key = zigbee.split_once('=').unwrap();
    let (rules, ignored) = qm_hotplug::core::annotation::rules([key], &Categories::default());
    assert_eq!((rules.len(), ignored.len()), (1, 0), "{ignored:?}");
    let second = Container::start("crun", "zigbee", &["--annotation", zigbee]);
    wait_for("the agent to find it", || as_written("sudo qm-hotplug ps").ok().contains("stick"));
    drop(second);
    assert!(as_written("sudo qm-hotplug devices").ok().contains("/dev/tty23"));
    let listed = as_written("sudo qm-hotplug devices usb=10c4:ea60").ok();
    assert!(listed.contains("/dev/tty23") && !listed.contains("/dev/tty24"), "{listed}");
    let annotation = as_written("sudo qm-hotplug devices --annotation /dev/ttyUSB0").ok();
    assert_eq!(annotation.trim(), "org.containers.qm.hotplug.tty22=subsystem=tty;devname=/dev/tty22");
    as_written("sudo qm-hotplug attach app usb=10c4:ea60 --wait 10s").ok();
    assert!(app.opens("<>", "/dev/tty23"));
    run(BINARY, &["detach", "app", "/dev/tty23"]).ok();
    as_written("sudo qm-hotplug attach app /dev/video1").ok();
    assert!(app.opens("<>", "/dev/tty21"));
    as_written("sudo qm-hotplug attach app /dev/ttyUSB0 /dev/zigbee --access rw --mode 0660").ok();
    assert!(app.opens("<>", "/dev/zigbee"));
    assert_eq!(app.sh("stat -c %a /dev/zigbee").ok().trim(), "660");
    let listed = as_written("sudo qm-hotplug list app").ok();
    assert!(listed.contains("/dev/tty21") && listed.contains("/dev/zigbee"), "{listed}");
    let verified = as_written("sudo qm-hotplug verify app").ok();
    assert!(verified.contains("/dev/tty21 is accessible (rw)") && verified.contains("/dev/zigbee is"), "{verified}");
    let explained = as_written("sudo qm-hotplug explain app /dev/video2").ok();
    for line in ["device  /dev/tty23 is c 4:23 on the host", "grant   none", "node    /dev/tty23 is missing inside"] {
        assert!(explained.lines().any(|its| its == line), "{line} in {explained}");
    }
    assert!(explained.contains("\n→ qm-hotplug attach app /dev/tty23"), "{explained}");
    as_written("sudo qm-hotplug detach app /dev/zigbee").ok();
    assert!(app.sh("test -e /dev/zigbee").code != 0);
    let looked = as_written("sudo qm-hotplug doctor").ok();
    assert!(looked.contains("agent       ok       runs, version"), "{looked}");
    let status = as_written("sudo qm-hotplug status").ok();
    assert!(status.contains("running") && status.contains("grants:     1"), "{status}");
    agent.stop();
    support::release();
    assert_nothing_left();
}

/// The demo with the binary under test. It must not wait for the lock, which is ours.
fn demo() -> Command {
    let mut command = Command::new("bash");
    command.args(["scripts/demo.sh", "--binary", BINARY]).env("QM_HOTPLUG_TESTS_LOCKED", "yes").stdin(Stdio::null());
    command
}

fn links_act_as_the_hooks_of_containers_qm() {
    let directory = tempfile::tempdir().unwrap();
    let hooks = directory.path().to_str().unwrap();
    for line in commands().into_iter().filter_map(|line| line.strip_prefix("sudo ln ")) {
        let line = line.replace("/usr/bin/qm-hotplug", BINARY).replace("/usr/libexec/oci/hooks.d", hooks);
        run("ln", &line.split(' ').collect::<Vec<_>>()).ok();
    }
    let spec = r#"{"annotations":{"org.containers.qm.device.ttys":"true"},"linux":{}}"#;
    for (program, log, is_asked) in [
        ("oci-qm-device-manager", "qm-device-manager", true),
        ("oci-qm-wayland-client-devices", "qm-wayland-client-devices", false),
    ] {
        let mut hook = Command::new(format!("{hooks}/{program}"));
        let mut hook = hook.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        hook.stdin.take().unwrap().write_all(spec.as_bytes()).unwrap();
        let said: Said = hook.wait_with_output().unwrap().into();
        let spec: serde_json::Value = serde_json::from_str(&said.ok()).unwrap();
        assert_eq!(spec["linux"]["devices"].as_array().is_some_and(|all| all.len() == 8), is_asked, "{program}");
        let log = std::fs::read_to_string(format!("/var/log/{log}.log")).unwrap();
        assert_eq!(log.contains("Added 8 ttys devices"), is_asked, "{log}");
        assert!(log.contains("hook completed successfully"), "{log}");
    }
}

fn the_configuration_is_valid() {
    let blocks = README.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap().to_owned());
    let files: Vec<_> = blocks.enumerate().map(|(at, text)| (format!("{at}.toml"), Ok(text))).collect();
    assert!(files.len() >= 2);
    let (settings, problems) = Settings::read(&files);
    assert_eq!(problems, [""; 0]);
    assert!(settings.categories.named("usb").unwrap().enabled && settings.categories.named("robot").is_some());
    assert!(settings.policies.required.is_some() && settings.has_rules());
}

fn the_recipes_are_those_that_the_lab_starts() {
    let files = std::fs::read_dir("tests/fixtures/recipes").unwrap().map(|file| file.unwrap().path());
    let texts: Vec<String> = files.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let (_, section) = README.split_once("\n### Recipes\n").unwrap();
    let section = section.split("\n### ").next().unwrap();
    let blocks = section.split("```").skip(1).step_by(2).filter(|block| !block.starts_with("sh\n"));
    let shown: BTreeSet<&str> = blocks.map(|block| block.split_once('\n').unwrap().1).collect();
    assert_eq!(shown, texts.iter().map(String::as_str).collect());
}

fn demo_shows_the_main_job_and_leaves_nothing() {
    let before = Leftovers::now();
    let said: Said = demo().output().unwrap().into();
    let shown = said.ok();
    for part in [
        "PLUGGED IN",
        "demo opens it",
        "is refused: Operation not permitted",
        "UNPLUGGED",
        "event received → gone in",
        "nothing is left",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert!(
        shown.contains("event received → openable in") || shown.contains("openable; the whole command took"),
        "{shown}"
    );
    assert_nothing_left();
    assert_eq!(Leftovers::now(), before);
}

fn demo_ends_before_it_begins_where_it_cannot_work() {
    let before = Leftovers::now();
    support::configure("enable = 3\n");
    let said: Said = demo().output().unwrap().into();
    support::unconfigure();
    assert_eq!((said.code, &*said.stdout), (1, ""), "{said:?}");
    let place = format!("{}:1:10: ", support::CONFIGURATION);
    assert!(said.stderr.contains("config      problem") && said.stderr.contains(&place), "{said:?}");
    assert_eq!(Leftovers::now(), before);
}

fn interrupted_demo_leaves_nothing() {
    let before = Leftovers::now();
    for milliseconds in [20, 150, 350, 500, 700] {
        // A group of its own, which gets the signal whole, as from a terminal.
        let mut child = demo().stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        let group = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        rustix::process::kill_process_group(group, rustix::process::Signal::INT).unwrap();
        child.wait().unwrap();
        assert_nothing_left();
        assert_eq!(Leftovers::now(), before, "interrupted after {milliseconds} ms");
    }
}

/// What a careless demo would leave.
#[derive(Debug, PartialEq)]
struct Leftovers {
    files: Vec<String>,
    processes: Vec<String>,
    mounts: usize,
}

impl Leftovers {
    fn now() -> Leftovers {
        let mut files = Vec::new();
        for directory in [
            "/tmp",
            "/run",
            "/run/runc",
            "/run/qm-hotplug",
            "/dev",
            "/dev/shm",
            "/sys/fs/cgroup",
            "/sys/fs/cgroup/libpod_parent",
        ] {
            for file in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                files.push(file.path().display().to_string());
            }
        }
        // Others work in /tmp too.
        files.retain(|file| !file.starts_with("/tmp/") || file.starts_with("/tmp/qm-hotplug-demo"));
        files.sort();
        let mut processes = Vec::new();
        for process in procfs::process::all_processes().unwrap().flatten() {
            let line = process.cmdline().unwrap_or_default().join(" ");
            if line.contains("qm-hotplug-demo") || line.ends_with("qm-hotplug agent") || line == "sleep 600" {
                processes.push(line);
            }
        }
        Leftovers { files, processes, mounts: std::fs::read_to_string("/proc/mounts").unwrap().lines().count() }
    }
}

fn scripts_say_what_they_need() {
    for script in ["scripts/demo.sh", "scripts/test.sh", "scripts/install.sh", "scripts/bench.sh"] {
        let said = run("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups", "bash", script]);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.stderr.contains("needs root: ") && said.stderr.lines().count() == 1, "{said:?}");
    }
    assert!(std::fs::read_to_string(".ci/run").unwrap().contains("scripts/test.sh"));
}
