use super::*;
use crate::core::container::Runtime;
use crate::core::facts::tests::{bench, of_bench};

fn container(runtime: Runtime, id: &str, name: Option<&str>) -> Container {
    Container {
        id: id.into(),
        name: name.map(Into::into),
        runtime,
        pid: 1,
        start_time: 1,
        cgroup: None,
        annotations: Default::default(),
        devices: Vec::new(),
        bundle: None,
        image: None,
        owner: 0,
    }
}

fn texts(offers: &[Offer]) -> Vec<&str> {
    offers.iter().map(|offer| offer.text.as_str()).collect()
}

#[test]
fn a_container_is_offered_by_what_means_it_alone() {
    let long = "ab".repeat(32);
    let all = [
        container(Runtime::Crun, "c1", Some("web")),
        container(Runtime::Docker, "d1", Some("web")),
        container(Runtime::Runc, "r1", Some("app")),
        container(Runtime::Crun, &long, None),
    ];
    let offered = |typed: &str| texts(&containers(&all, typed)).join(" ");
    assert_eq!(offered(""), "abababababab app docker:web podman:web");
    assert_eq!(offered("podman:"), format!("podman:{long} podman:app podman:web"));
    assert_eq!(offered("docker:w"), "docker:web");
    assert_eq!(offered("r"), "r1", "the beginning of an id");
    assert_eq!(offered("abab"), "abababababab");
    assert_eq!(containers(&all, "app"), [Offer::new("app", "podman r1")]);
    let words = |last: &str| ["qm-hotplug", "detach", last].map(String::from);
    for (word, id) in [("app", Some("r1")), ("docker:web", Some("d1")), ("web", None), ("lxc5:web", None)] {
        assert_eq!(container_among(&all, &words(word)).map(|one| one.id.as_str()), id, "{word}");
    }
}

#[test]
fn a_selector_goes_on_with_what_devices_have() {
    let tree = bench();
    let facts = ["/dev/ttyUSB1", "/dev/ttyUSB10", "/dev/hidraw0"].map(|node| Facts::new(of_bench(&tree, node), &tree));
    let offered = |typed: &str| selector(&Categories::default(), &facts, typed);
    let first = offered("");
    for word in ["ttyUSB", "block", "usb=", "serial=", "parent=", "attrs."] {
        assert!(texts(&first).contains(&word), "{word}");
    }
    assert_eq!(texts(&offered("tty;se"))[0], "tty;audio", "what does not fit is left out later");
    assert_eq!(texts(&offered("usb=")), ["usb=0627:0001", "usb=10c4:ea60"]);
    assert_eq!(texts(&offered("tty,serial=A")), ["tty,serial=A1B2", "tty,serial=C3D4"]);
    assert_eq!(texts(&offered("parent=(port!=")), ["parent=(port!=1-1.1", "parent=(port!=1-1.2", "parent=(port!=1-2"]);
    assert_eq!(texts(&offered("nothing=")), [""; 0]);
}

#[test]
fn what_a_shell_would_take_apart_is_not_plain() {
    for (text, expected) in [
        ("podman:web", true),
        ("alice@web", true),
        ("/dev/serial/by-id/usb-1a86_USB2.0-Serial-if00-port0", true),
        ("usb=10c4:ea60,serial=A1B2", true),
        ("", true),
        ("a;reboot", false),
        ("$(reboot)", false),
        ("a b", false),
        ("by-id\\x20x", false),
    ] {
        assert_eq!(is_plain(text), expected, "{text}");
    }
}
