//! The agent's socket: who may use it, and what it makes of nonsense.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::{TTYS, assert_has_ttys};
use crate::plug::{block, console};
use crate::state::observe;
use crate::support::podman::Container;
use crate::support::rude::Rude;
use crate::support::{Agent, BINARY, configure, grants, qm, run, unconfigure, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("agent_socket::nonsense_is_answered_and_changes_nothing", nonsense_is_answered_and_changes_nothing),
    ("agent_socket::programs_can_talk_to_it", programs_can_talk_to_it),
    ("agent_socket::it_tells_of_the_configuration_that_is_in_force", it_tells_of_the_configuration_that_is_in_force),
    ("agent_socket::callers_without_manners_harm_nobody", callers_without_manners_harm_nobody),
    ("agent_socket::operators_may_what_root_lets_them", operators_may_what_root_lets_them),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("agent_socket::for_root_alone", for_root_alone),
    ("agent_socket::a_second_agent_refuses", a_second_agent_refuses),
    ("agent_socket::a_socket_of_systemds_is_taken", a_socket_of_systemds_is_taken),
];

const SOCKET: &str = "/run/qm-hotplug/io.qmhotplug";

fn connect() -> UnixStream {
    let stream = UnixStream::connect(SOCKET).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// Sends bytes and reads one answer, or what came before the other side hung up.
fn ask(stream: &mut UnixStream, bytes: &[u8]) -> Option<Value> {
    // It may have hung up before it has read all.
    let _ = stream.write_all(bytes);
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while matches!(stream.read(&mut byte), Ok(1)) {
        if byte[0] == 0 {
            return Some(serde_json::from_slice(&answer).unwrap());
        }
        answer.push(byte[0]);
    }
    None
}

fn for_root_alone() {
    let _agent = Agent::start();
    let mode = |path: &str| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(SOCKET), mode("/run/qm-hotplug")), (0o600, 0o700));
    // Also where somebody opened the directory, and also for a process that lost nothing but its user id.
    std::fs::set_permissions("/run/qm-hotplug", PermissionsExt::from_mode(0o755)).unwrap();
    let said = run("setpriv", &["--reuid", "65534", "--regid", "65534", "--clear-groups", BINARY, "list"]);
    std::fs::set_permissions("/run/qm-hotplug", PermissionsExt::from_mode(0o700)).unwrap();
    said.fails(5, "root");
}

