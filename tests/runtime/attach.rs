//! `attach` and `list` on running containers, without an agent.

use serde_json::json;

use crate::Case;
use crate::plug::{block, console, one_of_each};
use crate::state::{entries, entries_of, observe, programs_on};
use crate::support::podman::{Container, podman};
use crate::support::{grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("attach::opens_what_the_filter_refused_before", opens_what_the_filter_refused_before),
    ("attach::other_containers_and_the_host_stay_as_they_were", other_containers_and_the_host_stay_as_they_were),
    ("attach::owner_and_mode_as_asked_for", owner_and_mode_as_asked_for),
    ("attach::destination_in_missing_directories", destination_in_missing_directories),
    ("attach::access_is_only_what_was_given", access_is_only_what_was_given),
    ("attach::links_are_followed", links_are_followed),
    ("attach::twice_is_once", twice_is_once),
    ("attach::two_destinations_of_one_device", two_destinations_of_one_device),
    ("attach::every_way_to_name_a_container", every_way_to_name_a_container),
    ("attach::list_shows_what_is_in_force", list_shows_what_is_in_force),
    ("attach::a_dry_run_tells_and_does_nothing", a_dry_run_tells_and_does_nothing),
    ("attach::a_paused_container_has_it_when_it_goes_on", a_paused_container_has_it_when_it_goes_on),
];

/// What the device filter answers.
pub(crate) const REFUSED: Result<(), &str> = Err("Operation not permitted");

fn opens_what_the_filter_refused_before(runtime: &str) {
    let c = Container::start(runtime, "qmh-attach", &[]);
    for device in one_of_each(41) {
        let device = device.owned_by(7, 8, 0o640);
        let path = &device.path;
        // With a node that came by another way it is seen that the filter refuses, not a missing node.
        c.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
        assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into), "{path}");
        assert_eq!(c.node(path), None);

        let said = qm(&["attach", &c.name, path]);
        assert_eq!(said.stderr, "no agent: stays until detach; an unplug is not followed\n");
        said.ok();
        assert_eq!(c.node(path), Some(device.describe()), "numbers, owner and mode are the host's");
        assert_eq!(c.open("<>", path), Ok(()));
        assert_eq!(c.open("<>", "/dev/byhand"), Ok(()));

        qm(&["detach", &c.name, path]).ok();
        assert_eq!(c.node(path), None);
        assert_eq!(c.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into), "{path}");
        c.sh("rm /dev/byhand").ok();
    }
}

fn other_containers_and_the_host_stay_as_they_were(runtime: &str) {
    let (device, second) = (block(42), block(43));
    let (c, other) = (Container::start(runtime, "qmh-one", &[]), Container::start(runtime, "qmh-other", &[]));
    other.past_the_filter(&format!("mknod /dev/byhand {}", device.numbers())).ok();
    let (mine, others) = (programs_on(&c.cgroup()), programs_on(&other.cgroup()));
    assert!(!mine.is_empty(), "the runtime's filter");
    let host = std::fs::read_dir("/dev").unwrap().count();

    qm(&["attach", &c.name, &device.path]).ok();
    assert_eq!(other.node(&device.path), None);
    assert_eq!(other.open("<>", "/dev/byhand"), REFUSED.map_err(Into::into));
    assert!(c.opens("<>", "/dev/null") && other.opens("<>", "/dev/null"));
    c.past_the_filter(&format!("mknod {} {}", second.path, second.numbers())).ok();
    assert_eq!(c.open("<", &second.path), REFUSED.map_err(Into::into), "a device that nobody attached");
    assert_eq!(programs_on(&other.cgroup()), others);
    assert_eq!(programs_on(&c.cgroup())[1..], mine, "behind the mark the runtime's own filter is in force");
    assert_eq!(std::fs::read_dir("/dev").unwrap().count(), host);

    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(programs_on(&c.cgroup()), mine);
}

