//! `explain` and `verify` on what stands for a container.

use std::fs;
use std::os::fd::AsFd;

use nix::mount::MsFlags;
use qm_hotplug::core::device::Number;
use qm_hotplug::sys::bpf::{Program, attached};
use qm_hotplug::sys::cgroup::CgroupRoot;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use crate::stage::{
    ABSENT, Container, FULL, NULL, ZERO, allow_all, allow_only, deny_all, make_node, mount_tmpfs, programs,
    refuse_only, snapshot,
};
use crate::support::{Said, grants, qm};

pub const TESTS: &[(&str, fn())] = &[
    ("explain::the_cgroup_whose_program_refuses_is_named", the_cgroup_whose_program_refuses),
    ("explain::a_program_at_the_root_is_named", a_program_at_the_root),
    ("explain::what_is_granted_is_in_order", what_is_granted_is_in_order),
    ("explain::what_is_in_the_place_of_the_node_is_named", in_the_place_of_the_node),
    ("explain::what_cannot_be_explained_is_refused", what_cannot_be_explained),
    ("verify::all_grants_are_proven_and_nothing_is_changed", all_grants_are_proven),
    ("verify::no_driver_is_asked_without_open", no_driver_is_asked),
    ("verify::a_refusal_has_its_errno_and_code", a_refusal_has_its_errno_and_code),
    ("verify::a_frozen_container_is_refused", a_frozen_container),
];

/// A container with nodes of these names, whose cgroup has this program instead of one that refuses everything.
fn container(nodes: &[(&str, Number)], program: &Program) -> Container {
    let container = Container::prepared(|root| {
        for (name, number) in nodes {
            make_node(&root.join("dev").join(name), *number);
        }
    });
    for old in attached(container.cgroup.open().as_fd()).unwrap() {
        container.cgroup.detach(&old);
    }
    container.cgroup.attach(program);
    container
}

/// `explain --json`, with nothing changed by it.
#[track_caller]
fn explained(container: &Container, device: &str) -> Value {
    let root = CgroupRoot::find().unwrap();
    let before = (programs(root.as_fd()), container.cgroup.programs(), container.snapshot(), root.walk());
    let said = qm(&["explain", &container.name(), device, "--json"]).ok();
    let after = (programs(root.as_fd()), container.cgroup.programs(), container.snapshot(), root.walk());
    assert_eq!(before, after, "a look changes nothing, and the scratch cgroup is gone");
    serde_json::from_str(&said).unwrap()
}

/// The findings of one topic, as `verdict: text`.
fn of(explained: &Value, topic: &str) -> Vec<String> {
    let findings = explained["findings"].as_array().unwrap().iter().filter(|finding| finding["topic"] == topic);
    findings.map(|it| format!("{}: {}", it["verdict"].as_str().unwrap(), it["text"].as_str().unwrap())).collect()
}

/// `verify --json` with its exit code.
fn verified(container: &Container, more: &[&str]) -> (i32, Vec<Value>, Said) {
    let said = qm(&[&["verify", &container.name(), "--json"], more].concat());
    (said.code, serde_json::from_str(&said.stdout).unwrap_or_default(), said)
}

fn the_cgroup_whose_program_refuses() {
    let c = container(&[("full", FULL)], &allow_all());
    let inner = c.cgroup.child("inner");
    inner.attach(&allow_all());
    inner.put(c.actor.pid());
    let passes = explained(&c, "/dev/full");
    assert_eq!(passes["accessible"], true);
    assert_eq!(of(&passes, "filter"), ["good: lets rw pass, without us: our program is not attached"]);

    let named = refuse_only("sd_devices", FULL);
    for (cgroup, program, name) in
        [(&c.cgroup, &named, "sd_devices"), (&inner, &named, "sd_devices"), (&inner, &allow_only(NULL), "runtime")]
    {
        cgroup.attach(program);
        let refused = explained(&c, "/dev/full");
        assert_eq!(refused["accessible"], false);
        let expected = format!("bad: refused by the program of {} ({name}); our program is not attached", cgroup.path);
        assert_eq!(of(&refused, "filter"), [expected]);
        cgroup.detach(program);
    }
    // Both at once, and one without a name.
    c.cgroup.attach(&named);
    let nameless = refuse_only("", FULL);
    inner.attach(&nameless);
    let refused = explained(&c, "/dev/full");
    let filter = of(&refused, "filter");
    let unnamed = format!("{} (unnamed, id {})", inner.path, nameless.info().unwrap().id);
    assert_eq!(filter.len(), 2);
    assert!(filter[0].contains(&unnamed), "{filter:?}");
    assert!(filter[1].contains(&format!("{} (sd_devices)", c.cgroup.path)), "{filter:?}");
    let text = qm(&["explain", &c.name(), "/dev/full"]).ok();
    assert!(text.contains("\nfilter  refused by the program of ") && text.contains("\n→ qm-hotplug attach "), "{text}");
}

