//! The agent's socket: who may use it, and what it makes of nonsense.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::{TTYS, assert_has_ttys};
use crate::plug::block;
use crate::state::observe;
use crate::support::podman::Container;
use crate::support::{Agent, BINARY, grants, qm, run};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("agent_socket::nonsense_is_answered_and_changes_nothing", nonsense_is_answered_and_changes_nothing),
    ("agent_socket::programs_can_talk_to_it", programs_can_talk_to_it),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("agent_socket::for_root_alone", for_root_alone),
    ("agent_socket::a_second_agent_refuses", a_second_agent_refuses),
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
    let mut stream = connect();
    for (text, error) in [
        ("".to_owned(), usage),
        ("{".to_owned(), usage),
        ("[]".to_owned(), usage),
        ("\u{1b}[2J".to_owned(), usage),
        ("null".to_owned(), usage),
        (r#"{"method":"io.qmhotplug.Explode","parameters":{}}"#.to_owned(), usage),
        (r#"{"method":"io.qmhotplug.Attach"}"#.to_owned(), usage),
        (r#"{"method":"io.qmhotplug.Monitor"}"#.to_owned(), usage),
        (r#"{"method":"io.qmhotplug.Attach","parameters":[]}"#.to_owned(), usage),
        (attach(("access", json!("x"))), usage),
        (attach(("access", json!(""))), usage),
        (attach(("mode", json!(-1))), usage),
        (attach(("uid", json!("root"))), usage),
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
        let message = answer["parameters"]["message"].as_str().unwrap();
        assert!(!message.is_empty() && !message.contains('\n'), "{message}");
    }
    // The bits of a mode are permissions, not a file type or setuid.
    for mode in [0o4777, 0o1000, 0o20666, u32::MAX] {
        let answer = ask(&mut stream, &[attach(("mode", json!(mode))).as_bytes(), b"\0"].concat()).unwrap();
        assert_eq!(answer["error"], usage, "mode {mode:o}: {answer}");
    }
    let answer = ask(&mut connect(), &vec![b'x'; 1 << 20]);
    assert!(answer.is_none_or(|answer| answer["error"] == usage), "too long");
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
    assert_eq!((answer.get("error"), &answer["parameters"]["path"]), (None, &json!("/dev/x")));
    assert_eq!(c.node("/dev/x").unwrap(), "b 7:42 0:0 0604");
    assert_eq!(call("List", json!({ "container": c.id }))["parameters"], json!(grants()));
    assert_eq!(call("Status", json!({}))["parameters"]["grants"], 1);
    let answer = call("Detach", json!({ "container": c.name, "device": device.path }));
    assert_eq!(answer["parameters"][0]["path"], "/dev/x");
    assert_eq!(call("List", json!({}))["parameters"], json!([]));
    // Two requests in one piece are two answers.
    let twice = b"{\"method\":\"io.qmhotplug.List\"}\0{\"method\":\"io.qmhotplug.Status\"}\0";
    assert_eq!(ask(&mut stream, twice).unwrap()["parameters"], json!([]));
    assert_eq!(ask(&mut stream, b"").unwrap()["parameters"]["agent"], true);
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