fn owner_and_mode_as_asked_for(runtime: &str) {
    let device = block(43).owned_by(7, 8, 0o640);
    let c = Container::start(runtime, "qmh-mode", &[]);
    qm(&["attach", &c.name, &device.path, "--mode", "0604", "--uid", "12", "--gid", "34"]).ok();
    assert_eq!(c.node(&device.path).unwrap(), "b 7:43 12:34 0604");
    qm(&["attach", &c.name, &device.path, "/dev/half", "--gid", "34"]).ok();
    assert_eq!(c.node("/dev/half").unwrap(), "b 7:43 7:34 0640");
    assert_eq!(device.describe(), "b 7:43 7:8 0640", "the host's node stays");
}

fn destination_in_missing_directories(runtime: &str) {
    let device = console(44);
    let c = Container::start(runtime, "qmh-dest", &[]);
    qm(&["attach", &c.name, &device.path, "/dev/a/b/zigbee"]).ok();
    assert!(c.opens("<>", "/dev/a/b/zigbee"));
    assert_eq!(c.node("/dev/a/b").unwrap(), "d 0:0 0:0 0755");
    assert_eq!(c.node(&device.path), None, "it is at its destination only");

    qm(&["detach", &c.name, "/dev/a/b/zigbee"]).ok();
    assert_eq!(c.node("/dev/a"), None, "the directories made for it are gone");

    // A directory that the container uses by now stays.
    qm(&["attach", &c.name, &device.path, "/dev//a/b/zigbee"]).ok();
    c.sh("touch /dev/a/mine").ok();
    qm(&["detach", &c.name, "/dev/a/b/zigbee"]).ok();
    assert_eq!(c.sh("find /dev/a").ok(), "/dev/a\n/dev/a/mine\n");
}

fn access_is_only_what_was_given(runtime: &str) {
    let (read, write, both) = (block(45), block(46), block(47));
    let c = Container::start(runtime, "qmh-access", &[]);
    for (device, access) in [(&read, "r"), (&write, "w"), (&both, "wr")] {
        qm(&["attach", &c.name, &device.path, "--access", access]).ok();
    }
    // `m` makes no difference in podman's containers, whose own filter lets them make any node.
    let results = |device: &str| ["<", ">", "<>"].map(|how| c.open(how, device));
    let refused = || Err("Operation not permitted".to_owned());
    assert_eq!(results(&read.path), [Ok(()), refused(), refused()]);
    assert_eq!(results(&write.path), [refused(), Ok(()), refused()]);
    assert_eq!(results(&both.path), [Ok(()), Ok(()), Ok(())]);
    assert_eq!(grants().iter().map(|grant| grant["access"].as_str().unwrap()).collect::<Vec<_>>(), ["r", "w", "rw"]);
}

fn links_are_followed(runtime: &str) {
    let device = console(45);
    let link = device.link("usb-Silicon_Labs-if00");
    let c = Container::start(runtime, "qmh-link", &[]);
    qm(&["attach", &c.name, &link]).ok();
    assert_eq!(c.node(&link), Some(device.describe()), "at the path as typed there is a node, no link");
    assert!(c.opens("<>", &link));
    assert_eq!(grants()[0]["device"], device.path.as_str(), "the device is told by its own name");
    qm(&["detach", &c.name, &link]).ok();
    assert_eq!(c.node("/dev/qmh-by-id"), None);
}

fn twice_is_once(runtime: &str) {
    let device = block(48);
    let c = Container::start(runtime, "qmh-twice", &[]);
    let attach = || qm(&["attach", &c.name, &device.path]);
    attach().ok();
    let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&c.look(path).unwrap());
    let (first, programs) = (inode(&device.path), programs_on(&c.cgroup()));
    attach().ok();
    assert_eq!(inode(&device.path), first, "the node is not made anew");
    assert_eq!((grants().len(), entries_of(&c.cgroup()).len()), (1, 1));
    assert_eq!(programs_on(&c.cgroup()), programs);
    // Once more with other rights is no repetition: what is there is left alone.
    qm(&["attach", &c.name, &device.path, "--access", "r"]).fails(5, &device.path);
    assert!(c.opens("<>", &device.path));
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!(c.node(&device.path), None);
    assert_eq!(entries(), []);
}

