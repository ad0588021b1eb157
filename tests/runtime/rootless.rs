//! Containers of ordinary users, with rootless podman.

use std::os::unix::fs::{PermissionsExt, chown};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Case;
use crate::plug::{Plugged, console};
use crate::selectors::asks;
use crate::state::entries;
use crate::support::podman::Container;
use crate::support::user::{Rootless, User};
use crate::support::{Agent, CONFIGURATION, agent_log, configure, grants, qm, serve_users, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("rootless::a_user_gets_what_he_may_open", a_user_gets_what_he_may_open),
    ("rootless::a_policy_gives_what_he_may_not_open", a_policy_gives_what_he_may_not_open),
    ("rootless::attach_is_roots_word", attach_is_roots_word),
    ("rootless::names_are_his_own", names_are_his_own),
    ("rootless::users_come_and_go", users_come_and_go),
    ("rootless::who_is_not_named_is_not_served", who_is_not_named_is_not_served),
    ("rootless::a_copy_that_is_kept_is_of_no_use", a_copy_that_is_kept),
    ("rootless::a_namespace_that_outlives_its_container_has_nothing", a_namespace_that_outlives),
    ("rootless::without_its_page_a_node_is_known_again_or_useless", without_its_page),
];

/// The group `dialout`, which nobody is in.
const DIALOUT: u32 = 20;

fn alice() -> User {
    serve_users(&[47_011, 47_012]);
    User::make("qmh-alice", 47_011)
}

/// Has the kernel say once more that the device is there, as a change of its owner would.
fn say_again(device: &Plugged) {
    let name = device.path.strip_prefix("/dev/").unwrap();
    std::fs::write(format!("/sys/class/vc/{name}/uevent"), "add").unwrap();
}

fn closed(number: u32) -> Plugged {
    console(number).owned_by(0, DIALOUT, 0o660)
}

fn said() -> String {
    std::fs::read_to_string(agent_log()).unwrap_or_default()
}

fn of<'a>(all: &'a [Value], c: &Rootless<'_>) -> Vec<&'a Value> {
    all.iter().filter(|grant| grant["id"] == c.full_id().as_str()).collect()
}

/// How often agents have said that since the log was so long.
fn count(since: usize, what: &str) -> usize {
    said()[since..].lines().filter(|line| line.contains(what)).count()
}

