//! Configuration files read together, and policies put to devices.

use super::*;
use crate::core::facts::Facts;
use crate::core::facts::tests::{bench, of_bench};
use crate::core::operator::Caller;

fn settings(files: &[&str]) -> (Settings, Vec<String>) {
    let files = files.iter().enumerate().map(|(at, text)| (format!("/etc/{at}.toml"), Ok((*text).to_owned())));
    Settings::read(&files.collect::<Vec<_>>())
}

fn subject(name: &str) -> Subject {
    Subject {
        engine: "podman",
        names: vec![name.to_owned(), "9414c2935ef0".into()],
        is_nameless: false,
        image: Some("docker.io/library/alpine:3".into()),
        owner: 0,
        is_users: false,
        cgroup: "/machine.slice/libpod-9414c2935ef0.scope".into(),
    }
}

/// Why the policies of these files refuse a container of that name this node.
fn refusal(files: &[&str], name: &str, node: &str) -> Option<String> {
    let (settings, problems) = settings(files);
    assert_eq!(problems, [""; 0]);
    let tree = bench();
    settings.policies.bounds(&subject(name)).refusal(&Facts::new(of_bench(&tree, node), &tree))
}

#[test]
fn without_a_policy_all_is_allowed() {
    assert_eq!(refusal(&[], "web", "/dev/ttyUSB1"), None);
    assert_eq!(refusal(&["require-policy = false"], "web", "/dev/ttyUSB1"), None);
    assert_eq!(refusal(&["[[policy]]\ncontainer = 'db'\nallow = []"], "web", "/dev/ttyUSB1"), None);
}

#[test]
fn a_refusal_names_file_and_line() {
    let file =
        "# bounds\n\n[[policy]]\ncontainer = 'web*'\nallow = ['tty']\ndeny = [\n  'video',\n  'serial=A1B2',\n]\n";
    assert_eq!(
        refusal(&["", file], "web", "/dev/ttyUSB1").unwrap(),
        "the policy denies it: /etc/1.toml:8: deny = \"serial=A1B2\""
    );
    assert_eq!(refusal(&["", file], "web", "/dev/ttyUSB10"), None);
    assert_eq!(
        refusal(&["", file], "web", "/dev/hidraw0").unwrap(),
        "the policy does not allow it: /etc/1.toml:3: allow has nothing that matches"
    );
    let more = "[[policy]]\nallow = ['hidraw']";
    assert_eq!(refusal(&["", file, more], "web", "/dev/hidraw0"), None, "one that allows is enough");
    assert!(refusal(&["", file, more], "web", "/dev/ttyUSB1").is_some(), "one that denies is enough");
    assert_eq!(
        refusal(&["\nrequire-policy = true", file], "db", "/dev/ttyUSB1").unwrap(),
        "no policy allows it: /etc/0.toml:2: require-policy = true"
    );
}

#[test]
fn all_conditions_of_a_policy_must_fit() {
    for (conditions, is_for) in [
        ("", true),
        ("container = 'w?b'", true),
        ("container = '9414*'", true),
        ("container = 'we'", false),
        ("image = '*/alpine:*'", true),
        ("image = 'alpine'", false),
        ("owner = 0", true),
        ("owner = 1000", false),
        ("cgroup = '/machine.slice/*'", true),
        ("cgroup = '/machine.slice'", true),
        ("cgroup = '/machine'", false),
        ("cgroup = '/user.slice/*'", false),
        ("container = 'web'\nowner = 1000", false),
    ] {
        let file = format!("[[policy]]\n{conditions}\ndeny = ['tty']");
        assert_eq!(refusal(&[&file], "web", "/dev/ttyUSB1").is_some(), is_for, "{conditions}");
    }
}

#[test]
fn where_a_name_decides_that_is_not_known_nothing_is_allowed() {
    let refused = |file: &str, subject: &Subject| {
        let (settings, tree) = (settings(&[file]).0, bench());
        settings.policies.bounds(subject).refusal(&Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree))
    };
    let nameless = Subject { names: vec!["9414c2935ef0".into()], is_nameless: true, image: None, ..subject("") };
    let by_name = "[[policy]]\ncontainer = 'web*'\ndeny = ['video']";
    let by_image = "[[policy]]\nimage = 'x'\ncontainer = 'web*'\ndeny = ['video']";
    assert!(refused(by_name, &nameless).unwrap().contains("/etc/0.toml:1: the container's name or image"));
    assert_eq!(refused(by_name, &subject("web")), None);
    assert_eq!(refused(by_name, &Subject { names: vec!["web".into()], ..nameless.clone() }), None);
    assert!(refused(by_image, &Subject { image: None, ..subject("web") }).is_some());
    assert_eq!(refused(by_image, &Subject { image: None, ..subject("db") }), None, "the name decides");
    assert_eq!(refused("[[policy]]\nowner = 1\ncontainer = 'x'\ndeny = ['tty']", &nameless), None);
    assert_eq!(refused("[[policy]]\ndeny = ['video']", &nameless), None);
}