fn two_destinations_of_one_device(runtime: &str) {
    let device = block(49);
    let c = Container::start(runtime, "qmh-two", &[]);
    for (destination, access) in [("/dev/one", "r"), ("/dev/two", "rw")] {
        qm(&["attach", &c.name, &device.path, destination, "--access", access]).ok();
    }
    assert!(c.opens("<", "/dev/one") && c.opens("<>", "/dev/two"));
    assert_eq!(entries_of(&c.cgroup())[0].access.to_string(), "rw", "the filter knows devices, not paths");

    qm(&["detach", &c.name, "/dev/two"]).ok();
    assert_eq!((c.node("/dev/two"), c.opens("<", "/dev/one")), (None, true));
    assert_eq!(c.open("<>", "/dev/one"), REFUSED.map_err(Into::into), "the right that went with the other one is gone");

    qm(&["attach", &c.name, &device.path, "/dev/two"]).ok();
    qm(&["detach", &c.name, &device.path]).ok();
    assert_eq!((c.node("/dev/one"), c.node("/dev/two")), (None, None), "by the device both go");
    assert_eq!(entries(), []);
}

fn every_way_to_name_a_container(runtime: &str) {
    let device = block(50);
    let c = Container::start_running(runtime, "qmh-names", &[], &["sh", "-c", "sleep 1000 & wait"]);
    let (pid, podman_name) = (format!("pid:{}", c.pid()), format!("podman:{}", c.name));
    let children = format!("/proc/{0}/task/{0}/children", c.pid());
    wait_for("another process inside", || !std::fs::read_to_string(&children).unwrap().is_empty());
    let child = format!("pid:{}", std::fs::read_to_string(&children).unwrap().trim());
    for name in [&c.name, &c.id, &c.id[..12], &c.id[..5], &podman_name, &pid, &child] {
        qm(&["attach", name, &device.path]).ok();
        assert!(c.opens("<>", &device.path), "{name}");
        assert_eq!(grants()[0]["container"], c.name.as_str(), "{name}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&qm(&["list", name, "--json"]).ok()).unwrap(),
            json!(grants())
        );
        qm(&["detach", name, &device.path]).ok();
        assert_eq!(c.node(&device.path), None, "{name}");
    }
    let found: Vec<serde_json::Value> = serde_json::from_str(&qm(&["ps", "--json"]).ok()).unwrap();
    let found = found.iter().find(|found| found["id"] == c.id.as_str()).unwrap();
    assert_eq!((&found["name"], &found["runtime"]), (&json!(c.name), &json!(runtime)));
    assert_eq!((&found["pid"], &found["cgroup"]), (&json!(c.pid()), &json!(c.cgroup())));
}

fn list_shows_what_is_in_force(runtime: &str) {
    let (device, tty) = (block(51).owned_by(0, 6, 0o660), console(46).owned_by(0, 5, 0o620));
    let (a, b) = (Container::start(runtime, "qmh-list-a", &[]), Container::start(runtime, "qmh-list-b", &[]));
    assert_eq!(grants(), [json!(null); 0]);
    qm(&["attach", &b.name, &tty.path, "/dev/console9", "--access", "r"]).ok();
    let printed: serde_json::Value =
        serde_json::from_str(&qm(&["attach", &a.name, &device.path, "--json"]).ok()).unwrap();

    let first = json!({
        "container": a.name, "id": a.id, "device": device.path, "kind": "block", "major": 7, "minor": 51,
        "access": "rwm", "right": "filter", "path": device.path, "node": "ours", "uid": 0, "gid": 6, "mode": 0o660, "origin": "manual",
    });
    let second = json!({
        "container": b.name, "id": b.id, "device": tty.path, "kind": "char", "major": 7, "minor": 128 + 46,
        "access": "r", "right": "filter", "path": "/dev/console9", "node": "ours", "uid": 0, "gid": 5, "mode": 0o620, "origin": "manual",
    });
    assert_eq!(printed, first);
    assert_eq!(grants(), [first, second]);
    assert_eq!(
        serde_json::from_str::<Vec<serde_json::Value>>(&qm(&["list", &b.name, "--json"]).ok()).unwrap().len(),
        1
    );

    let said = qm(&["list"]);
    assert_eq!(said.stderr, "no agent: plugs and unplugs are not followed\n");
    let text = said.ok();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..4], ["CONTAINER", "PATH", "DEVICE", "NUMBER"]);
    assert_eq!(
        rows[1],
        ["qmh-list-a", "/dev/loop51", "/dev/loop51", "b", "7:51", "rwm", "filter", "0660", "0:6", "ours", "manual"]
    );
    assert_eq!(
        rows[2],
        ["qmh-list-b", "/dev/console9", "/dev/vcsa46", "c", "7:174", "r", "filter", "0620", "0:5", "ours", "manual"]
    );
    assert_eq!(rows.len(), 3);
}

