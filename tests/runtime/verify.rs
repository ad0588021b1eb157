//! `explain` and `verify` on podman's containers.

use serde_json::{Value, json};

use crate::Case;
use crate::plug::{block, console, numbers, one_of_each};
use crate::state::observe;
use crate::support::podman::{Container, podman};
use crate::support::{Agent, Said, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("verify::what_is_granted_is_proven_until_it_is_detached", granted_until_detached),
    ("verify::what_is_unplugged_is_refused", what_is_unplugged),
    ("verify::a_device_is_not_touched", a_device_is_not_touched),
    ("verify::a_paused_container_is_refused", a_paused_container),
    ("verify::init_that_is_not_root", init_that_is_not_root),
    ("explain::a_container_without_a_grant", a_container_without_a_grant),
    ("explain::what_annotations_ask_for", what_annotations_ask_for),
    ("explain::selectors_links_and_policy", selectors_links_and_policy),
];

fn json(said: &Said) -> Value {
    serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

/// `verify --json` of one device: exit code, accessible, errno.
fn verify(c: &Container, device: &str) -> (i32, Value, Value) {
    let said = qm(&["verify", &c.name, device, "--json"]);
    let answers = json(&said);
    assert_eq!(answers.as_array().unwrap().len(), 1, "{said:?}");
    (said.code, answers[0]["accessible"].clone(), answers[0]["errno"].clone())
}

fn accessible() -> (i32, Value, Value) {
    (0, json!(true), json!(0))
}

fn refused(errno: i32) -> (i32, Value, Value) {
    (5, json!(false), json!(errno))
}

fn explain(c: &Container, device: &str) -> Value {
    json(&qm(&["explain", &c.name, device, "--json"]))
}

/// The texts of findings with that topic and verdict.
fn texts(explained: &Value, topic: &str, verdict: &str) -> Vec<String> {
    let findings = explained["findings"].as_array().unwrap().iter();
    let its = findings.filter(|finding| finding["topic"] == topic && finding["verdict"] == verdict);
    its.map(|finding| finding["text"].as_str().unwrap().to_owned()).collect()
}

fn granted_until_detached(runtime: &str) {
    let c = Container::start(runtime, "qmh-verify", &[]);
    for device in one_of_each(61) {
        let path = &device.path;
        assert_eq!(verify(&c, path), refused(1), "{path}");
        qm(&["attach", &c.name, path, "/dev/given"]).ok();
        for name in [path, "/dev/given"] {
            assert_eq!(verify(&c, name), accessible(), "{name}");
        }
        let before = observe(&[c.pid()]);
        assert_eq!(qm(&["verify", &c.name]).ok(), format!("{}: /dev/given is accessible (rw)\n", c.name));
        assert_eq!(qm(&["verify", &c.name, "--open"]).ok(), format!("{}: /dev/given was opened (rw)\n", c.name));
        assert_eq!(explain(&c, path)["accessible"], true);
        assert_eq!(observe(&[c.pid()]), before, "nothing is changed");
        qm(&["detach", &c.name, path]).ok();
        assert_eq!(verify(&c, path), refused(1), "{path}");
        c.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
        assert_eq!(verify(&c, "/dev/byhand"), refused(1));
        c.sh("rm /dev/byhand").ok();
        qm(&["verify", &c.name, path]).fails(5, "the device filter refuses rw");
    }
}

fn what_is_unplugged(runtime: &str) {
    let device = console(62);
    let c = Container::start(runtime, "qmh-unplugged", &[]);
    let agent = Agent::start();
    qm(&["attach", &c.name, &device.path]).ok();
    let numbers = device.numbers();
    assert_eq!(verify(&c, &device.path), accessible());
    device.unplug();
    wait_for("its node to go", || c.node(&device.path).is_none());
    qm(&["verify", &c.name, &device.path]).fails(4, &device.path);
    c.past_the_filter(&format!("mknod {} {numbers}", device.path)).ok();
    assert_eq!(verify(&c, &device.path), refused(1), "by the path inside");
    let said = explain(&c, &device.path);
    assert_eq!(texts(&said, "device", "bad").len(), 1, "{said}");
    agent.stop();

    // Without an agent right and node stay; what is proven is that nobody answers.
    c.sh(&format!("rm {}", device.path)).ok();
    device.again();
    qm(&["attach", &c.name, &device.path]).ok();
    device.unplug();
    assert_eq!(verify(&c, &device.path), (4, json!(false), json!(6)));
    qm(&["verify", &c.name]).fails(4, "is unplugged");
}

/// A number that no driver has: who gets as far as the driver hears ENXIO.
fn a_device_is_not_touched(runtime: &str) {
    let c = Container::start(runtime, "qmh-untouched", &["--device-cgroup-rule", "c 4000:* rw"]);
    c.past_the_filter("mknod /dev/nobody c 4000 7").ok();
    assert_eq!(c.open("<>", "/dev/nobody"), Err("No such device or address".into()), "the filter lets it pass");
    assert_eq!(verify(&c, "/dev/nobody"), accessible());
    let said = qm(&["verify", &c.name, "/dev/nobody", "--open", "--json"]);
    assert_eq!((said.code, &json(&said)[0]["errno"]), (4, &json!(6)), "{said:?}");

    // A console that nobody has opened yet has no screen: `/dev/vcsaN` comes with its first open(2).
    let screen = console(60);
    screen.unplug();
    qm(&["attach", &c.name, "/dev/tty60"]).ok();
    for _ in 0..3 {
        assert_eq!(verify(&c, "/dev/tty60"), accessible());
        assert_eq!(explain(&c, "/dev/tty60")["accessible"], true);
    }
    assert!(!screen.is_there(), "it was opened");
    qm(&["verify", &c.name, "/dev/tty60", "--open"]).ok();
    wait_for("its screen", || screen.is_there());
}

fn a_paused_container(runtime: &str) {
    let device = block(63);
    let c = Container::start(runtime, "qmh-frozen", &[]);
    qm(&["attach", &c.name, &device.path]).ok();
    podman(&["pause", &c.name]).ok();
    let (verified, explained) = (qm(&["verify", &c.name]), explain(&c, &device.path));
    podman(&["unpause", &c.name]).ok();
    let line = verified.fails(5, "it is frozen");
    assert!(line.contains("podman unpause"), "{line}");
    assert_eq!(explained["accessible"], Value::Null);
    assert!(texts(&explained, "container", "bad")[0].contains("podman unpause"), "{explained}");
    assert_eq!(verify(&c, &device.path), accessible());
}

fn init_that_is_not_root(runtime: &str) {
    let (closed, open) = (block(64).owned_by(0, 20, 0o600), block(65).owned_by(0, 20, 0o660));
    let c = Container::start(runtime, "qmh-user", &["--user", "1000", "--group-add", "20"]);
    for device in [&closed, &open] {
        qm(&["attach", &c.name, &device.path]).ok();
    }
    assert_eq!(verify(&c, &open.path), accessible());
    assert_eq!(c.open("<>", &open.path), Ok(()));
    assert_eq!(verify(&c, &closed.path), refused(13));
    assert_eq!(c.open("<>", &closed.path), Err("Permission denied".into()));
    let line = qm(&["verify", &c.name]);
    assert!(line.stdout.contains(&format!("{} is accessible", open.path)), "{line:?}");
    line.fails(5, "uid 1000 of its init may not: the node is 0600 0:20");
    let said = explain(&c, &closed.path);
    assert_eq!(texts(&said, "mode", "bad"), ["uid 1000 of its init may not: the node is 0600 0:20"]);
    assert!(said["advice"][0].as_str().unwrap().ends_with("with --mode, --uid or --gid"), "{said}");
}

fn a_container_without_a_grant(runtime: &str) {
    let c = Container::start(runtime, "qmh-without", &[]);
    let before = observe(&[c.pid()]);
    let said = explain(&c, "/dev/tty7");
    assert_eq!(observe(&[c.pid()]), before, "nothing is changed");
    let filter = texts(&said, "filter", "bad");
    assert_eq!(filter.len(), 1, "{said}");
    assert!(filter[0].starts_with(&format!("refused by the program of {} (", c.cgroup())), "{filter:?}");
    assert_eq!(texts(&said, "node", "bad"), ["/dev/tty7 is missing inside"]);
    assert_eq!(
        said["advice"],
        json!([
            "qm-hotplug attach qmh-without /dev/tty7, or start it with --annotation org.containers.qm.device.ttys=true"
        ])
    );
    let device = block(66);
    let given = Container::start(runtime, "qmh-device", &[&format!("--device={}:/dev/disk", device.path)]);
    let said = explain(&given, &device.path);
    assert_eq!((&said["accessible"], &said["path"]), (&json!(true), &json!("/dev/disk")));
    assert_eq!(verify(&given, &device.path), accessible());
    assert_eq!(numbers(&device.path), "b 7 66");
}

fn what_annotations_ask_for(runtime: &str) {
    let options = [
        "--annotation",
        "org.containers.qm.device.ttys=true",
        "--annotation",
        "org.containers.qm.device.video=yes",
        "--annotation",
        "org.containers.qm.device.usb=true",
    ];
    let c = Container::start(runtime, "qmh-asks", &options);
    let said = explain(&c, "/dev/tty7");
    assert_eq!(texts(&said, "rule", "good"), ["ttys (org.containers.qm.device.ttys): yes"]);
    let notes = texts(&said, "rule", "note");
    assert!(notes.contains(&"video (org.containers.qm.device.video): no, /dev/tty7 is not in this category".into()));
    assert!(notes.iter().any(|note| note.starts_with("org.containers.qm.device.usb ignored: a file in ")), "{notes:?}");
    assert!(said["advice"][0].as_str().unwrap().starts_with("start the agent"), "{said}");
    let agent = Agent::start();
    wait_for("the agent to grant it", || c.node("/dev/tty7").is_some());
    let said = explain(&c, "/dev/tty7");
    assert_eq!(said["accessible"], true, "{said}");
    assert_eq!(texts(&said, "grant", "good"), ["rwm at /dev/tty7, granted by its rule ttys"]);
    let answers = qm(&["verify", &c.name, "--json"]);
    assert_eq!((answers.code, json(&answers).as_array().unwrap().len()), (0, 8));
    agent.stop();
}

fn selectors_links_and_policy(runtime: &str) {
    let options = [
        "--annotation",
        "org.containers.qm.hotplug.console=subsystem=tty;devname=tty25;as=/dev/con;link=/dev/linked",
        "--annotation",
        "org.containers.qm.hotplug.other=subsystem=tty;devname=tty2[6-9]",
    ];
    let c = Container::start(runtime, "qmh-selects", &options);
    let agent = Agent::start();
    wait_for("the agent to grant it", || c.node("/dev/con").is_some() && c.look("/dev/linked").is_some());
    let said = explain(&c, "/dev/tty25");
    assert_eq!(texts(&said, "rule", "good"), ["console (org.containers.qm.hotplug.console): yes"], "{said}");
    assert_eq!(
        texts(&said, "rule", "note"),
        ["other (org.containers.qm.hotplug.other): no, the term devname=tty2[6-9] does not match"],
        "{said}"
    );
    assert_eq!((&said["accessible"], &said["path"]), (&json!(true), &json!("/dev/con")));
    // A link of ours is proven by its node.
    for name in ["/dev/con", "/dev/linked"] {
        assert_eq!(verify(&c, name), accessible(), "{name}");
    }
    let answers = json(&qm(&["verify", &c.name, "--json"]));
    let paths: Vec<&str> = answers.as_array().unwrap().iter().map(|it| it["path"].as_str().unwrap()).collect();
    assert_eq!(paths.len(), 5, "each node once: {paths:?}");
    agent.stop();

    let policy = Configuration::write("[[policy]]\ncontainer = \"qmh-selects\"\ndeny = [\"devname=tty30\"]\n");
    let denied = Container::start(
        runtime,
        "qmh-selects-2",
        &["--annotation", "org.containers.qm.hotplug.console=subsystem=tty;devname=tty30"],
    );
    let said = explain(&denied, "/dev/tty30");
    assert_eq!(texts(&said, "rule", "good").len(), 1, "the policy is for another one: {said}");
    drop(policy);
    let policy = Configuration::write("[[policy]]\ncontainer = \"qmh-selects-2\"\ndeny = [\"devname=tty30\"]\n");
    let said = explain(&denied, "/dev/tty30");
    let notes = texts(&said, "rule", "note");
    assert!(notes[0].contains("no, the policy denies it: ") && notes[0].contains("devname=tty30"), "{notes:?}");
    drop(policy);
}

/// A configuration of this host, in this test program's mount namespace alone; gone when dropped.
struct Configuration;

impl Configuration {
    fn write(text: &str) -> Configuration {
        std::fs::create_dir_all("/etc/qm-hotplug").unwrap();
        let (none, flags) = (None::<&str>, nix::mount::MsFlags::empty());
        nix::mount::mount(Some("none"), "/etc/qm-hotplug", Some("tmpfs"), flags, none).unwrap();
        std::fs::create_dir("/etc/qm-hotplug/config.d").unwrap();
        std::fs::write("/etc/qm-hotplug/config.d/test.toml", text).unwrap();
        Configuration
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        let _ = nix::mount::umount2("/etc/qm-hotplug", nix::mount::MntFlags::MNT_DETACH);
        // Only if it is empty, as we made it.
        let _ = std::fs::remove_dir("/etc/qm-hotplug");
    }
}
