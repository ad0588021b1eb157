//! What the host's configuration allows and gives, and selectors on the command line.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::attach::REFUSED;
use crate::plug::{Plugged, console};
use crate::precreate::{hooks, start as start_with_hook};
use crate::selectors::{HOOK_LOG, asks, listed};
use crate::support::podman::Container;
use crate::support::{Agent, CONFIGURATION, configure, grants, qm, unconfigure, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("policy::what_it_refuses_is_refused_at_start_and_later", what_it_refuses_is_refused_at_start_and_later),
    ("policy::a_reload_changes_what_it_concerns_and_nothing_else", a_reload_changes_what_it_concerns_and_nothing_else),
    ("policy::containers_get_what_root_gives_them", containers_get_what_root_gives_them),
];

pub(crate) const ONCE: &[CaseOnce] = &[
    ("policy::what_a_reload_ends_is_told", what_a_reload_ends_is_told),
    ("policy::a_selector_is_attached", a_selector_is_attached),
    ("policy::a_selector_is_waited_for", a_selector_is_waited_for),
    ("policy::what_is_no_selector_is_refused", what_is_no_selector_is_refused),
    ("policy::devices_are_listed_and_named", devices_are_listed_and_named),
];

/// The consoles 51 to 55 that the container has, by the nodes that are in its `/dev`.
fn consoles(c: &Container) -> Vec<u32> {
    (51..=55).filter(|n| c.look(&format!("/dev/vcsa{n}")).is_some()).collect()
}

const ASKS: &str = "subsystem=vc;devname=vcsa5?";

const POLICIES: &str = r#"[[policy]]
container = "qmh-denied-*"
deny = ["tty",
        "devname=vcsa51"]

[[policy]]
container = "qmh-listed-*"
allow = ["tty", "devname=vcsa5[25]"]

[[policy]]
cgroup = "/libpod_parent/*"
owner = 0
deny = ["devname=vcsa53"]

[[policy]]
owner = 4711
deny = ["subsystem=vc"]

[[policy]]
image = "localhost/qmh-*"
container = "*"
deny = ["devname=vcsa54"]
"#;

fn what_it_refuses_is_refused_at_start_and_later(runtime: &str) {
    configure(POLICIES);
    Container::make_image("localhost/qmh-image:1");
    let devices: Vec<Plugged> = (51..=55).map(console).collect();
    let names = ["denied", "listed", "image", "other"].map(|name| format!("qmh-{name}-{runtime}"));
    let options = [&*asks("x", ASKS)];
    let image = ["localhost/qmh-image:1"];
    let containers = [
        start_with_hook(runtime, &names[0], &options),
        start_with_hook(runtime, &names[1], &options),
        Container::try_start(&["--hooks-dir", &hooks()], runtime, &names[2], &options, &image, &["sleep", "1000"])
            .unwrap(),
        start_with_hook(runtime, &names[3], &options),
    ];
    let expected: [&[u32]; 4] = [&[52, 54, 55], &[52, 55], &[51, 52, 55], &[51, 52, 54, 55]];
    let reasons = [
        (0, 51, "the policy denies it: FILE:4: deny = \"devname=vcsa51\""),
        (0, 53, "the policy denies it: FILE:13: deny = \"devname=vcsa53\""),
        (1, 51, "the policy does not allow it: FILE:6: allow has nothing that matches"),
        (1, 53, "the policy denies it: FILE:13: deny = \"devname=vcsa53\""),
        (2, 54, "the policy denies it: FILE:22: deny = \"devname=vcsa54\""),
    ];
    let log = std::fs::read_to_string(HOOK_LOG).unwrap();
    for (at, expected) in expected.iter().enumerate() {
        assert_eq!(consoles(&containers[at]), *expected, "{} by the hook", names[at]);
        let processing = format!("container {} (", names[at]);
        let of_it = log.split("Processing QM").find(|part| part.contains(&processing)).unwrap();
        for (_, device, reason) in reasons.iter().filter(|(its, ..)| *its == at) {
            let line = format!("Not adding device: /dev/vcsa{device}: {}", reason.replace("FILE", CONFIGURATION));
            assert!(of_it.contains(&line), "{line} in {of_it}");
        }
    }
    // The agent is of the same opinion, of what is there and of what comes.
    let agent = Agent::start();
    let before = agent.log().len();
    let opinion = || containers.each_ref().map(consoles);
    let has_as_expected = || opinion().iter().zip(expected).all(|(has, expected)| *has == *expected);
    assert!(has_as_expected(), "{:?}", opinion());
    assert_eq!(grants().len(), 12);
    assert!(grants().iter().all(|grant| grant["origin"] == "start"), "{:?}", grants());
    devices.iter().for_each(Plugged::unplug);
    wait_for("all to go", || grants().is_empty() && opinion().iter().all(Vec::is_empty));
    devices.iter().for_each(Plugged::again);
    wait_for("all to be back", || grants().len() == 12 && has_as_expected());
    assert!(containers[2].opens("<>", "/dev/vcsa51"));
    let log = agent.log();
    for (at, device, reason) in reasons {
        let line = format!("/dev/vcsa{device} not granted by x: {}", reason.replace("FILE", CONFIGURATION));
        let is_it = |text: &&str| text.contains(&line) && text.contains(&names[at]);
        assert_eq!(log.lines().filter(is_it).count(), 1, "{line}, once for {} in\n{}", names[at], &log[before..]);
    }
}

