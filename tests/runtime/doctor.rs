//! `doctor`: what it says of this host as it is, of one where something is wrong, and that it leaves nothing.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use qm_hotplug::core::filter_program;
use qm_hotplug::sys::bpf::{Map, Program};
use qm_hotplug::sys::cgroup::CgroupRoot;
use serde_json::Value;

use crate::plug::block;
use crate::state::observe;
use crate::support::podman::Container;
use crate::support::{Agent, BINARY, CONFIGURATION, Said, configure, qm, unconfigure, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("doctor::a_foreign_program_after_ours_is_named", a_foreign_program_after_ours_is_named),
    ("doctor::containers_that_cannot_be_served_are_named", containers_that_cannot_be_served_are_named),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("doctor::this_host_is_fit_and_stays_as_it_was", this_host_is_fit_and_stays_as_it_was),
    ("doctor::a_hook_that_leads_elsewhere_is_told", a_hook_that_leads_elsewhere_is_told),
    ("doctor::a_wrong_configuration_is_a_problem", a_wrong_configuration_is_a_problem),
    ("doctor::without_root_nothing_is_guessed", without_root_nothing_is_guessed),
    ("doctor::container_hotplug_is_found", container_hotplug_is_found),
    ("doctor::the_unit_is_looked_for", the_unit_is_looked_for),
];

const TOPICS: [&str; 11] =
    ["rights", "kernel", "cgroup", "filter", "udev", "hook", "agent", "config", "engines", "containers", "security"];

/// The lines of a run, whose exit code has to fit them.
#[track_caller]
fn checks(said: &Said) -> Vec<Value> {
    let checks: Vec<Value> = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    for check in &checks {
        let mut fields: Vec<&String> = check.as_object().unwrap().keys().collect();
        fields.sort();
        assert_eq!(fields, ["finding", "remedy", "state", "topic"]);
        assert!(["ok", "warning", "problem"].iter().any(|state| check["state"] == *state), "{check}");
        assert_eq!(check["remedy"].is_null(), check["state"] == "ok", "{check}");
    }
    let has_problem = checks.iter().any(|check| check["state"] == "problem");
    assert_eq!((said.code, said.stderr.is_empty()), (i32::from(has_problem), !has_problem), "{said:?}");
    checks
}

/// Asserts that `doctor` has a line of that topic and state, with this in the finding; says what to do.
#[track_caller]
fn tells(topic: &str, state: &str, finding: &str) -> String {
    let checks = checks(&qm(&["doctor", "--json"]));
    let is_it = |check: &&Value| {
        check["topic"] == topic && check["state"] == state && check["finding"].as_str().unwrap().contains(finding)
    };
    let found = checks.iter().find(is_it).unwrap_or_else(|| panic!("{topic} {state} {finding:?} in {checks:#?}"));
    found["remedy"].as_str().unwrap_or_default().to_owned()
}

/// Names of the programs and maps of ours that the kernel has, attached or not.
#[allow(unsafe_code)]
fn loaded() -> Vec<String> {
    const PROG_GET_NEXT_ID: i32 = 11;
    const MAP_GET_NEXT_ID: i32 = 12;
    let ids = |command: i32| {
        let mut last = 0;
        std::iter::from_fn(move || {
            let mut attr = [0u32; 48];
            attr[0] = last;
            // SAFETY: the attribute is as long as we say, and has no pointers.
            let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(&attr)) };
            last = attr[1];
            (result == 0).then_some(last)
        })
    };
    let programs = ids(PROG_GET_NEXT_ID).filter_map(|id| Some(Program::by_id(id).ok()?.info().ok()?.name));
    let maps = ids(MAP_GET_NEXT_ID).filter_map(|id| Some(Map::by_id(id).ok()?.1));
    programs.chain(maps).filter(|name| name.starts_with("qmh")).collect()
}

fn this_host_is_fit_and_stays_as_it_was() {
    wait_for("what was loaded before to go", || loaded().is_empty());
    let before = observe(&[]);
    let said = qm(&["doctor", "--json"]);
    let found = checks(&said);
    assert_eq!(observe(&[]), before);
    // The kernel frees a program a moment after its last holder has gone.
    wait_for("what was loaded to try to go", || loaded().is_empty());
    let topics: Vec<&str> = found.iter().map(|check| check["topic"].as_str().unwrap()).collect();
    assert!(TOPICS.iter().all(|topic| topics.contains(topic)), "{topics:?}");
    for (topic, finding) in [
        ("rights", "root, with all capabilities"),
        ("kernel", "takes the device filter"),
        ("filter", "not loaded, since nothing is granted"),
        ("config", "valid"),
        ("engines", "podman"),
    ] {
        tells(topic, "ok", finding);
    }
    tells("agent", "warning", "does not run");
    let text = qm(&["doctor"]).stdout;
    assert!(text.starts_with("CHECK       STATE    FINDING\nrights      ok       root, with"), "{text}");
    let words = |line: &&str| line.split_whitespace().count() > 3;
    assert!(text.lines().filter(words).all(|line| line.chars().count() <= 80), "{text}");
    let agent = Agent::start();
    tells("agent", "ok", "runs, version");
    agent.stop();
}