#[test]
fn containers_get_rules_without_asking() {
    let file = "[[container]]\nmatch = 'podman:home-*'\ndevices = ['tty,as=/dev/zigbee', 'usb']";
    let (settings, problems) = settings(&[file]);
    assert_eq!(problems, [""; 0]);
    let rules = settings.rules_for(&subject("home-assistant"));
    assert_eq!(rules.iter().map(ToString::to_string).collect::<Vec<_>>(), ["tty,as=/dev/zigbee", "usb"]);
    assert!(rules.iter().all(|rule| !rule.is_bounded()));
    assert_eq!(settings.rules_for(&subject("web")), []);
}

#[test]
fn names_of_one_engine_alone() {
    let rules = |pattern: &str, engine: &'static str, name: &str| {
        let (settings, problems) = settings(&[&format!("[[container]]\nmatch = '{pattern}'\ndevices = ['tty']")]);
        assert_eq!(problems, [""; 0]);
        settings.rules_for(&Subject { engine, ..subject(name) }).len()
    };
    for (pattern, engine, name, count) in [
        ("lxc:web-*", "lxc", "web-1", 1),
        ("lxc:web-*", "podman", "web-1", 0),
        ("lxc:web-*", "lxc", "web", 0),
        ("web-*", "nspawn", "web-1", 1),
        ("containerd:k8s.io/*", "containerd", "k8s.io/web", 1),
        ("docker:*", "docker", "web", 1),
    ] {
        assert_eq!(rules(pattern, engine, name), count, "{pattern} {engine} {name}");
    }
    let denied = |engine: &'static str, is_nameless: bool| {
        let (settings, tree) = (settings(&["[[policy]]\ncontainer = 'docker:web'\ndeny = ['tty']"]).0, bench());
        let subject = Subject { engine, is_nameless, ..subject(if is_nameless { "" } else { "web" }) };
        settings.policies.bounds(&subject).refusal(&Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree)).is_some()
    };
    assert!(denied("docker", false) && !denied("podman", false));
    assert!(denied("docker", true) && !denied("podman", true), "a name that is not known may be this one");
}

#[test]
fn a_category_of_any_file_can_be_named() {
    let (settings, problems) =
        settings(&["[[container]]\nmatch = 'x'\ndevices = ['robot']", "[category.robot]\nnodes = ['/dev/robot#']"]);
    assert_eq!((settings.rules_for(&subject("x")).len(), problems.len()), (1, 0));
}

#[test]
fn a_bad_file_is_passed_over_whole() {
    for (file, problem) in [
        (
            "enable = ['kvm']\n[[container]]\nmatch = 'x'\ndevices = ['tty', 'tape']",
            "4:20: in \"tape\": there is no category 'tape'",
        ),
        ("[[container]]\nmatch = 'vm:x'\ndevices = []", "2:10: in \"vm:x\": 'vm:' is not known"),
        ("[[container]]\nmatch = 'x['\ndevices = []", "2:11: in \"x[\": a '['"),
        ("[[container]]\nmatch = 'podman:ü['\ndevices = []", "2:18: in \"podman:ü[\": a '['"),
        ("[[container]]\ndevices = []", "1:1: missing field `match`"),
        ("enable = ['kvm', 'tape']", "1:18: there is no category 'tape' to enable"),
        ("[category.robot]\nnodes = ['/dev/a', '/etc/x']", "2:20: in category 'robot': '/etc/x' does not begin"),
        ("\n[category.video]\nnodes = []", "2:11: there is a category 'video' already"),
        ("enable = ['kvm']\n enabled = []", "2:2: unknown field `enabled`"),
        ("enable = [\"kvm\",\n  3]", "2:3: invalid type"),
        ("enable = ['kvm'\nx = 1", "2:1: "),
        ("[[container]]\nmatch = 'x'\ndevices = [\"t\\u0061pe\"]", "3:12: in \"tape\", character 1: there is no"),
        ("[[container]]\nmatch = 'x'\ndevices = ['''\ntty,\nusb==''']", "5:5: in "),
        (
            "[category.robot]\nnodes = ['/dev/robot#']\n[[container]]\nmatch = 'x'\ndevices = ['robot,as=x']",
            "5:22: in \"robot,as=x\": ",
        ),
    ] {
        let (settings, problems) = settings(&[file, "[category.other]\nnodes = ['/dev/other']"]);
        assert!(problems.len() == 1 && problems[0].starts_with(&format!("/etc/0.toml:{problem}")), "{problems:?}");
        assert!(settings.categories.named("robot").is_none() && settings.categories.named("other").is_some(), "{file}");
        assert_eq!(settings.policies.unreadable, None);
    }
}