fn a_reload_changes_what_it_concerns_and_nothing_else(runtime: &str) {
    let _devices = [console(51), console(52)];
    let asked = [&*asks("x", "devname=vcsa51;as=/dev/screen"), "--annotation=org.containers.qm.device.ttys=true"];
    let first = start_with_hook(runtime, "qmh-reload-1", &asked);
    let agent = Agent::start();
    let second = Container::start(runtime, "qmh-reload-2", &[&asks("y", "devname=vcsa5[12]")]);
    for c in [&first, &second] {
        c.past_the_filter("mknod /dev/byhand c 7 179").ok();
    }
    wait_for("what they ask for", || grants().len() == 11);
    let node = second.look("/dev/vcsa52").unwrap().ino();
    let untouched = |what: &str, since: usize| {
        assert_eq!(second.look("/dev/vcsa52").map(|found| found.ino()), Some(node), "{what}");
        let log = agent.log();
        let told = log[since..].lines().any(|line| line.contains("vcsa52"));
        assert!(!told, "{what}: a word about what stays in {}", &log[since..]);
    };
    let refused = |c: &Container| c.open("<", "/dev/byhand") == REFUSED.map_err(Into::into);
    let has = || (listed(&first).len(), listed(&second).len());

    let mut since = agent.log().len();
    configure("# no more of this\n[[policy]]\ndeny = ['devname=vcsa51', 'devname=tty3']\n");
    agent.reload();
    wait_for("what is denied to go", || has() == (7, 1));
    assert!(
        first.look("/dev/tty3").is_none()
            && first.look("/dev/screen").is_none()
            && second.look("/dev/vcsa51").is_none()
    );
    assert!(refused(&first) && refused(&second));
    let denied = format!("the policy denies it: {CONFIGURATION}:3: deny = \"devname=vcsa51\"");
    assert_eq!(agent.log()[since..].matches(&denied).count(), 2, "{}", &agent.log()[since..]);
    untouched("denied", since);

    // What is wrong is named, and changes nothing.
    for (text, problem) in [
        (
            "[[policy]]\ndeny = ['devname=vcsa52', 'nonsense']\n",
            "2:28: in \"nonsense\": there is no category 'nonsense'",
        ),
        ("\n[[policy]]\nallow = 3\n", "3:9: invalid type"),
        ("[[container]]\nmatch = 'x'\ndevices = []\nenabled = true\n", "4:1: unknown field `enabled`"),
    ] {
        since = agent.log().len();
        configure(text);
        agent.reload();
        let problem = format!("the configuration stays as it was: {CONFIGURATION}:{problem}");
        wait_for(&problem, || agent.log()[since..].contains(&problem));
        qm(&["status"]).ok();
        assert_eq!(has(), (7, 1), "{text}");
        untouched(text, since);
    }

    since = agent.log().len();
    configure("[[policy]]\ndeny = ['devname=vcsa53']\n");
    agent.reload();
    wait_for("what is allowed again to be back", || has() == (9, 2));
    assert!(first.opens("<>", "/dev/screen") && first.opens("<>", "/dev/tty3") && second.opens("<>", "/dev/vcsa51"));
    assert!(first.opens("<>", "/dev/byhand"), "what it has had from its start");
    untouched("allowed again", since);

    // What no policy allows is refused where that is so written.
    since = agent.log().len();
    configure("[[policy]]\ncontainer = '*-2'\nallow = ['devname=vcsa52']\n");
    let with_more = std::fs::read_to_string(CONFIGURATION).unwrap();
    configure(&format!("require-policy = true\n{with_more}"));
    agent.reload();
    wait_for("what no policy allows to go", || has() == (0, 1));
    let log = agent.log();
    for reason in [
        format!("no policy allows it: {CONFIGURATION}:1: require-policy = true"),
        format!("the policy does not allow it: {CONFIGURATION}:2: allow has nothing that matches"),
    ] {
        assert!(log[since..].contains(&reason), "{reason} in {}", &log[since..]);
    }
    untouched("required", since);
    let third = start_with_hook(runtime, &format!("qmh-reload-3-{runtime}"), &[&asks("x", "devname=vcsa51")]);
    assert!(third.look("/dev/vcsa51").is_none());
    let log = std::fs::read_to_string(HOOK_LOG).unwrap();
    assert!(log.contains(&format!("/dev/vcsa51: no policy allows it: {CONFIGURATION}:1")), "{log}");

    // An agent that cannot read the policy when it starts allows nothing until it can.
    agent.stop();
    configure("[[policy]]\ndeny = 'devname=vcsa51'\n");
    let agent = Agent::start();
    assert_eq!(has(), (0, 0));
    let reason = format!("what the policy says is not known, so nothing is allowed: {CONFIGURATION}:2:8: invalid type");
    assert!(agent.log().contains(&reason), "{}", agent.log());
    unconfigure();
    agent.reload();
    wait_for("all to be back", || has() == (9, 2));
    assert!(first.opens("<>", "/dev/screen") && first.opens("<>", "/dev/tty3") && second.opens("<>", "/dev/vcsa52"));
}