/// A program at the cgroup root that lets all pass; it goes when dropped.
struct Foreign(Program);

impl Foreign {
    fn attach(name: &str) -> Foreign {
        let program = Program::load(name, &filter_program::allow()).unwrap();
        program.attach(CgroupRoot::find().unwrap().as_fd()).unwrap();
        Foreign(program)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.0.detach(CgroupRoot::find().unwrap().as_fd()).unwrap();
    }
}

fn a_foreign_program_after_ours_is_named(runtime: &str) {
    let c = Container::start(runtime, "qmh-doctor", &[]);
    let device = block(55);
    qm(&["attach", &c.name, &device.path]).ok();
    tells("filter", "ok", "runs last at the cgroup root");
    assert!(!loaded().is_empty(), "what is in force is seen");
    let foreign = Foreign::attach("guard");
    let before = observe(&[c.pid()]);
    let remedy = tells("filter", "warning", "guard at the cgroup root runs after ours");
    assert!(remedy.contains("bpftool cgroup list /sys/fs/cgroup"), "{remedy}");
    assert_eq!(observe(&[c.pid()]), before, "what is in force stays");
    assert!(c.opens("<>", &device.path));
    drop(foreign);
    tells("filter", "ok", "runs last at the cgroup root");
}

fn containers_that_cannot_be_served_are_named(runtime: &str) {
    let _c = Container::start(runtime, "qmh-served", &[]);
    tells("containers", "ok", "1 found, and all can be served");
    // Of crun alone: runc makes no container without a cgroup.
    let bare = (runtime == "crun").then(|| Container::start(runtime, "qmh-bare", &["--cgroups=disabled"]));
    if bare.is_some() {
        tells("containers", "ok", "2 found, and 1 can be served");
        let remedy = tells("containers", "warning", "container 'qmh-bare': it has no cgroup of its own");
        assert!(remedy.starts_with("start qmh-bare in another way"), "{remedy}");
    }
}

/// Hooks of this mount namespace; they go when dropped.
struct Hooks;

impl Hooks {
    const DIRECTORY: &str = "/etc/containers/oci/hooks.d";

    fn write(&self, name: &str, text: &str) -> String {
        let path = format!("{}/{name}", Hooks::DIRECTORY);
        std::fs::create_dir_all(Hooks::DIRECTORY).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        std::fs::remove_dir_all("/etc/containers/oci").unwrap();
    }
}

fn a_hook_that_leads_elsewhere_is_told() {
    let ours = std::fs::read_to_string("hooks/qm-hotplug.json").unwrap();
    let for_program = |program: &str| ours.replace("\"/usr/bin/qm-hotplug\"", &format!("\"{program}\""));
    let hooks = Hooks;
    let path = hooks.write("qm-hotplug.json", &for_program(BINARY));
    tells("hook", "ok", &format!("{path} starts this program"));
    hooks.write("qm-hotplug.json", &for_program("/nonexistent/qm-hotplug"));
    let remedy = tells("hook", "problem", "starts /nonexistent/qm-hotplug, which is no program");
    assert!(remedy.contains("scripts/install.sh"), "{remedy}");
    assert_eq!(
        qm(&["doctor"]).fails(1, "see what is said of hook"),
        "qm-hotplug: this host cannot do the work: see what is said of hook\n"
    );
    hooks.write("qm-hotplug.json", &for_program("/bin/busybox"));
    tells("hook", "warning", &format!("{path} starts /bin/busybox, and this is {BINARY}"));
    hooks.write("qm-hotplug.json", &for_program(BINARY));
    let broken = hooks.write("broken.json", "{");
    tells("hook", "problem", &format!("{broken}: not valid JSON"));
    std::fs::remove_file(broken).unwrap();

    // Podman looks elsewhere when it is told to.
    let place = tempfile::tempdir().unwrap();
    let told = Path::new("/etc/containers/containers.conf.d/50-test.conf");
    std::fs::create_dir_all(told.parent().unwrap()).unwrap();
    std::fs::write(told, format!("[engine]\nhooks_dir = ['{}']\n", place.path().display())).unwrap();
    tells("hook", "warning", &format!("none of ours in {}:", place.path().display()));
    std::fs::remove_dir_all(told.parent().unwrap()).unwrap();

    // containers/qm's own, and one that became a link to this program.
    let program = place.path().join("oci-qm-device-manager").display().to_string();
    std::fs::copy("/bin/busybox", &program).unwrap();
    let path = hooks.write("oci-qm-device-manager.json", &for_program(&program));
    let remedy = tells("rivals", "warning", &format!("{path} starts containers/qm's {program}"));
    let command = remedy.strip_prefix("sudo ").unwrap().split(", or").next().unwrap();
    crate::support::run("sh", &["-c", command]).ok();
    tells("hook", "ok", &format!("{path} starts this program"));
    hooks.write("oci-qm-device-manager.json", &for_program("/bin/busybox").replace("precreate", "createRuntime"));
    tells("rivals", "warning", "starts /bin/busybox at createRuntime");
}