fn a_program_at_the_root() {
    let c = container(&[("full", FULL)], &allow_only(NULL));
    let root = CgroupRoot::find().unwrap();
    qm(&["attach", &c.name(), "/dev/full"]).ok();
    let guard = refuse_only("guard", FULL);
    guard.attach(root.as_fd()).unwrap();
    let said = std::panic::catch_unwind(|| explained(&c, "/dev/full"));
    guard.detach(root.as_fd()).unwrap();
    let said = said.unwrap();
    let filter = of(&said, "filter");
    assert_eq!(said["accessible"], false);
    assert!(filter.contains(&"bad: refused by the program of / (guard); our map grants rwm".into()), "{filter:?}");
    assert!(
        filter.contains(&"bad: guard at the cgroup root runs after ours and has the last word".into()),
        "{filter:?}"
    );
    assert_eq!(said["advice"], json!(["have whoever attached guard at the cgroup root detach it"]));
    assert_eq!(explained(&c, "/dev/full")["accessible"], true);
    qm(&["detach", &c.name(), "/dev/full"]).ok();
}

fn what_is_granted_is_in_order() {
    let c = container(&[], &deny_all());
    qm(&["attach", &c.name(), "/dev/full", "/dev/x", "--access", "r"]).ok();
    // By the device, by the path inside.
    for device in ["/dev/full", "/dev/x"] {
        let said = explained(&c, device);
        assert_eq!(
            (&said["accessible"], &said["path"], &said["device"]),
            (&json!(true), &json!("/dev/x"), &json!("/dev/full"))
        );
        assert_eq!(of(&said, "grant"), ["good: r at /dev/x, attached by hand"]);
        let by = format!("note: refused by the program of {} (runtime), lifted by our grant", c.cgroup.path);
        assert_eq!(of(&said, "filter"), ["good: lets r pass: our map grants r".to_owned(), by]);
        assert_eq!(of(&said, "mode"), ["good: uid 0 of its init may"]);
        assert_eq!(said["advice"], json!([]));
    }
    qm(&["detach", &c.name(), "/dev/x"]).ok();
    let said = explained(&c, "/dev/full");
    assert_eq!(of(&said, "node"), ["bad: /dev/full is missing inside"]);
    assert_eq!(of(&said, "grant"), ["note: none"]);
    let advice = said["advice"][0].as_str().unwrap();
    assert!(advice.starts_with(&format!("qm-hotplug attach {} /dev/full, or start it with ", c.name())), "{advice}");
}