fn containers_get_what_root_gives_them(runtime: &str) {
    let (devices, agent) = ([console(51), console(52)], Agent::start());
    let plain = Container::start(runtime, "qmh-given-1", &[]);
    wait_for("the agent to know it", || qm(&["status", "--json"]).stdout.contains("\"containers\":1"));
    configure(
        "require-policy = true\n\
         [[policy]]\ndeny = ['subsystem=vc']\n\
         [[container]]\nmatch = 'podman:qmh-given-*'\ndevices = ['subsystem=vc,devname=vcsa5?,as=/dev/screen,access=r', 'devname=loop0']\n",
    );
    agent.reload();
    let after = Container::start(runtime, "qmh-given-0", &[]);
    let name = "subsystem=vc,devname=vcsa5?,as=/dev/screen,access=r";
    let screen = format!("/dev/screen /dev/vcsa51 rule:{name}");
    for c in [&plain, &after] {
        wait_for("what root gives", || listed(c).contains(&screen));
    }
    assert_eq!((plain.open("<", "/dev/screen"), plain.open(">", "/dev/screen")), (Ok(()), REFUSED.map_err(Into::into)));
    // Under a hook that is called for every container it is there at once; and to others it is not given.
    let hooked = start_with_hook(runtime, "qmh-given-2", &[&asks("x", "devname=vcsa52")]);
    let other = start_with_hook(runtime, "qmh-not-given-3", &[&asks("x", "devname=vcsa51")]);
    assert!(hooked.node("/dev/screen").is_some_and(|node| node.starts_with("c 7:179 ")));
    assert!(hooked.look("/dev/vcsa52").is_none() && other.look("/dev/vcsa51").is_none() && listed(&other).is_empty());
    devices[0].unplug();
    let screen = screen.replace("vcsa51", "vcsa52");
    for c in [&plain, &after, &hooked] {
        wait_for("the next one", || listed(c).contains(&screen));
    }
    // What is no longer given is taken back.
    configure("require-policy = true\n");
    agent.reload();
    wait_for("all to go", || grants().is_empty());
    assert!(plain.look("/dev/screen").is_none() && hooked.look("/dev/screen").is_none());
}