fn a_paused_container_has_it_when_it_goes_on(runtime: &str) {
    let device = block(52);
    let c = Container::start(runtime, "qmh-paused", &[]);
    podman(&["pause", &c.name]).ok();
    qm(&["attach", &c.name, &device.path]).ok();
    podman(&["unpause", &c.name]).ok();
    assert!(c.opens("<>", &device.path));
}

fn a_dry_run_tells_and_does_nothing(runtime: &str) {
    let (device, other) = (block(41).owned_by(7, 8, 0o640), block(42));
    let c = Container::start(runtime, "qmh-dry", &[]);
    let (cgroup, pid) = (c.cgroup(), [c.pid()]);
    let cgroup = cgroup.strip_prefix("/sys/fs/cgroup").unwrap_or(&cgroup).to_owned();
    let dry = |args: &[&str]| qm(&[args, &["--dry-run"]].concat()).ok();
    let before = observe(&pid);
    let attach = ["attach", &*c.name, &*device.path, "/dev/x"];
    assert_eq!(
        dry(&attach),
        format!(
            "would write the grant into the ledger\n\
             would mark the cgroup {cgroup}\n\
             would allow rwm on b 7:41 in the device filter\n\
             would make the node /dev/x of b 7:41, 0640 7:8\n"
        )
    );
    assert_eq!(observe(&pid), before);
    qm(&attach).ok();
    assert_eq!(dry(&attach), "nothing would be done\n");
    // A second one needs no second mark, and a path that is taken is refused as without --dry-run.
    assert!(!dry(&["attach", &c.name, &other.path]).contains("mark"));
    // What is there already and is not kept yet is kept.
    let for_good = [&attach[..], &["--persist"]].concat();
    assert_eq!(dry(&for_good), "would write down /dev/x for restarts\n");
    qm(&for_good).ok();
    assert_eq!(dry(&for_good), "nothing would be done\n");
    let by_selector = ["attach", &*c.name, &*format!("devname={}", device.path), "/dev/x", "--persist"];
    assert_eq!(dry(&by_selector), "would write down /dev/x for restarts\n", "in other words");
    let lines = dry(&["detach", &c.name, "/dev/x"]);
    assert!(lines.starts_with("would strike /dev/x from what is kept for restarts\nwould write into"), "{lines}");
    qm(&["detach", &c.name, "/dev/x"]).ok();
    let lines = dry(&for_good);
    assert!(lines.starts_with("would write down /dev/x for restarts\nwould write the grant"), "{lines}");
    qm(&attach).ok();
    let before = observe(&pid);
    qm(&["attach", "--dry-run", &c.name, &other.path, "/dev/x"]).fails(5, "attached by hand: detach it first");
    qm(&["detach", "--dry-run", &c.name, &other.path]).fails(4, "42");
    assert_eq!(
        dry(&["detach", &c.name, "/dev/x"]),
        format!(
            "would write into the ledger that it goes\n\
             would take the right on b 7:41 out of the device filter\n\
             would remove the node /dev/x\n\
             would take the mark from the cgroup {cgroup}\n\
             would strike it from the ledger\n"
        )
    );
    assert_eq!(observe(&pid), before);
    assert!(c.opens("<>", "/dev/x"));
}
