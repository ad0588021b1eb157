//! Facts, and what is said of them.

use super::*;
use crate::core::annotation::{SEAT, rule};
use crate::core::category::Categories;
use crate::core::device::Device;
use crate::core::facts::tests::Tree;
use crate::core::plan::tests::device;
use crate::core::proof::Seen;

const RW: Access = Access::READ.union(Access::WRITE);

fn asks(pairs: &[(&str, &str)]) -> Vec<Ask> {
    let ask = |(key, value): &(&str, &str)| Ask {
        source: (*key).to_owned(),
        rule: rule(key, value, &Categories::default()).unwrap().map_err(|ignored| ignored.reason),
    };
    pairs.iter().map(ask).collect()
}

fn answer(filter: i32, user: i32) -> Answer {
    let number = device("/dev/ttyUSB0", 188, 0).number;
    let found = Found::Node(Seen { number, mode: 0o660, uid: 0, gid: 20, nodev: false });
    Answer { found, filter: Some(filter), user: Some(user), directory: false, open: None }
}

fn granted() -> Granted {
    Granted { access: Access::ALL, origin: "attached by hand".into(), manual: true, left_over: None }
}

/// Findings as `verdict topic: text`, then the advice.
fn told(change: impl FnOnce(&mut Situation<'_>)) -> (Vec<String>, Vec<String>) {
    let stick = device("/dev/ttyUSB0", 188, 0);
    let categories = Categories::default();
    let (tree, bounds) = (Tree::default(), Bounds::default());
    let known = Facts::new(&stick, &tree);
    let mut facts = Situation {
        container: "web",
        node: "/dev/ttyUSB0",
        device: Some(&known),
        in_use: None,
        subject: Subject { path: "/dev/ttyUSB0".into(), number: stick.number, access: RW, user: "uid 1000".into() },
        asks: vec![],
        bounds: &bounds,
        own_refusal: None,
        category: categories.named("ttyUSB").map(|category| &**category),
        grant: Some(granted()),
        agent: true,
        problem: None,
        filter: Filter { granted: Some(Access::ALL), marked: true, ..Filter::default() },
        answer: Ok(answer(0, 0)),
        label: None,
    };
    change(&mut facts);
    let explanation = explain(&facts);
    let expected = facts.answer.as_ref().ok().filter(|_| facts.problem.is_none());
    assert_eq!(explanation.accessible, expected.map(|answer| judge(&facts.subject, answer).code == 0));
    if explanation.accessible == Some(false) {
        assert!(!explanation.advice.is_empty(), "something is to be done: {explanation:?}");
        assert!(explanation.findings.iter().any(|finding| finding.verdict == Verdict::Bad), "{explanation:?}");
    }
    let line = |finding: &Finding| format!("{:?} {}: {}", finding.verdict, finding.topic, finding.text);
    (explanation.findings.iter().map(line).collect(), explanation.advice)
}

#[track_caller]
fn expect(change: impl FnOnce(&mut Situation<'_>), findings: &[&str], advice: &[&str]) {
    let (lines, told) = told(change);
    for finding in findings {
        assert!(lines.iter().any(|line| line == finding), "{finding:?} in {lines:#?}");
    }
    assert_eq!(told, advice);
}

fn judged(cgroup: &str, name: &str, id: u32, verdict: Alone) -> Judged {
    Judged { cgroup: cgroup.into(), name: name.into(), id, verdict }
}

#[test]
fn all_is_well() {
    let (lines, advice) = told(|_| {});
    assert_eq!(
        lines,
        [
            "Good device: /dev/ttyUSB0 is c 188:0 on the host",
            "Note rule: the container has no annotation that asks for devices",
            "Good grant: rwm at /dev/ttyUSB0, attached by hand",
            "Good filter: lets rw pass: our map grants rwm",
            "Good node: /dev/ttyUSB0 is c 188:0, 0660 0:20",
            "Good mode: uid 1000 of its init may",
        ]
    );
    assert_eq!(advice, [""; 0]);
}

#[test]
fn who_refuses_is_named_and_what_to_do() {
    expect(
        |facts| {
            facts.grant = None;
            facts.filter.granted = Some(Access::NONE);
            facts.filter.programs = vec![
                judged("/m.slice/c.scope", "", 123, Alone::Refuses),
                judged("/m.slice", "sd_devices", 7, Alone::Allows),
                judged("/", "guard", 8, Alone::Unknown("it uses maps".into())),
            ];
            facts.answer = Ok(Answer { filter: Some(1), ..Answer::none(Found::Missing) });
        },
        &[
            "Bad filter: refused by the program of /m.slice/c.scope (unnamed, id 123); no grant in our map",
            "Note filter: the program of / (guard) cannot be asked alone: it uses maps",
            "Bad node: /dev/ttyUSB0 is missing inside",
            "Note grant: none",
        ],
        &["qm-hotplug attach web /dev/ttyUSB0, or start it with --annotation org.containers.qm.device.ttyUSB=true"],
    );
    let (lines, _) = told(|facts| {
        facts.filter.programs =
            vec![judged("/a", "", 1, Alone::Refuses), judged("/", "", 2, Alone::Unknown("it uses maps".into()))];
    });
    assert!(
        lines
            .iter()
            .any(|line| line == "Note filter: refused by the program of /a (unnamed, id 1), lifted by our grant")
    );
    assert!(!lines.iter().any(|line| line.contains("asked alone")), "where it passes nobody needs to know: {lines:?}");
}

#[test]
fn what_is_granted_and_refused_all_the_same() {
    expect(
        |facts| {
            facts.filter.after = vec!["guard".into()];
            facts.answer = Ok(answer(1, 1));
        },
        &["Bad filter: guard at the cgroup root runs after ours and has the last word"],
        &["have whoever attached guard at the cgroup root detach it"],
    );
    expect(
        |facts| {
            (facts.filter.marked, facts.filter.below) = (false, true);
            facts.answer = Ok(answer(1, 1));
        },
        &["Bad filter: our mark is not in first place on its cgroup: the grant holds in that cgroup itself, not below"],
        &["systemctl restart qm-hotplug, which puts the mark back"],
    );
    expect(
        |facts| {
            facts.filter.granted = None;
            facts.answer = Ok(answer(1, 1));
        },
        &["Bad filter: refuses rw, and none of the programs does so alone; our program is not attached"],
        &["qm-hotplug detach web /dev/ttyUSB0, then qm-hotplug attach web /dev/ttyUSB0"],
    );
    expect(
        |facts| {
            facts.filter.granted = Some(Access::NONE);
            facts.filter.withdrawn = true;
            facts.grant.as_mut().unwrap().manual = false;
            facts.answer = Ok(answer(1, 1));
        },
        &["Bad filter: its right from the container's start is withdrawn until the device is granted again"],
        &["systemctl restart qm-hotplug, which compares what annotations ask for with what is there"],
    );
}

#[test]
fn what_a_runtime_gave_is_told_from_what_we_gave() {
    expect(
        |facts| {
            facts.grant = None;
            facts.filter.granted = None;
        },
        &["Good filter: lets rw pass, without us: our program is not attached"],
        &[],
    );
}

#[test]
fn node_mount_and_mode() {
    let other = |found| Ok(Answer { filter: Some(0), ..Answer::none(found) });
    expect(
        |facts| facts.answer = other(Found::Other("a FIFO")),
        &["Bad node: /dev/ttyUSB0 is a FIFO inside"],
        &["qm-hotplug detach web /dev/ttyUSB0, then qm-hotplug attach web /dev/ttyUSB0"],
    );
    expect(
        |facts| {
            facts.grant = None;
            facts.answer = other(Found::Other("a FIFO"));
        },
        &["Bad node: /dev/ttyUSB0 is a FIFO inside"],
        &[
            "qm-hotplug attach web /dev/ttyUSB0 DEST, with another path inside as DEST, or start it with --annotation org.containers.qm.device.ttyUSB=true",
        ],
    );
    expect(
        |facts| {
            facts.subject.path = "/dev/zigbee".into();
            facts.subject.number.minor = 4;
        },
        &["Bad node: /dev/zigbee is c 188:0, 0660 0:20, and not c 188:4"],
        &["qm-hotplug detach web /dev/zigbee, then qm-hotplug attach web /dev/ttyUSB0 /dev/zigbee"],
    );
    expect(
        |facts| facts.answer = Ok(answer(0, 13)),
        &["Bad mode: uid 1000 of its init may not: the node is 0660 0:20"],
        &["qm-hotplug detach web /dev/ttyUSB0, then qm-hotplug attach web /dev/ttyUSB0 with --mode, --uid or --gid"],
    );
    expect(
        |facts| {
            facts.grant = None;
            facts.answer = Ok(Answer { directory: true, ..answer(0, 13) });
        },
        &["Bad mode: uid 1000 of its init cannot reach the node's directory"],
        &["let its user reach the directory inside"],
    );
    expect(
        |facts| {
            if let Ok(Answer { found: Found::Node(seen), .. }) = &mut facts.answer {
                seen.nodev = true;
            }
        },
        &["Bad mount: /dev/ttyUSB0 is on a mount that is nodev inside"],
        &["qm-hotplug attach web /dev/ttyUSB0 DEST, with a path below /dev as DEST"],
    );
}

#[test]
fn what_stands_outside_of_the_filter() {
    expect(
        |facts| facts.answer = Err("it is frozen".into()),
        &["Bad container: it is frozen", "Note filter: not asked; our map grants rwm"],
        &[],
    );
    let (lines, advice) = told(|facts| facts.problem = Some("it has a user namespace".into()));
    assert_eq!(lines.last().unwrap(), "Bad container: it has a user namespace");
    assert_eq!(advice, [""; 0]);
    expect(
        |facts| {
            facts.device = None;
            facts.grant = None;
            facts.answer = Ok(Answer::none(Found::Missing));
        },
        &["Bad device: /dev/ttyUSB0 (c 188:0) is not plugged in"],
        &["plug /dev/ttyUSB0 in"],
    );
    for (label, text) in [
        ("unconfined", None),
        ("unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023", None),
        ("system_u:system_r:spc_t:s0", None),
        ("system_u:system_r:container_t:s0:c1,c2", Some("SELinux runs it as system_u:system_r:container_t:s0:c1,c2")),
        ("containers-default-0.50.1 (enforce)", Some("the AppArmor profile containers-default-0.50.1 (enforce) may")),
    ] {
        let (lines, _) = told(|facts| facts.label = Some(label.into()));
        let lsm = lines.iter().find_map(|line| line.strip_prefix("Note lsm: "));
        assert_eq!(lsm.is_some(), text.is_some(), "{label}");
        assert!(text.is_none_or(|text| lsm.unwrap().starts_with(text)), "{lsm:?}");
    }
}

#[test]
fn each_rule_says_why_it_does_not_match() {
    let why = |key: &str, value: &str, device: &Device| {
        why_not(asks(&[(key, value)])[0].rule.as_ref().unwrap(), &Facts::new(device, &Tree::default()))
    };
    let (stick, mem) = (device("/dev/ttyUSB0", 188, 0), device("/dev/mem", 1, 1));
    let mut disk = device("/dev/ttyUSB1", 8, 0);
    disk.number.kind = Kind::Block;
    let mut sound = device("/dev/snd/pcmC1D0p", 116, 3);
    sound.properties = [("ID_SEAT", "seat1"), ("CURRENT_TAGS", ":uaccess:")].map(|(k, v)| (k.into(), v.into())).into();
    let usb = "org.containers.qm.device.ttyUSB";
    let video = "org.containers.qm.device.video";
    for (key, value, device, expected) in [
        (usb, "true", &stick, None),
        (video, "true", &stick, Some("/dev/ttyUSB0 is not in this category")),
        (video, "true", &mem, Some("/dev/mem is the host itself, which no annotation grants")),
        (usb, "true", &disk, Some("/dev/ttyUSB1 is a block device")),
        ("org.containers.qm.hotplug.x", "tty;devname=ttyUSB*", &stick, None),
        (
            "org.containers.qm.hotplug.x",
            "subsystem=tty,devname=ttyACM*",
            &stick,
            Some("the term devname=ttyACM* does not match"),
        ),
        (SEAT, "seat1", &sound, None),
        (SEAT, "seat0", &sound, Some("/dev/snd/pcmC1D0p belongs to seat1")),
        (SEAT, "seat0", &stick, Some("udev assigns /dev/ttyUSB0 to no seat")),
        (SEAT, "seat0", &disk, Some("/dev/ttyUSB1 is a block device, which no seat has")),
    ] {
        assert_eq!(why(key, value, device).as_deref(), expected, "{key}={value} {}", device.node);
    }
    let mut uinput = device("/dev/uinput", 10, 223);
    uinput.properties = [("CURRENT_TAGS".into(), ":uaccess:".into())].into();
    assert_eq!(
        why(SEAT, "seat0", &uinput).as_deref(),
        Some("/dev/uinput is in the category uinput, which no seat brings")
    );
}

#[test]
fn rules_are_told_with_their_annotations_and_decide_the_advice() {
    let nothing = |facts: &mut Situation<'_>, agent: bool| {
        facts.grant = None;
        facts.agent = agent;
        facts.filter.granted = None;
        facts.answer = Ok(Answer { filter: Some(1), ..Answer::none(Found::Missing) });
        facts.asks = asks(&[
            ("org.containers.qm.device.ttyUSB", "true"),
            ("org.containers.qm.device.video", "1"),
            ("org.containers.qm.device.tape", "1"),
        ]);
    };
    expect(
        |facts| nothing(facts, false),
        &[
            "Good rule: ttyUSB (org.containers.qm.device.ttyUSB): yes",
            "Note rule: video (org.containers.qm.device.video): no, /dev/ttyUSB0 is not in this category",
            "Note rule: org.containers.qm.device.tape ignored: there is no category 'tape'",
        ],
        &["start the agent, which grants what annotations ask for: systemctl start qm-hotplug"],
    );
    expect(
        |facts| nothing(facts, true),
        &[],
        &["see why the agent has not granted it: journalctl -t qm-hotplug; or qm-hotplug attach web /dev/ttyUSB0"],
    );
    expect(
        |facts| {
            nothing(facts, true);
            facts.in_use = Some("it is mounted at /".into());
        },
        &["Bad device: no annotation gives it to a container now: it is mounted at /"],
        &["wait until it is free, or see to that"],
    );
    expect(
        |facts| {
            nothing(facts, true);
            facts.asks.clear();
            facts.category = None;
        },
        &[],
        &[
            "qm-hotplug attach web /dev/ttyUSB0, or start it with the annotation that `qm-hotplug devices --annotation /dev/ttyUSB0` prints",
        ],
    );
}