fn what_a_reload_ends_is_told() {
    configure("enable = ['uinput']\n");
    let agent = Agent::start();
    let c = Container::start("crun", "qmh-enabled", &["--annotation=org.containers.qm.device.uinput=true"]);
    wait_for("the agent to find it", || qm(&["ps"]).ok().contains("uinput"));
    let since = agent.log().len();
    configure("enable = []\n");
    agent.reload();
    let told =
        "annotation org.containers.qm.device.uinput ignored: a file in /etc/qm-hotplug/config.d has to enable it";
    wait_for(told, || agent.log()[since..].lines().any(|line| line.contains(told) && line.contains(&c.name)));
    agent.stop();
    unconfigure();
}

fn a_selector_is_attached() {
    let _agent = Agent::start();
    let c = Container::start("crun", "qmh-picks", &[]);
    let _devices = [console(51), console(52)];
    let both = "/dev/vcsa51 and /dev/vcsa52: make it narrower, or give --all";
    qm(&["attach", &c.name, "devname=vcsa5?"]).fails(4, &format!("'devname=vcsa5?' means 2 devices, {both}"));
    qm(&["attach", &c.name, "subsystem=vc,devname=vcsa5[3-9]"]).fails(4, "no device matches");
    qm(&["attach", &c.name, "devname=vcsa5?", "/dev/one", "--all"]).fails(2, "cannot all be at one path");
    qm(&["attach", &c.name, "devname=vcsa5?;as=/dev/one", "--all"]).fails(2, "leave DEST and as= out");
    assert!(grants().is_empty());
    let said = qm(&["attach", &c.name, "devname=vcsa5?", "--all"]).ok();
    assert_eq!(
        said,
        "qmh-picks: /dev/vcsa51 is /dev/vcsa51 with access rwm\nqmh-picks: /dev/vcsa52 is /dev/vcsa52 with access rwm\n"
    );
    let options = "devname=vcsa51,as=/dev/screen,mode=0640,uid=5,gid=6,access=r";
    qm(&["attach", &c.name, options]).ok();
    assert_eq!(c.node("/dev/screen").as_deref(), Some("c 7:179 5:6 0640"));
    let one = qm(&["attach", &c.name, options, "/dev/other", "--mode", "0600", "--json"]).ok();
    let one: serde_json::Value = serde_json::from_str(&one).unwrap();
    assert_eq!((&one["path"], &one["mode"], &one["access"]), (&"/dev/other".into(), &0o600.into(), &"r".into()));
    let all = qm(&["attach", &c.name, "devname=vcsa5?", "--all", "--json"]).ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&all).unwrap().as_array().unwrap().len(), 2);
    assert!(c.opens("<>", "/dev/vcsa52") && c.opens("<", "/dev/other"));
    assert_eq!(listed(&c).len(), 4);
    qm(&["detach", &c.name, "/dev/vcsa51"]).ok();
    assert_eq!(listed(&c).len(), 3, "the node that is named, not the others of the device");
}

fn a_selector_is_waited_for() {
    let c = Container::start("runc", "qmh-waits", &[]);
    let later = |number| {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(1));
            console(number)
        })
    };
    let started = Instant::now();
    qm(&["attach", "qmh-nobody", "devname=vcsa51", "--wait", "20s"]).fails(3, "no running container 'qmh-nobody'");
    assert!(started.elapsed() < Duration::from_secs(10), "at once: {:?}", started.elapsed());
    let started = Instant::now();
    qm(&["attach", &c.name, "devname=vcsa51", "--wait", "700ms"])
        .fails(6, "no device that matches 'devname=vcsa51' was plugged in within 700ms");
    assert!(started.elapsed() >= Duration::from_millis(700));
    // By a selector, by its own wait= with an agent, and by a path.
    let first = later(51);
    qm(&["attach", &c.name, "devname=vcsa51", "--wait", "30s"]).ok();
    assert!(c.opens("<>", "/dev/vcsa51"));
    let agent = Agent::start();
    let second = later(52);
    qm(&["attach", &c.name, "devname=vcsa52,wait=30s,as=/dev/screen"]).ok();
    let third = later(53);
    qm(&["attach", &c.name, "/dev/vcsa53", "/dev/path", "--wait", "30s"]).ok();
    assert!(c.opens("<>", "/dev/screen") && c.opens("<>", "/dev/path"));
    for device in [first, second, third] {
        device.join().unwrap().unplug();
    }
    wait_for("all to go", || grants().is_empty());
    agent.stop();
}