fn in_the_place_of_the_node() {
    let c = container(&[("zero", ZERO)], &allow_all());
    mknodat(CWD, c.path("/dev/full"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    std::os::unix::fs::symlink("zero", c.path("/dev/null")).unwrap();
    for (device, what) in [("/dev/full", "is a FIFO inside"), ("/dev/null", "is a symbolic link inside")] {
        let said = explained(&c, device);
        assert_eq!(of(&said, "node"), [format!("bad: {device} {what}")]);
        let (code, answers, said) = verified(&c, &[device, "--open"]);
        assert_eq!(
            (code, &answers[0]["accessible"], &answers[0]["errno"]),
            (4, &json!(false), &Value::Null),
            "{said:?}"
        );
        assert!(said.stderr.contains(what), "{said:?}");
    }
    let nodev = Container::prepared(|root| {
        mount_tmpfs(&root.join("dev"), MsFlags::MS_NODEV);
        make_node(&root.join("dev/null"), NULL);
    });
    nodev.cgroup.detach(&attached(nodev.cgroup.open().as_fd()).unwrap()[0]);
    assert_eq!(of(&explained(&nodev, "/dev/null"), "mount"), ["bad: /dev/null is on a mount that is nodev inside"]);
    let (code, answers, said) = verified(&nodev, &["/dev/null"]);
    assert_eq!((code, &answers[0]["errno"]), (5, &json!(13)), "{said:?}");
    assert!(said.stderr.contains("nodev"), "{said:?}");
}

fn what_cannot_be_explained() {
    let c = container(&[], &allow_all());
    for command in ["explain", "verify"] {
        qm(&[command, "nobody", "/dev/null"]).fails(3, "nobody");
        qm(&[command, &c.name(), "/dev/ttyUSB99"]).fails(4, "/dev/ttyUSB99");
        qm(&[command, &c.name(), "/dev"]).fails(4, "a directory");
        qm(&[command, "pid:1", "/dev/null"]).fails(5, "pid:1");
        qm(&[command, &c.name(), ""]).fails(2, "device");
    }
}

fn all_grants_are_proven() {
    let c = container(&[], &deny_all());
    assert_eq!(verified(&c, &[]).1, [Value::Null; 0]);
    assert_eq!(qm(&["verify", &c.name()]).ok(), format!("{}: nothing is granted\n", c.name()));
    qm(&["attach", &c.name(), "/dev/full"]).ok();
    qm(&["attach", &c.name(), "/dev/zero", "/dev/z", "--access", "r"]).ok();
    qm(&["attach", &c.name(), "/dev/null", "/dev/m", "--access", "m"]).ok();
    let before = (c.snapshot(), c.cgroup.programs(), snapshot("/run/qm-hotplug".as_ref()), grants());
    let (code, answers, said) = verified(&c, &[]);
    assert_eq!((code, answers.len()), (0, 3), "{said:?}");
    let answer = |path: &str| answers.iter().find(|it| it["path"] == path).unwrap().clone();
    let full = answer("/dev/full");
    assert_eq!(
        full,
        json!({
            "container": c.name(), "id": c.name(), "path": "/dev/full", "device": "/dev/full", "kind": "char",
            "major": 1, "minor": 7, "access": "rw", "accessible": true, "errno": 0, "reason": null, "opened": false,
            "code": 0,
        })
    );
    assert_eq!((&answer("/dev/z")["access"], &answer("/dev/z")["errno"]), (&json!("r"), &json!(0)));
    assert_eq!((&answer("/dev/m")["accessible"], &answer("/dev/m")["errno"]), (&Value::Null, &Value::Null));
    let (code, answers, _) = verified(&c, &["/dev/z", "--open"]);
    assert_eq!((code, &answers[0]["opened"]), (0, &json!(true)));
    assert_eq!((c.snapshot(), c.cgroup.programs(), snapshot("/run/qm-hotplug".as_ref()), grants()), before);
    assert_eq!(qm(&["verify", &c.name(), "/dev/z"]).ok(), format!("{}: /dev/z is accessible (r)\n", c.name()));
    for path in ["/dev/full", "/dev/z", "/dev/m"] {
        qm(&["detach", &c.name(), path]).ok();
    }
}

/// A number without a driver: who gets to the driver gets ENXIO.
fn no_driver_is_asked() {
    let c = container(&[("absent", ABSENT)], &allow_only(ABSENT));
    let (code, answers, said) = verified(&c, &["/dev/absent"]);
    assert_eq!((code, &answers[0]["errno"], &answers[0]["major"]), (0, &json!(0), &json!(4000)), "{said:?}");
    let (code, answers, said) = verified(&c, &["/dev/absent", "--open"]);
    assert_eq!((code, &answers[0]["errno"], &answers[0]["opened"]), (4, &json!(6), &json!(false)), "{said:?}");
}

fn a_refusal_has_its_errno_and_code() {
    let c = container(&[("full", FULL), ("zero", ZERO)], &deny_all());
    let (code, answers, said) = verified(&c, &["/dev/full"]);
    assert_eq!((code, &answers[0]["errno"], &answers[0]["accessible"]), (5, &json!(1), &json!(false)), "{said:?}");
    let hint = format!("qm-hotplug explain {} /dev/full", c.name());
    assert!(said.stderr.contains("the device filter refuses rw") && said.stderr.contains(&hint), "{said:?}");
    qm(&["attach", &c.name(), "/dev/full"]).ok();
    assert_eq!(verified(&c, &["/dev/full"]).0, 0);
    // Of a grant that no longer is what it was.
    fs::remove_file(c.path("/dev/full")).unwrap();
    let (code, answers, said) = verified(&c, &[]);
    assert_eq!((code, &answers[0]["errno"]), (4, &json!(2)), "{said:?}");
    qm(&["detach", &c.name(), "/dev/full"]).ok();
    // Detached: no node and no right.
    let (code, answers, said) = verified(&c, &["/dev/full"]);
    assert_eq!((code, &answers[0]["errno"]), (5, &json!(1)), "{said:?}");
}

fn a_frozen_container() {
    let c = container(&[("full", FULL)], &allow_all());
    let freeze = c.cgroup.directory().join("cgroup.freeze");
    fs::write(&freeze, "1").unwrap();
    let started = std::time::Instant::now();
    let said = qm(&["verify", &c.name(), "/dev/full"]);
    let explained = explained(&c, "/dev/full");
    fs::write(&freeze, "0").unwrap();
    let line = said.fails(5, "frozen");
    assert!(line.contains(&c.cgroup.path) && line.contains("podman unpause"), "{line}");
    assert_eq!(explained["accessible"], Value::Null);
    assert!(of(&explained, "container")[0].contains("frozen"));
    assert!(started.elapsed() < std::time::Duration::from_secs(2), "nobody waited for it");
    assert_eq!(verified(&c, &["/dev/full"]).0, 0);
}