fn nonsense_is_answered_and_changes_nothing(runtime: &str) {
    let agent = Agent::start();
    let c = Container::start(runtime, "qmh-nonsense", &TTYS);
    assert_has_ttys(&c);
    let (device, pid) = (block(41), [c.pid()]);
    let before = observe(&pid);
    let attach = |change: (&str, Value)| {
        let mut parameters =
            json!({ "container": c.name, "device": device.path, "destination": "/dev/x", "access": "rwm" });
        parameters[change.0] = change.1;
        json!({ "method": "io.qmhotplug.Attach", "parameters": parameters }).to_string()
    };
    let (usage, refused) = ("io.qmhotplug.Usage", "io.qmhotplug.Refused");
    let invalid = "org.varlink.service.InvalidParameter";
    let mut stream = connect();
    for (text, error) in [
        (r#"{"method":"io.qmhotplug.Explode","parameters":{}}"#.to_owned(), "org.varlink.service.MethodNotFound"),
        (r#"{"method":"x.y.Explode","parameters":{}}"#.to_owned(), "org.varlink.service.InterfaceNotFound"),
        (r#"{"method":"io.qmhotplug.Attach"}"#.to_owned(), invalid),
        (r#"{"method":"io.qmhotplug.Monitor"}"#.to_owned(), "org.varlink.service.ExpectedMore"),
        (attach(("access", json!("x"))), invalid),
        (attach(("access", json!(""))), invalid),
        (attach(("mode", json!(-1))), invalid),
        (attach(("uid", json!("root"))), invalid),
        (attach(("destination", json!("x"))), usage),
        (attach(("destination", json!("/dev/../etc/x"))), usage),
        (attach(("destination", json!("/proc/x"))), usage),
        (attach(("container", json!(""))), usage),
        (attach(("container", json!("qmh-none"))), "io.qmhotplug.NoSuchContainer"),
        (attach(("container", json!("pid:1"))), refused),
        (attach(("device", json!("/etc/passwd"))), "io.qmhotplug.NoSuchDevice"),
        (attach(("device", json!(""))), "io.qmhotplug.NoSuchDevice"),
        (attach(("destination", json!("/dev/null"))), refused),
    ] {
        // All on one connection: an error does not end it.
        let answer =
            ask(&mut stream, &[text.as_bytes(), b"\0"].concat()).unwrap_or_else(|| panic!("no answer to {text}"));
        assert_eq!(answer["error"], error, "{text}: {answer}");
        if error.starts_with("io.qmhotplug.") {
            let message = answer["parameters"]["message"].as_str().unwrap();
            assert!(!message.is_empty() && !message.contains('\n'), "{message}");
        }
    }
    for text in ["", "{", "[]", "\u{1b}[2J", "null", r#"{"method":"io.qmhotplug.Attach","parameters":[]}"#] {
        // Who does not speak varlink is hung up on.
        assert_eq!(ask(&mut connect(), &[text.as_bytes(), b"\0"].concat()), None, "{text}");
    }
    // The bits of a mode are permissions, not a file type or setuid.
    for mode in [0o4777, 0o1000, 0o20666, u32::MAX] {
        let answer = ask(&mut stream, &[attach(("mode", json!(mode))).as_bytes(), b"\0"].concat()).unwrap();
        assert_eq!(answer["error"], usage, "mode {mode:o}: {answer}");
    }
    assert_eq!(ask(&mut connect(), &vec![b'x'; 1 << 20]), None, "too long");
    // Half a request and then nothing; a caller that does not wait; one that never says anything.
    connect().write_all(b"{\"method\":").unwrap();
    connect().write_all(b"{\"method\":\"io.qmhotplug.List\"}\0").unwrap();
    let silent = connect();
    assert_eq!(observe(&pid), before);
    assert_eq!(grants().len(), 8, "it lives on");
    qm(&["attach", &c.name, &device.path]).ok();
    drop(silent);
    agent.stop();
}

fn programs_can_talk_to_it(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-program", &[]);
    let device = block(42);
    let mut stream = connect();
    let mut call = |method: &str, parameters: Value| {
        let request = json!({ "method": format!("io.qmhotplug.{method}"), "parameters": parameters }).to_string();
        ask(&mut stream, &[request.as_bytes(), b"\0"].concat()).unwrap()
    };
    let attach =
        json!({ "container": c.name, "device": device.path, "destination": "/dev/x", "access": "rw", "mode": 0o604 });
    let answer = call("Attach", attach);
    assert_eq!((answer.get("error"), &answer["parameters"]["grant"]["path"]), (None, &json!("/dev/x")));
    assert_eq!(c.node("/dev/x").unwrap(), "b 7:42 0:0 0604");
    assert_eq!(call("List", json!({ "container": c.id }))["parameters"], json!({ "grants": grants() }));
    assert_eq!(call("Status", json!({}))["parameters"]["grants"], 1);
    let found = call("Devices", json!({ "selector": format!("devname={}", device.path) }));
    assert_eq!(found["parameters"]["devices"][0]["minor"], 42);
    let running = call("Containers", json!({}))["parameters"]["containers"].clone();
    let its = running.as_array().unwrap().iter().find(|its| its["name"] == json!(c.name)).unwrap();
    assert_eq!((&its["has"], &its["asks"], &its["problem"]), (&json!(["/dev/x"]), &json!([]), &json!(null)));
    let explained = call("Explain", json!({ "container": c.name, "device": device.path }));
    let explained = &explained["parameters"]["explanation"];
    assert_eq!((&explained["accessible"], &explained["path"]), (&json!(true), &json!("/dev/x")));
    let proofs = call("Verify", json!({ "container": c.name, "open": false }))["parameters"]["proofs"].clone();
    assert_eq!((proofs.as_array().unwrap().len(), &proofs[0]["accessible"]), (1, &json!(true)));
    let bad = call("Explain", json!({ "container": "qmh-none", "device": device.path }));
    assert_eq!(bad["error"], "io.qmhotplug.NoSuchContainer");
    let answer = call("Detach", json!({ "container": c.name, "device": device.path }));
    assert_eq!(answer["parameters"]["grants"][0]["path"], "/dev/x");
    assert_eq!(call("List", json!({}))["parameters"], json!({ "grants": [] }));
    // What is left out is the device's own.
    let answer = call("Attach", json!({ "container": c.name, "device": device.path }));
    let grant = &answer["parameters"]["grant"];
    assert_eq!((&grant["path"], &grant["access"]), (&json!(device.path), &json!("rwm")));
    call("Detach", json!({ "container": c.name, "device": device.path }));
    // Two requests in one piece are two answers, and one that wants none gets none.
    let pieces = b"{\"method\":\"io.qmhotplug.List\"}\0{\"method\":\"io.qmhotplug.List\",\"oneway\":true}\0{\"method\":\"io.qmhotplug.Status\"}\0";
    assert_eq!(ask(&mut stream, pieces).unwrap()["parameters"], json!({ "grants": [] }));
    assert_eq!(ask(&mut stream, b"").unwrap()["parameters"]["agent"], true);
    let mut service = |name: &str, parameters: Value| {
        let request = json!({ "method": format!("org.varlink.service.{name}"), "parameters": parameters }).to_string();
        ask(&mut stream, &[request.as_bytes(), b"\0"].concat()).unwrap()["parameters"].clone()
    };
    assert_eq!(service("GetInfo", json!({}))["interfaces"], json!(["org.varlink.service", "io.qmhotplug"]));
    let described = service("GetInterfaceDescription", json!({ "interface": "io.qmhotplug" }));
    assert_eq!(described["description"], include_str!("../../src/core/io.qmhotplug.varlink"));
}

/// Not of the one that is written and not yet read.
fn it_tells_of_the_configuration_that_is_in_force(runtime: &str) {
    configure("");
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-in-force", &[]);
    let device = console(42);
    let call = |method: &str, parameters: Value| {
        let request = json!({ "method": format!("io.qmhotplug.{method}"), "parameters": parameters }).to_string();
        ask(&mut connect(), &[request.as_bytes(), b"\0"].concat()).unwrap()["parameters"].clone()
    };
    let told = || {
        let running = call("Containers", json!({}))["containers"].clone();
        let asks = running.as_array().unwrap().iter().find(|its| its["name"] == json!(c.name)).unwrap()["asks"].clone();
        let found = call("Devices", json!({ "selector": "lab" }))["devices"].clone();
        let explained = call("Explain", json!({ "container": c.name, "device": device.path })).to_string();
        (asks, found, explained.contains("the host's configuration"))
    };
    let before = told();
    assert_eq!((&before.0, before.2), (&json!([]), false), "{before:?}");
    configure(&format!(
        "[category.lab]\nnodes = [\"{0}\"]\n[[container]]\nmatch = \"{1}\"\ndevices = [\"devname={0}\"]\n",
        device.path, c.name
    ));
    assert_eq!(told(), before, "it was not read yet");
    qm(&["reload"]).ok();
    let after = told();
    assert_eq!(
        (after.0, after.1[0]["minor"].clone(), after.2),
        (json!([format!("devname={}", device.path)]), json!(128 + 42), true)
    );
    unconfigure();
}

/// Resident memory in KiB.
fn resident(agent: &Agent) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Half requests, endless ones, more connections than one may have, and callers that never read.
fn callers_without_manners_harm_nobody(runtime: &str) {
    const UID: u32 = 65_533;
    let agent = Agent::start();
    let c = Container::start(
        runtime,
        "qmh-manners",
        &["--annotation", "org.containers.qm.hotplug.console=devname=/dev/vcsa43"],
    );
    wait_for("the agent to know it", || qm(&["ps"]).ok().contains(&c.name));
    let before = resident(&agent);
    // Another user than root, who has his own share of the connections.
    let rude = Rude::start(UID, SOCKET.as_ref());
    for _ in 0..5 {
        assert!(qm(&["list", "--json"]).ok().starts_with('['), "root is served");
        let device = console(43);
        wait_for("a plug to reach it", || c.opens("<>", &device.path));
        device.unplug();
        wait_for("an unplug, too", || c.node(&device.path).is_none());
    }
    let grown = resident(&agent) - before;
    assert!(grown < 32 * 1024, "the agent has grown by {grown} KiB");
    assert!(agent.log().contains(&format!("pid {} of uid {UID} has 128 connections", rude.pid)));
    drop(rude);
    agent.stop();
}

/// Root may do all, members of the group may read, and operators what the configuration says.
fn operators_may_what_root_lets_them(runtime: &str) {
    for (program, args) in [
        ("groupadd", &["--system", "qm-hotplug"][..]),
        ("useradd", &["--no-create-home", "--uid", "61001", "--groups", "qm-hotplug", "qmhreader"]),
        ("useradd", &["--no-create-home", "--uid", "61002", "--groups", "qm-hotplug", "qmhoperator"]),
        ("useradd", &["--no-create-home", "--uid", "61003", "qmhnobody"]),
    ] {
        run(program, args).ok();
    }
    let _accounts = Accounts;
    configure("[[operator]]\nuser = \"qmhoperator\"\ncontainer = \"qmh-op-*\"\nallow = [\"devname=/dev/vcsa41\"]\n");
    let agent = Agent::start();
    let (device, other) = (console(41), console(42));
    let c = Container::start(runtime, "qmh-op-1", &[]);
    let foreign = Container::start(runtime, "qmh-foreign", &[]);
    let as_user = |user: &str, args: &[&str]| run("runuser", &[&["-u", user, "--", BINARY], args].concat());
    let attach = |user: &str, c: &Container, device: &str| as_user(user, &["attach", &c.name, device]);
    for user in ["qmhreader", "qmhoperator"] {
        as_user(user, &["list"]).ok();
        as_user(user, &["status"]).ok();
        assert!(as_user(user, &["ps"]).ok().contains(&c.name));
        assert!(as_user(user, &["explain", &c.name, &device.path]).ok().contains("→"));
        as_user(user, &["reload"]).fails(5, "the agent refuses you that");
    }
    as_user("qmhnobody", &["list"]).fails(5, "be in the group qm-hotplug");
    attach("qmhreader", &c, &device.path).fails(5, "the agent refuses you that");
    attach("qmhoperator", &foreign, &device.path).fails(5, "[[operator]]");
    attach("qmhoperator", &c, &other.path).fails(5, "[[operator]]");
    as_user("qmhoperator", &["attach", "--persist", &c.name, &device.path]).fails(5, "root alone");
    assert!(grants().is_empty());
    attach("qmhoperator", &c, &device.path).ok();
    assert!(c.opens("<>", &device.path));
    as_user("qmhreader", &["verify", &c.name]).ok();
    as_user("qmhreader", &["verify", "--open", &c.name]).fails(5, "refuses");
    as_user("qmhreader", &["detach", &c.name, &device.path]).fails(5, "refuses");
    qm(&["attach", &c.name, &other.path]).ok();
    as_user("qmhoperator", &["detach", &c.name, &other.path]).fails(5, "refuses");
    as_user("qmhoperator", &["detach", &c.name, &device.path]).ok();
    assert_eq!(grants().len(), 1);
    let log = agent.log();
    for line in [
        format!("attach {} to {}", device.path, c.name),
        format!("attach {} to {}", device.path, foreign.name),
        format!("attach {} to {} for good", device.path, c.name),
        format!("detach {} from {}", device.path, c.name),
        format!("open the devices of {}", c.name),
        "have the configuration read again".to_owned(),
    ] {
        let whole = format!(") may not {line} container=\"uid 6100");
        let is_it = |its: &str| its.contains(&whole) && its.contains("(pid ");
        assert!(log.lines().any(is_it), "{line}: {log}");
    }
    // Nobody is told of what he may not see, and a link of his own leads nowhere.
    let link = format!("{}/qmh-link", std::env::temp_dir().display());
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(&device.path, &link).unwrap();
    for path in ["/root/.ssh", "/etc/shadow", "/dev/shm/x", "/dev/../etc/shadow", &link] {
        let said = as_user("qmhoperator", &["explain", &c.name, path]);
        said.fails(4, "others than root name devices by their paths below /dev");
        as_user("qmhoperator", &["attach", &c.name, path, "/dev/y"]).fails(4, "below /dev");
    }
    std::fs::remove_file(&link).unwrap();
    // What root has attached for good stays, also while it is not there.
    qm(&["attach", "--persist", &c.name, &device.path]).ok();
    let kept = device.path.clone();
    device.unplug();
    wait_for("the unplug", || c.node(&kept).is_none());
    as_user("qmhoperator", &["detach", &c.name, &kept]).fails(5, "refuses");
    assert_eq!(grants().iter().filter(|grant| grant["path"] == json!(kept)).count(), 1, "it is kept");
    qm(&["detach", &c.name, &kept]).ok();
    let log = agent.log();
    assert!(log.contains("uid 61002 (pid "), "{log}");
    assert!(log.contains(&format!("may not attach {kept} to qmh-foreign")), "{log}");
    agent.stop();
}

/// Struck from /etc when dropped.
struct Accounts;

impl Drop for Accounts {
    fn drop(&mut self) {
        for user in ["qmhreader", "qmhoperator", "qmhnobody"] {
            run("userdel", &[user]);
        }
        run("groupdel", &["qm-hotplug"]);
        unconfigure();
    }
}

/// systemd has the socket, and starts the agent for the first who calls.
fn a_socket_of_systemds_is_taken() {
    let mut started =
        Command::new("systemd-socket-activate").args(["--listen", SOCKET, BINARY, "agent"]).spawn().unwrap();
    wait_for("the socket", || std::fs::exists(SOCKET).unwrap());
    assert!(qm(&["status", "--json"]).ok().contains("\"agent\":false"), "root's own commands do not start it");
    // An ordinary user can do nothing without it, so his do.
    std::fs::set_permissions("/run/qm-hotplug", PermissionsExt::from_mode(0o711)).unwrap();
    std::fs::set_permissions(SOCKET, PermissionsExt::from_mode(0o666)).unwrap();
    let said = run("setpriv", &["--reuid", "65534", "--regid", "65534", "--clear-groups", BINARY, "list"]);
    assert_eq!(said.stderr, "", "an agent answered");
    said.ok();
    let answer = ask(&mut connect(), b"{\"method\":\"io.qmhotplug.Status\"}\0").unwrap();
    assert_eq!(answer["parameters"]["agent"], true);
    assert!(qm(&["status", "--json"]).ok().contains("\"agent\":true"));
    let pid = rustix::process::Pid::from_raw(started.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(started.wait().unwrap().success());
    assert!(std::fs::exists(SOCKET).unwrap(), "it is not the agent's to remove");
    std::fs::remove_file(SOCKET).unwrap();
}

fn a_second_agent_refuses() {
    let agent = Agent::start();
    let before = observe(&[]);
    let said = run(BINARY, &["agent"]);
    // It waits for a command that is just changing something, and then gives up.
    assert_eq!(said.code, 6, "{said:?}");
    assert!(said.stderr.lines().last().unwrap().contains("an agent is running already"), "{said:?}");
    assert_eq!(observe(&[]), before);
    assert_eq!(grants(), [json!(null); 0]);
    assert!(qm(&["status", "--json"]).ok().contains("\"agent\":true"), "the first one is unharmed");
    agent.stop();
}