fn what_is_no_selector_is_refused() {
    let c = Container::start("runc", "qmh-wrong", &[]);
    for (selector, reason) in [
        ("devname=vcsa,as=screen", "column 17: 'screen' "),
        ("devname=vcsa,as=/etc/passwd", "is no plain path below /dev"),
        ("devname=vcsa,mode=1777", "permission bits in octal are expected"),
        ("devname=vcsa,access=x", "column 21"),
        ("devname=vcsa,uid=root", "'root' is no user's number"),
        ("devname=vcsa,gid=tty", "attach takes as, access, mode, uid, gid (a number) and wait"),
        ("devname=vcsa,required", "attach takes as"),
        ("devname=vcsa,exclusive", "attach takes as"),
        ("devname=vcsa,children", "attach takes as"),
        ("devname=vcsa,link=/dev/x", "attach takes as"),
        ("devname=vcsa,wait=61s", "'61s' is no time up to 60s"),
        ("devname=vcsa,as=/dev/a,as=/dev/b", "'as' is given twice"),
        ("devname=vcsa,nonsense=1", "there is no key 'nonsense'"),
        ("devname!=vcsa", "it does not say which devices"),
        ("as=/dev/x", "it does not say which devices"),
        ("tapes", "is neither a path nor a selector: column 1: there is no category 'tapes'"),
    ] {
        let line = qm(&["attach", &c.name, selector]).fails(2, reason);
        assert!(line.contains(selector), "{line}");
    }
    assert!(grants().is_empty());
    qm(&["devices", "nonsense=1"]).fails(2, "there is no key 'nonsense'");
    // A file that cannot be taken is not passed over in silence.
    configure("enable = ['tape']\n");
    let said = qm(&["devices", "devname=null"]);
    unconfigure();
    assert!(said.code == 0 && said.stderr.contains("passed over") && said.stderr.contains(CONFIGURATION), "{said:?}");
    qm(&["devices", "--annotation", "/dev/vcsa99"]).fails(4, "/dev/vcsa99");
    for (device, reason) in [
        ("/dev/kmsg", "it is the host itself"),
        ("/dev/loop1", "devices of its kind have to be asked for by their category"),
    ] {
        let said = qm(&["devices", "--annotation", device]);
        said.fails(5, &format!("no annotation asks for '{device}': {reason}"));
    }
}

fn devices_are_listed_and_named() {
    let _devices = [console(51), console(52), console(53)];
    let agent = Agent::start();
    let said = qm(&["devices", "subsystem=vc,devname=vcsa5?,devname!=vcsa53", "--json"]).ok();
    let all: Vec<serde_json::Value> = serde_json::from_str(&said).unwrap();
    let short: Vec<String> =
        all.iter().map(|one| format!("{} {}:{} {}", one["device"], one["major"], one["minor"], one["kind"])).collect();
    assert_eq!(short, ["\"/dev/vcsa51\" 7:179 \"char\"", "\"/dev/vcsa52\" 7:180 \"char\""]);
    assert_eq!((&all[0]["subsystem"], &all[0]["usb"]), (&"vc".into(), &serde_json::Value::Null));
    let table = qm(&["devices", "devname=vcsa5[12]"]).ok();
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines.len(), lines[0][0], &lines[1][..4]), (3, "DEVICE", &["/dev/vcsa51", "c", "7:179", "vc"][..]));
    assert!(qm(&["devices"]).ok().lines().count() > 10);

    // The annotation that is printed asks for just this one.
    let annotation = qm(&["devices", "--annotation", "/dev/vcsa52"]).ok();
    assert_eq!(annotation, "org.containers.qm.hotplug.vcsa52=subsystem=vc;devname=/dev/vcsa52\n");
    let c = Container::start("crun", "qmh-named", &[&format!("--annotation={}", annotation.trim())]);
    wait_for("its device", || listed(&c) == ["/dev/vcsa52 /dev/vcsa52 rule:vcsa52"]);
    assert_eq!((consoles(&c), c.opens("<>", "/dev/vcsa52")), (vec![52], true));
    let json = qm(&["devices", "--annotation", "/dev/vcsa51", "--json"]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["key"], "org.containers.qm.hotplug.vcsa51");
    assert_eq!(json["value"], "subsystem=vc;devname=/dev/vcsa51");
    agent.stop();
}