#[test]
fn an_unreadable_policy_allows_nothing() {
    for file in [
        "[[policy]]\nallow = ['tape']",
        "[[policy]]\nallow = ['tty,as=/dev/x']",
        "require-policy = 3",
        "[[policy]]\nalow = []",
    ] {
        let (settings, problems) = settings(&[file]);
        assert_eq!(problems.len(), 1, "{file}");
        let tree = bench();
        let reason =
            settings.policies.bounds(&subject("web")).refusal(&Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree));
        assert!(reason.unwrap().contains("/etc/0.toml:"), "{file}");
    }
    let (settings, _) = Settings::read(&[("/etc/0.toml".into(), Err("Permission denied".into()))]);
    assert!(settings.policies.unreadable.is_some());
}

#[test]
fn a_user_cannot_take_a_name_that_gets_something() {
    let file =
        "[[container]]\nmatch = 'MATCH'\ndevices = ['ttyUSB']\n[[policy]]\ncontainer = 'MATCH'\ndeny = ['ttyUSB']";
    let tree = bench();
    let facts = Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree);
    for (pattern, is_given, is_bound) in [
        ("web", false, false),
        ("*web", false, true),
        ("*", false, true),
        ("podman:*", false, true),
        ("lxc:*@web", false, false),
        ("*@web", true, true),
        ("alice@web", true, true),
        ("podman:alice@*", true, true),
        ("1000@9414*", true, true),
        ("bob@web", false, false),
    ] {
        let (settings, problems) = settings(&[&file.replace("MATCH", pattern)]);
        assert_eq!(problems, [""; 0]);
        let names = vec!["alice@web".into(), "1000@9414c2935ef0".into()];
        let its = Subject { names, owner: 1000, is_users: true, ..subject("") };
        assert_eq!(settings.rules_for(&its).len(), usize::from(is_given), "{pattern}");
        assert_eq!(settings.policies.bounds(&its).refusal(&facts).is_some(), is_bound, "{pattern}");
    }
}

#[test]
fn operators_may_what_is_written() {
    let (settings, problems) =
        settings(&["[[operator]]\nuser = 'ann'\ncontainer = 'cam-*'\nallow = ['devname=/dev/ttyUSB1']\n\
         [[operator]]\ngroup = 44\nallow = ['hidraw']"]);
    assert_eq!(problems, [""; 0]);
    let tree = bench();
    for (uid, name, groups, container, node, expected) in [
        (7, "ann", &[][..], "cam-1", Some("/dev/ttyUSB1"), true),
        (7, "ann", &[], "cam-1", Some("/dev/hidraw0"), false),
        (7, "ann", &[], "web", Some("/dev/ttyUSB1"), false),
        (7, "bob", &[], "cam-1", Some("/dev/ttyUSB1"), false),
        (7, "bob", &[44], "web", Some("/dev/hidraw0"), true),
        (44, "bob", &[45], "web", Some("/dev/hidraw0"), false),
        // What is gone may be taken back.
        (7, "ann", &[], "cam-1", None, true),
        (7, "ann", &[], "web", None, false),
    ] {
        let groups = groups.iter().map(|gid| (*gid, None)).collect();
        let caller = Caller { uid, name: Some(name.to_owned()), groups };
        let facts = node.map(|node| Facts::new(of_bench(&tree, node), &tree));
        let his = || settings.operators.iter().filter(|its| its.is(&caller));
        let may = his().any(|its| its.may(&subject(container), facts.as_ref()));
        assert_eq!(may, expected, "{name} {container} {node:?}");
        // A user's container is nobody's, whatever name he gave it.
        let users = Subject { is_users: true, owner: 1000, ..subject(container) };
        assert!(!his().any(|its| its.may(&users, facts.as_ref())));
    }
}

#[test]
fn an_operator_is_a_user_or_a_group() {
    for (text, problem) in [
        ("[[operator]]\nallow = []", "/etc/0.toml:1:1: an operator is a user or a group"),
        ("[[operator]]\nuser = 1\ngroup = 2\nallow = []", "/etc/0.toml:1:1: an operator is a user or a group"),
        ("[[operator]]\nuser = 1", "missing field `allow`"),
        ("[[operator]]\nuser = 1\nallow = ['bad=']", "/etc/0.toml:3:"),
    ] {
        let (_, problems) = settings(&[text]);
        assert!(problems.len() == 1 && problems[0].contains(problem), "{text}: {problems:?}");
    }
}