fn a_user_gets_what_he_may_open(runtime: &str) {
    let (user, device, since) = (alice(), closed(51), said().len());
    let (x, y) = (asks("x", "devname=vcsa51"), asks("x", "devname=vcsa51;as=/dev/a/mine;mode=0600"));
    let first = user.start(runtime, "first", &[&x]);
    let agent = Agent::start();
    // One before the agent, one after it; both without a cgroup of their own, and with the same path inside.
    let second = user.start(runtime, "second", &[&x]);
    let third = user.start(runtime, "third", &[&y]);
    let all = [&first, &second, &third];
    let refused = format!(
        "/dev/vcsa51 not granted by x: user {} may not open it for reading and writing on the host: add {} to the group dialout, \
         or use a [[policy]] with owner = {} and an allow for it",
        user.name, user.name, user.uid
    );
    wait_for("all to be refused", || count(since, &refused) == 3);
    say_again(&device);
    say_again(&device);
    assert_eq!(grants().len(), 0);
    let explained = qm(&["explain", &first.name, "/dev/vcsa51"]).ok();
    assert!(explained.contains("add qmh-alice to the group dialout"), "{explained}");
    assert_eq!(count(since, &refused), 3, "once each:\n{}", agent.log());

    user.join("dialout");
    // What is known of a user counts for five seconds.
    wait_for("what is the user's", || {
        say_again(&device);
        grants().len() == 3
    });
    assert_eq!(
        first.node("/dev/vcsa51").unwrap(),
        format!("c 7:179 {}:{} 0660", user.uid, user.first_id() + DIALOUT - 1)
    );
    assert!(first.opens("/dev/vcsa51") && second.opens("/dev/vcsa51") && third.opens("/dev/a/mine"));
    for c in all {
        let grants = grants();
        let its = of(&grants, c);
        assert_eq!(its.len(), 1, "{grants:?}");
        assert_eq!(
            (&its[0]["container"], &its[0]["right"], &its[0]["node"]),
            (&c.name.as_str().into(), &"node".into(), &"ours".into())
        );
    }
    assert_eq!(entries().len(), 0, "nothing in the device filter");
    qm(&["verify", &first.name]).ok();
    assert!(qm(&["list"]).ok().contains("RIGHT"));

    // The host's node is another one's now: it goes from all.
    chown(&device.path, Some(0), Some(0)).unwrap();
    say_again(&device);
    wait_for("it to go", || grants().is_empty());
    assert!(all.iter().all(|c| c.node("/dev/vcsa51").is_none() && c.node("/dev/a").is_none()));

    // A file's list counts, too.
    let (name, flags) = ("system.posix_acl_access", rustix::fs::XattrFlags::empty());
    rustix::fs::lsetxattr(&*device.path, name, &acl_for(user.uid), flags).unwrap();
    say_again(&device);
    wait_for("it to be back", || grants().len() == 3);
    device.unplug();
    wait_for("it to go", || grants().is_empty() && all.iter().all(|c| c.node("/dev/vcsa51").is_none()));
    // It comes back as the kernel makes it, for root alone.
    device.again();
    say_again(&device);
    qm(&["status"]).ok();
    assert_eq!(grants().len(), 0);

    // Of one that ends, nothing stays; the others keep theirs.
    std::fs::set_permissions(&device.path, std::fs::Permissions::from_mode(0o666)).unwrap();
    say_again(&device);
    wait_for("it to be back", || grants().len() == 3);
    let id = second.full_id();
    drop(second);
    wait_for("what it had to go", || grants().len() == 2 && grants().iter().all(|grant| grant["id"] != id.as_str()));
    assert!(first.opens("/dev/vcsa51") && third.opens("/dev/a/mine"));

    // The next agent finds all as it is.
    let log = agent.log().len();
    agent.stop();
    let agent = Agent::start();
    assert_eq!(grants().len(), 2);
    assert!(first.opens("/dev/vcsa51") && third.opens("/dev/a/mine"));
    let log = agent.log()[log..].to_owned();
    assert!(!log.contains("granted") && !log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

/// user::rw-, user:UID:rw-, group::---, mask::rw-, other::---, as the attribute has it.
fn acl_for(uid: u32) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, bits, id) in [(1u16, 6u16, u32::MAX), (2, 6, uid), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
    {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn a_policy_gives_what_he_may_not_open(runtime: &str) {
    let (user, _devices, since) = (alice(), [closed(51), closed(52)], said().len());
    let agent = Agent::start();
    let c = user.start(runtime, "web", &[&asks("x", "devname=vcsa5?")]);
    let set = |text: String, expected: &[&str]| {
        configure(&text);
        agent.reload();
        wait_for(&text, || qm(&["status", "--json"]).ok().contains("\"configuration\":[]") && has(&c) == expected);
    };
    let policy = |conditions: &str| format!("[[policy]]\n{conditions}\nallow = [\"devname=vcsa51\"]\n");
    wait_for("it to be looked at", || count(since, "may not open it") == 2);
    set(policy("owner = 47011"), &["/dev/vcsa51"]);
    set(policy("owner = 47012"), &[]);
    set(policy("owner = 47011\ncontainer = \"qmh-alice@web\""), &["/dev/vcsa51"]);
    set(policy("owner = 47011\ncontainer = \"web\""), &[]);
    set(policy("owner = 47011\ncontainer = \"*@web\""), &["/dev/vcsa51"]);
    set(policy("container = \"*\""), &[]);
    set(format!("{}[[policy]]\ndeny = [\"devname=vcsa5*\"]\n", policy("owner = 47011")), &[]);
    let gives = |name: &str| format!("[[container]]\nmatch = \"{name}\"\ndevices = [\"devname=vcsa52\"]\n");
    set(gives("qmh-alice@web"), &["/dev/vcsa52"]);
    set(gives("*web"), &[]);
    set(gives("podman:*@web"), &["/dev/vcsa52"]);
    assert!(std::path::Path::new(CONFIGURATION).exists());
}

/// The paths of what it has, in order.
fn has(c: &Rootless<'_>) -> Vec<String> {
    let all = grants();
    of(&all, c).iter().map(|grant| grant["path"].as_str().unwrap().to_owned()).collect()
}

fn attach_is_roots_word(runtime: &str) {
    let (user, device) = (alice(), closed(51));
    let c = user.start(runtime, "web", &[]);
    for with_agent in [false, true] {
        let agent = with_agent.then(Agent::start);
        for name in [&c.name, &format!("podman:{}", c.name), &c.full_id()[..12].to_owned()] {
            qm(&["attach", name, &device.path]).ok();
            assert!(c.opens(&device.path), "{name}");
            qm(&["verify", name]).ok();
            assert_eq!(grants().len(), 1);
            qm(&["detach", name, &device.path]).ok();
            assert_eq!((grants().len(), c.node(&device.path)), (0, None));
        }
        // What is bound elsewhere is of no use any more.
        qm(&["attach", &c.name, &device.path]).ok();
        c.sh("touch /dev/copy && mount --bind /dev/vcsa51 /dev/copy").ok();
        assert!(c.opens("/dev/copy"));
        qm(&["detach", &c.name, &device.path]).ok();
        assert!(!c.opens("/dev/copy") && c.node("/dev/vcsa51").is_none());
        c.sh("chmod 666 /dev/copy; umount /dev/copy; rm /dev/copy");
        drop(agent);
    }
    qm(&["attach", &c.own_name, &device.path]).fails(3, "no running container");
    // What lies in it is not a way to the host: the user may not write there.
    let other = user.start(runtime, "bound", &["-v", "/usr/local:/dev/local"]);
    qm(&["attach", &other.name, &device.path, "/dev/local/mine"]).fails(1, "Permission denied");
    qm(&["attach", &other.name, &device.path, "/dev/local/more/mine"]).fails(1, "Permission denied");
    assert!(!std::path::Path::new("/usr/local/mine").exists() && !std::path::Path::new("/usr/local/more").exists());
}

/// As at a login: systemd makes the directory, then mounts a file system on it, of which nothing tells.
fn users_come_and_go(runtime: &str) {
    drop(alice());
    let _device = console(51).owned_by(0, 5, 0o666);
    let agent = Agent::start();
    for round in 0..3 {
        let user = alice();
        let c = user.start(runtime, "web", &[&asks("x", "devname=vcsa51")]);
        wait_for(&format!("what it asks for, round {round}"), || grants().len() == 1);
        assert!(c.opens("/dev/vcsa51"));
        // Written down, it is there again after a restart of the container; of its user's by that name.
        qm(&["attach", &c.name, "/dev/tty9", "--persist"]).ok();
        assert!(c.node("/dev/tty9").is_some());
        drop(c);
        wait_for("it to go", || grants().iter().all(|grant| grant["node"] == "none"));
        let c = user.start(runtime, "web", &[]);
        wait_for("what was attached for good", || c.node("/dev/tty9").is_some());
        qm(&["detach", &c.name, "/dev/tty9"]).ok();
        assert_eq!((c.node("/dev/tty9"), grants().len()), (None, 0));
    }
    assert!(!agent.log().contains("panicked"));
}

fn names_are_his_own(runtime: &str) {
    let (alice, bob) = (alice(), User::make("qmh-bob", 47_012));
    let device = closed(51);
    let roots = Container::start(runtime, "web", &[]);
    let (hers, his) = (alice.start(runtime, "web", &[]), bob.start(runtime, "web", &[]));
    let _agent = Agent::start();
    let listed: Value = serde_json::from_str(&qm(&["ps", "--json"]).ok()).unwrap();
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["qmh-alice@web", "qmh-bob@web", "web"]);
    assert!(listed.as_array().unwrap().iter().all(|it| it["problem"].is_null()), "{listed}");
    qm(&["attach", "web", &device.path]).ok();
    qm(&["attach", "qmh-bob@web", &device.path]).ok();
    assert_eq!((hers.node(&device.path), his.opens(&device.path)), (None, true));
    assert!(roots.opens("<>", &device.path));
    qm(&["detach", "qmh-bob@web", &device.path]).ok();
    assert!(roots.opens("<>", &device.path) && !his.opens(&device.path));
}

/// Whose containers are looked for is for root to say.
fn who_is_not_named_is_not_served(runtime: &str) {
    let (user, device) = (alice(), console(51).owned_by(0, 0, 0o666));
    serve_users(&[47_012]);
    let agent = Agent::start();
    let c = user.start(runtime, "web", &[&asks("x", "devname=vcsa51")]);
    std::thread::sleep(Duration::from_millis(500));
    say_again(&device);
    assert!(grants().is_empty() && has(&c).is_empty());
    // Nor does anybody say that it counts.
    let shown: Vec<Value> = serde_json::from_str(&qm(&["ps", "--json"]).ok()).unwrap();
    let its = shown.iter().find(|its| its["id"] == c.full_id().as_str()).expect("it is found");
    assert_eq!(its["asks"], json!([]));
    let explained = qm(&["explain", "qmh-alice@web", "/dev/vcsa51"]).stdout;
    assert!(explained.contains("no users = [47011] in the configuration"), "{explained}");
    // root may attach something all the same, and that does not let the user's own word count.
    qm(&["attach", "qmh-alice@web", "/dev/null", "/dev/mine"]).ok();
    assert_eq!(has(&c), ["/dev/mine"]);
    serve_users(&[47_011]);
    agent.reload();
    wait_for("his own", || has(&c) == ["/dev/mine", "/dev/vcsa51"]);
    let later = user.start(runtime, "later", &[&asks("x", "devname=vcsa51")]);
    wait_for("the next one's", || has(&later) == ["/dev/vcsa51"]);
    serve_users(&[]);
    agent.reload();
    wait_for("them to go", || has(&later).is_empty());
    agent.stop();
}

/// Where the host has the files of nodes.
fn held() -> Vec<String> {
    let runs = std::fs::read_dir("/run/qm-hotplug/nodes").into_iter().flatten().flatten();
    let files = runs.flat_map(|run| std::fs::read_dir(run.path()).unwrap().flatten());
    files.map(|file| file.file_name().into_string().unwrap()).collect()
}

fn a_copy_that_is_kept(runtime: &str) {
    let (user, device) = (alice(), console(51).owned_by(0, 0, 0o666));
    let node = &device.path;
    for (at, hide) in [
        format!("umount {node}"),
        format!("umount {node} && rm {node} && mkdir {node}"),
        format!("mount --bind /bin/busybox {node}"),
        "mount -t tmpfs none /dev".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        let keep = format!("touch /tmp/copy && mount --bind {node} /tmp/copy && {hide}");
        let by_person = user.start(runtime, &format!("person-{at}"), &[]);
        qm(&["attach", &by_person.name, node]).ok();
        assert_eq!(held().len(), 1);
        by_person.sh(&keep).ok();
        assert!(by_person.opens("/tmp/copy"), "{hide}");
        qm(&["detach", &by_person.name, node]).ok();
        assert!(!by_person.opens("/tmp/copy") && held().is_empty(), "detached, {hide}");
        by_person.sh("chmod 666 /tmp/copy; chown 0:0 /tmp/copy; mount -o remount,rw,bind /tmp/copy");
        assert!(!by_person.opens("/tmp/copy"), "{hide}");

        let agent = Agent::start();
        let by_rule = user.start(runtime, &format!("rule-{at}"), &[&asks("x", "devname=vcsa51")]);
        wait_for("what it asks for", || grants().len() == 1);
        by_rule.sh(&keep).ok();
        assert!(by_rule.opens("/tmp/copy"), "{hide}");
        device.unplug();
        wait_for("it to go", || grants().is_empty() && held().is_empty());
        // The next device with the number.
        device.again();
        std::fs::set_permissions(node, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(!by_rule.opens("/tmp/copy"), "unplugged, {hide}");
        drop(by_rule);
        wait_for("nothing to be left", || grants().is_empty() && held().is_empty());
        agent.stop();
    }
}

/// A process of his stays behind in the mount namespace.
fn a_namespace_that_outlives(runtime: &str) {
    let (user, device) = (alice(), console(51).owned_by(0, 0, 0o666));
    for is_agent_there in [true, false] {
        let agent = Agent::start();
        let c = user.start(runtime, "web", &[&asks("x", "devname=vcsa51")]);
        wait_for("what it asks for", || grants().len() == 1);
        let pid = c.pid.to_string();
        let enter = ["-t", &pid, "-U", "-m", "-S", "0", "-G", "0", "--", "/bin/busybox", "sleep", "1000"];
        let mut stays = std::process::Command::new("nsenter").args(enter).spawn().unwrap();
        let program = format!("/proc/{}/exe", stays.id());
        wait_for("it to be inside", || std::fs::read_link(&program).is_ok_and(|program| program.ends_with("busybox")));
        let opens = || {
            let stays = stays.id().to_string();
            let line = format!("exec 3<>{}", device.path);
            let into = ["-t", &stays, "-U", "-m", "-S", "0", "-G", "0", "--", "/bin/busybox", "sh", "-c", &line];
            crate::support::run("nsenter", &into).code == 0
        };
        assert!(opens());
        let agent = if is_agent_there {
            drop(c);
            agent
        } else {
            agent.stop();
            drop(c);
            assert!(opens());
            Agent::start()
        };
        wait_for("what it had to go", || grants().is_empty() && held().is_empty());
        assert!(!opens());
        stays.kill().unwrap();
        stays.wait().unwrap();
        agent.stop();
    }
}

fn without_its_page(runtime: &str) {
    let (user, device) = (alice(), console(51).owned_by(0, 0, 0o666));
    let other = console(52).owned_by(0, 0, 0o600);
    let agent = Agent::start();
    let c = user.start(runtime, "web", &[&asks("x", "devname=vcsa51")]);
    qm(&["attach", &c.name, &other.path]).ok();
    wait_for("both", || grants().len() == 2);
    c.sh(&format!("touch /tmp/copy && mount --bind {} /tmp/copy", other.path)).ok();
    agent.stop();
    for page in crate::state::ledger().keys() {
        std::fs::write(page, "no page").unwrap();
    }
    let agent = Agent::start();
    assert_eq!((has(&c), held()), (vec![device.path.clone()], vec!["%2Fdev%2Fvcsa51".to_owned()]), "{}", agent.log());
    assert_eq!(grants()[0]["node"], "ours");
    assert!(c.opens(&device.path) && !c.opens(&other.path) && !c.opens("/tmp/copy"));
    // What is of no use is in nobody's way.
    qm(&["attach", &c.name, &other.path]).ok();
    assert!(c.opens(&other.path) && !c.opens("/tmp/copy"));
    qm(&["detach", &c.name, &other.path]).ok();
    device.unplug();
    wait_for("it to go", || grants().is_empty() && held().is_empty());
    assert_eq!((c.node(&device.path), c.node(&other.path)), (None, None));
    agent.stop();
    for file in std::fs::read_dir("/run/qm-hotplug/ledger").unwrap().flatten() {
        std::fs::remove_file(file.path()).unwrap();
    }
}