fn a_wrong_configuration_is_a_problem() {
    configure("enable = ['uinput',\n  'tape']\n");
    let place = format!("{CONFIGURATION}:2:3: there is no category 'tape'");
    assert_eq!(tells("config", "problem", &place), format!("mend {CONFIGURATION}, then sudo qm-hotplug reload"));
    // An agent says at its start what it has passed over, and goes by that until it is told to read again.
    let agent = Agent::start();
    configure("enable = ['uinput']\n");
    assert_eq!(tells("config", "warning", &place), "sudo qm-hotplug reload");
    qm(&["reload"]).ok();
    tells("config", "ok", "valid");
    agent.stop();
    unconfigure();
}

fn without_root_nothing_is_guessed() {
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), PermissionsExt::from_mode(0o755)).unwrap();
    // Where the build is may be out of such a user's reach.
    let binary = place.path().join("qm-hotplug");
    std::fs::copy(BINARY, &binary).unwrap();
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let run = |args: &[&str]| -> Said {
        let mut command = Command::new("setpriv");
        command.args(nobody).arg(&binary).args(args).stdin(Stdio::null()).output().unwrap().into()
    };
    let agent = Agent::start();
    let said = run(&["doctor", "--json"]);
    let found = checks(&said);
    let of = |topic: &str| found.iter().find(|check| check["topic"] == topic).unwrap_or_else(|| panic!("{topic}"));
    assert_eq!((&of("rights")["state"], said.code), (&"problem".into(), 1), "{said:?}");
    assert!(of("rights")["finding"].as_str().unwrap().contains("is missing"), "{said:?}");
    for topic in ["kernel", "filter", "agent", "containers"] {
        assert_eq!(of(topic)["finding"], "not looked at: that takes root's rights");
        assert_eq!((&of(topic)["state"], &of(topic)["remedy"]), (&"warning".into(), &"sudo qm-hotplug doctor".into()));
    }
    assert_eq!((&of("engines")["state"], &of("config")["state"]), (&"ok".into(), &"ok".into()), "{said:?}");
    agent.stop();
    // That none runs anybody can see, where nobody has made its directory yet.
    assert_eq!(run(&["doctor"]).code, 1);
}

/// Ended when dropped.
struct Sleeper(std::process::Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn container_hotplug_is_found() {
    let none = || checks(&qm(&["doctor", "--json"])).iter().all(|check| check["topic"] != "rivals");
    assert!(none());
    let place = tempfile::tempdir().unwrap();
    let program = place.path().join("container-hotplug");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let sleeper = Sleeper(Command::new(&program).arg("1000").spawn().unwrap());
    tells("rivals", "warning", &format!("container-hotplug runs as process {}", sleeper.0.id()));
    drop(sleeper);
    let said: Said = Command::new(BINARY).args(["doctor", "--json"]).env("PATH", place.path()).output().unwrap().into();
    let installed = format!("container-hotplug is installed: {}", program.display());
    assert!(checks(&said).iter().any(|check| check["finding"] == *installed), "{said:?}");
    let file = Path::new("/etc/containers/containers.conf.d/50-test.conf");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, "[engine.runtimes]\nhotplug = [\"/opt/container-hotplug\"]\n").unwrap();
    let remedy = tells("rivals", "warning", &format!("{} has an engine start", file.display()));
    assert!(remedy.contains(file.to_str().unwrap()), "{remedy}");
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    assert!(none());
}

/// A host that systemd runs, in this mount namespace; it goes when dropped.
struct Systemd;

impl Systemd {
    const UNIT: &str = "/etc/systemd/system/qm-hotplug.service";
    const WANTS: &str = "/etc/systemd/system/multi-user.target.wants";

    fn new() -> Systemd {
        std::fs::create_dir_all("/run/systemd").unwrap();
        mount(Some("none"), "/run/systemd", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        std::fs::create_dir("/run/systemd/system").unwrap();
        Systemd
    }

    /// As `systemctl enable` does.
    fn enable() {
        std::fs::create_dir_all(Systemd::WANTS).unwrap();
        let link = format!("{}/qm-hotplug.service", Systemd::WANTS);
        std::os::unix::fs::symlink(Systemd::UNIT, link).unwrap();
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(Systemd::UNIT);
        let _ = std::fs::remove_file(format!("{}/qm-hotplug.service", Systemd::WANTS));
        umount2("/run/systemd", MntFlags::MNT_DETACH).unwrap();
    }
}

fn the_unit_is_looked_for() {
    let _systemd = Systemd::new();
    tells("agent", "warning", "and its unit is not installed");
    std::fs::create_dir_all("/etc/systemd/system").unwrap();
    std::fs::copy("units/qm-hotplug.service", Systemd::UNIT).unwrap();
    assert_eq!(tells("agent", "warning", "and is not started at boot"), "sudo systemctl enable --now qm-hotplug");
    let agent = Agent::start();
    assert_eq!(tells("agent", "warning", "runs, but is not started at boot"), "sudo systemctl enable qm-hotplug");
    Systemd::enable();
    tells("agent", "ok", "runs, version");
    agent.stop();
    tells("agent", "warning", "though it is enabled");
}
