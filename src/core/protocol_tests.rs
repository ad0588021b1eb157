use proptest::prelude::*;
use varlink_parser::{Argument, IDL, VStruct, VStructOrEnum, VType, VTypeExt};

use super::*;
use crate::core::device::Kind;
use crate::core::event::{Changed, Event, Plug, Refused};
use crate::core::explanation::{Explanation, Finding, Verdict};
use crate::core::figures::Latency;
use crate::core::info::{ContainerInfo, DeviceInfo, Explained, Proven, StatusInfo};

fn parsed(text: &str) -> Request {
    parse_request(text.as_bytes()).unwrap_or_else(|bad| panic!("{text}: {bad:?}")).request
}

/// The error's name and its parameter.
fn refusal(text: &str) -> (String, Value) {
    match parse_request(text.as_bytes()) {
        Err(Bad::Refused(Some(reply))) => (reply.error.unwrap(), reply.parameters),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn a_request_looks_as_varlink_has_it() {
    let request = Request::Detach(Detach { container: "web".into(), device: "/dev/x".into() });
    let text = String::from_utf8(frame(&request)).unwrap();
    let expected = r#"{"method":"io.qmhotplug.Detach","parameters":{"container":"web","device":"/dev/x"}}"#;
    assert_eq!(text.strip_suffix('\0').unwrap(), expected);
    assert_eq!(parsed(expected), request);
    for text in [r#"{"method":"io.qmhotplug.List"}"#, r#"{"method":"io.qmhotplug.List","parameters":null,"x":1}"#] {
        assert_eq!(parsed(text), Request::List(List::default()));
    }
    let attach = r#"{"method":"io.qmhotplug.Attach","parameters":{"container":"web","device":"/dev/x","mode":null}}"#;
    assert!(matches!(parsed(attach), Request::Attach(Attach { destination: None, access: None, mode: None, .. })));
}

#[test]
fn a_stream_is_for_those_who_ask_for_more() {
    let request = Incoming::streamed(Request::Monitor(Monitor { container: Some("web".into()) }));
    let text = frame(&request);
    let expected = br#"{"method":"io.qmhotplug.Monitor","parameters":{"container":"web"},"more":true}"#;
    assert_eq!(text.strip_suffix(b"\0").unwrap(), expected);
    assert_eq!(parse_request(expected).unwrap(), request);
    for more in ["", r#","more":false"#] {
        let text = format!(r#"{{"method":"io.qmhotplug.Monitor"{more}}}"#);
        assert_eq!(refusal(&text), ("org.varlink.service.ExpectedMore".into(), json!({})));
    }
    let reply = Reply::good(json!({}));
    assert_eq!(serde_json::to_string(&reply).unwrap(), r#"{"parameters":{}}"#);
    assert_eq!(serde_json::to_string(&reply.continued()).unwrap(), r#"{"parameters":{},"continues":true}"#);
}

#[test]
fn who_wants_no_answer_gets_none() {
    let list = parse_request(br#"{"method":"io.qmhotplug.List","oneway":true}"#).unwrap();
    assert!(list.oneway && !list.more);
    assert_eq!(parse_request(br#"{"method":"x.y.Z","oneway":true}"#), Err(Bad::Refused(None)));
}

#[test]
fn errors_are_those_of_every_service() {
    let of = |method: &str, parameters: &str| {
        let (error, its) = refusal(&format!(r#"{{"method":"{method}","parameters":{parameters}}}"#));
        let (key, value) = its.as_object().unwrap().iter().next().unwrap();
        format!("{} {key}={}", error.strip_prefix("org.varlink.service.").unwrap(), value.as_str().unwrap())
    };
    for (method, parameters, expected) in [
        ("io.qmhotplug.Explode", "{}", "MethodNotFound method=io.qmhotplug.Explode"),
        ("Explode", "{}", "MethodNotFound method=Explode"),
        ("io.qmhotplugs.List", "{}", "InterfaceNotFound interface=io.qmhotplugs"),
        ("io.qmhotplug.List", r#"{"containers":"x"}"#, "InvalidParameter parameter=containers"),
        ("io.qmhotplug.List", r#"{"container":7}"#, "InvalidParameter parameter=container"),
        ("io.qmhotplug.Status", r#"{"x":7}"#, "InvalidParameter parameter=x"),
        ("io.qmhotplug.Detach", r#"{"container":"x"}"#, "InvalidParameter parameter=device"),
        ("io.qmhotplug.Attach", r#"{"container":"x","device":"y","mode":-1}"#, "InvalidParameter parameter=mode"),
        ("io.qmhotplug.Attach", r#"{"container":"x","device":"y","access":"z"}"#, "InvalidParameter parameter=access"),
        (
            "io.qmhotplug.Attach",
            r#"{"container":"x","device":"y","persist":{"typed":7}}"#,
            "InvalidParameter parameter=persist.typed",
        ),
    ] {
        assert_eq!(of(method, parameters), expected, "{method} {parameters}");
    }
    let upgrade = refusal(r#"{"method":"io.qmhotplug.List","upgrade":true}"#);
    assert_eq!(upgrade, ("org.varlink.service.InvalidParameter".into(), json!({ "parameter": "upgrade" })));
}

#[test]
fn nonsense_is_no_message() {
    for text in ["", "{", "[]", "null", r#"{"parameters":{}}"#, r#"{"method":7}"#, r#"{"method":"a.B","more":"true"}"#]
    {
        assert!(matches!(parse_request(text.as_bytes()), Err(Bad::NoMessage(_))), "{text}");
    }
    let array = br#"{"method":"io.qmhotplug.List","parameters":[]}"#;
    assert!(matches!(parse_request(array), Err(Bad::NoMessage(_))));
}

#[test]
fn it_says_what_it_can_be_asked() {
    let info = Reply::info().parameters;
    assert_eq!(info["interfaces"], json!(["org.varlink.service", "io.qmhotplug"]));
    let ask = |name: &str| Reply::description(&GetInterfaceDescription { interface: name.into() });
    for name in ["org.varlink.service", "io.qmhotplug"] {
        assert!(ask(name).parameters["description"].as_str().unwrap().contains(&format!("\ninterface {name}\n")));
    }
    assert_eq!(ask("x.y").error.unwrap(), "org.varlink.service.InterfaceNotFound");
}

proptest! {
    #[test]
    fn no_request_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_request(&text);
    }
}

// --- what is described is what is sent ---

fn fits(idl: &IDL<'_>, wanted: &VTypeExt<'_>, value: &Value) -> bool {
    match wanted {
        VTypeExt::Option(inner) => value.is_null() || fits(idl, inner, value),
        VTypeExt::Array(inner) => value.as_array().is_some_and(|all| all.iter().all(|one| fits(idl, inner, one))),
        VTypeExt::Dict(inner) => value.as_object().is_some_and(|all| all.values().all(|one| fits(idl, inner, one))),
        VTypeExt::Plain(VType::Bool) => value.is_boolean(),
        VTypeExt::Plain(VType::Int) => value.is_i64(),
        VTypeExt::Plain(VType::Float) => value.is_f64(),
        VTypeExt::Plain(VType::String) => value.is_string(),
        VTypeExt::Plain(VType::Object) => value.is_object(),
        VTypeExt::Plain(VType::Enum(names)) => value.as_str().is_some_and(|value| names.elts.contains(&value)),
        VTypeExt::Plain(VType::Struct(fields)) => has_the_fields(idl, fields, value),
        VTypeExt::Plain(VType::Typename(name)) => match &idl.typedefs[name].elt {
            VStructOrEnum::VStruct(fields) => has_the_fields(idl, fields, value),
            VStructOrEnum::VEnum(names) => value.as_str().is_some_and(|value| names.elts.contains(&value)),
        },
    }
}

/// All that have to be there, and none that is not described.
fn has_the_fields(idl: &IDL<'_>, fields: &VStruct<'_>, value: &Value) -> bool {
    let is_there = |field: &Argument<'_>| fits(idl, &field.vtype, value.get(field.name).unwrap_or(&Value::Null));
    let is_described = |name: &String| fields.elts.iter().any(|field| field.name == name);
    value.as_object().is_some_and(|object| object.keys().all(is_described)) && fields.elts.iter().all(is_there)
}

/// As many fields as can be.
fn grant() -> GrantInfo {
    let text = r#"{"container":"web","id":"1","device":"/dev/x","kind":"char","major":1,"minor":2,"access":"rw",
        "right":"filter","path":"/dev/x","node":"ours","uid":0,"gid":0,"mode":420,"origin":"manual","persist":true,
        "note":"x"}"#;
    serde_json::from_str(text).unwrap()
}

#[test]
fn every_answer_is_as_it_is_described() {
    let some = || Some("x".to_owned());
    let idl = IDL::try_from(INTERFACES[1].1).unwrap_or_else(|error| panic!("{error}"));
    IDL::try_from(INTERFACES[0].1).unwrap_or_else(|error| panic!("{error}"));
    let (kind, major, minor) = (Kind::Block, 1, 2);
    let (container, id, device, path) = ("web".to_owned(), "1".to_owned(), "/dev/x".to_owned(), "/dev/x".to_owned());
    let status = StatusInfo {
        agent: true,
        version: "1".into(),
        filter: "override".into(),
        after: vec!["x".into()],
        entries: 1,
        withdrawn: 0,
        containers: 1,
        grants: 1,
        events: "udev".into(),
        configuration: vec!["x".into()],
        uptime: Some(1),
        seen: 1,
        lost: 1,
        compared: 1,
        latency: Some(Latency { count: 1, p50: 1, p90: 1, p99: 1, most: 1 }),
        of_container: [("web".to_owned(), 1)].into(),
    };
    let found = DeviceInfo {
        device: device.clone(),
        kind,
        major,
        minor,
        uid: 0,
        gid: 0,
        mode: 0,
        subsystem: "tty".into(),
        driver: vec!["x".into()],
        usb: some(),
        serial: some(),
        model: some(),
        vendor: some(),
        id_path: some(),
        port: some(),
        pci: vec!["x".into()],
        seat: some(),
        tags: vec!["x".into()],
        links: vec!["x".into()],
        categories: vec!["x".into()],
    };
    let running = ContainerInfo {
        name: some(),
        id: id.clone(),
        runtime: "podman".into(),
        pid: 7,
        cgroup: some(),
        asks: vec!["x".into()],
        has: vec!["x".into()],
        problem: some(),
    };
    let finding = Finding { topic: "rule".into(), verdict: Verdict::Good, text: "x".into() };
    let explanation = Explanation { accessible: Some(true), findings: vec![finding], advice: vec!["x".into()] };
    let explained = Explained {
        container: container.clone(),
        id: id.clone(),
        device: device.clone(),
        kind,
        major,
        minor,
        path: path.clone(),
        explanation,
    };
    let proven = Proven {
        container: container.clone(),
        id: id.clone(),
        path: path.clone(),
        device: device.clone(),
        kind,
        major,
        minor,
        access: Access::ALL,
        accessible: Some(false),
        errno: Some(1),
        reason: some(),
        opened: false,
        code: 5,
    };
    let changed = Changed { container, id, device, path, origin: "manual".into(), micros: Some(1) };
    let plug = Plug { device: "/dev/ttyUSB0".into(), kind, major, minor, containers: vec!["web".into()], micros: 1 };
    let refused = Refused {
        container: "web".into(),
        id: "1".into(),
        kind,
        major,
        minor,
        device: some(),
        access: Access::ALL,
        annotation: some(),
    };
    let answers = [
        ("Attach", json!(OneGrant { grant: grant() })),
        ("Detach", json!(Grants { grants: vec![grant()] })),
        ("List", json!(Grants { grants: vec![GrantInfo { persist: false, note: None, ..grant() }] })),
        ("Devices", json!({ "devices": [found] })),
        ("Containers", json!({ "containers": [running] })),
        ("Explain", json!({ "explanation": explained })),
        ("Verify", json!({ "proofs": [proven] })),
        ("Status", json!(status)),
        ("Monitor", json!(Event::Ready { container: None, id: None })),
        ("Monitor", json!(Event::Plugged(plug.clone()))),
        ("Monitor", json!(Event::Unplugged(plug))),
        ("Monitor", json!(Event::Granted(changed.clone()))),
        ("Monitor", json!(Event::Revoked(changed))),
        ("Monitor", json!(Event::Refused(refused))),
        ("Monitor", json!(Event::Lost { count: 7 })),
        ("Reload", json!(Nothing {})),
    ];
    // The events are those that the documents name.
    let event = idl.methods["Monitor"].output.elts.iter().find(|field| field.name == "event").expect("a field");
    let VTypeExt::Plain(VType::Enum(kinds)) = &event.vtype else { panic!("an enumeration") };
    for text in [include_str!("../../README.md"), include_str!("../man/qm-hotplug-monitor.1")] {
        for kind in &kinds.elts {
            let is_named = text.contains(&format!("`{kind}`")) || text.contains(&format!("\\fB{kind}\\fR"));
            assert!(is_named, "{kind} is not in a document");
        }
    }
    for (method, answer) in &answers {
        assert!(has_the_fields(&idl, &idl.methods[method].output, answer), "{method} does not answer {answer}");
    }
    let described: Vec<&str> = idl.method_keys.clone();
    assert!(described.iter().all(|name| answers.iter().any(|(method, _)| method == name)), "{described:?}");
    for code in 0..8 {
        let bad = Reply::bad(code, "x");
        let name = bad.error.unwrap();
        let error = &idl.errors[name.strip_prefix("io.qmhotplug.").unwrap()];
        assert!(has_the_fields(&idl, &error.parm, &bad.parameters), "{name}");
    }
}

#[test]
fn every_question_is_as_it_is_described() {
    let idl = IDL::try_from(INTERFACES[1].1).unwrap_or_else(|error| panic!("{error}"));
    let some = || Some("x".to_owned());
    let (container, device) = ("web".to_owned(), "/dev/x".to_owned());
    let persist = Some(Persist { typed: "x".into(), selector: some() });
    let (destination, access) = (some(), Some(Access::ALL));
    let (container, device) = (&container, &device);
    let attach = Attach {
        container: container.clone(),
        device: device.clone(),
        destination,
        access,
        mode: Some(1),
        uid: Some(1),
        gid: Some(1),
        persist,
    };
    let requests = [
        Request::Attach(attach),
        Request::Detach(Detach { container: container.clone(), device: device.clone() }),
        Request::List(List { container: some() }),
        Request::Devices(Devices { selector: some() }),
        Request::Containers(Nothing {}),
        Request::Explain(Explain { container: container.clone(), device: device.clone() }),
        Request::Verify(Verify { container: container.clone(), device: some(), open: Some(true) }),
        Request::Status(Nothing {}),
        Request::Monitor(Monitor { container: some() }),
        Request::Reload(Nothing {}),
    ];
    for request in &requests {
        let value = json!(request);
        let name = value["method"].as_str().unwrap().strip_prefix("io.qmhotplug.").unwrap().to_owned();
        let input = &idl.methods[&*name].input;
        assert!(has_the_fields(&idl, input, &value["parameters"]), "{value}");
        let sent = value["parameters"].as_object().unwrap().len();
        assert_eq!(sent, input.elts.len(), "{name} has other parameters");
        // And it is read as it was meant.
        let incoming = Incoming { request: request.clone(), more: true, oneway: false };
        let text = frame(&incoming);
        assert_eq!(parse_request(text.strip_suffix(b"\0").unwrap()), Ok(incoming));
    }
    assert_eq!(requests.len(), idl.methods.len());
}
