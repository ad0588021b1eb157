//! What ordinary users can write about containers, for the agent to believe.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::CaseOnce;
use crate::plug::{Plugged, console};
use crate::selectors::asks;
use crate::state::entries;
use crate::support::podman::Container;
use crate::support::user::{User, give};
use crate::support::{Agent, agent_log, grants, qm, serve_users, wait_for, wait_within};

pub(crate) const ONCE: &[CaseOnce] = &[
    ("forged::state_of_others_gets_nothing", state_of_others_gets_nothing),
    ("forged::a_user_who_asks_for_all_gets_what_he_may_open", asks_for_all),
    ("forged::files_that_are_none_harm_nobody", files_that_are_none_harm_nobody),
    ("forged::a_flood_keeps_nobody_waiting", a_flood_keeps_nobody_waiting),
    ("forged::directories_without_end_take_nobodys_watches", directories_without_end),
    ("forged::a_user_has_so_many_grants_and_no_more", a_user_has_so_many_grants),
];

/// Asks for all that there is.
const ALL: [(&str, &str); 3] = [
    ("org.containers.qm.device.ttys", "true"),
    ("org.containers.qm.hotplug.all", "devname=*"),
    ("org.containers.qm.wayland.seat", "seat0"),
];

fn alice() -> User {
    serve_users(&[47_011, 47_012]);
    User::make("qmh-alice", 47_011)
}

/// A console that everybody may open.
fn open_to_all(number: u32) -> Plugged {
    console(number).owned_by(0, 5, 0o666)
}

fn start_time(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields.split_whitespace().nth(19).map_or(1, |field| field.parse().unwrap())
}

/// The user writes state as both runtimes do, of a container with this process.
fn forge(user: &User, id: &str, pid: u32, cgroup: &str) {
    let annotations: serde_json::Map<_, _> = ALL.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let devices = json!([{ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 }]);
    let bundle = format!("{}/bundle", user.runtime_directory());
    let mut labels: Vec<String> = ALL.iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.push(format!("bundle={bundle}"));
    write(
        user,
        &format!("crun/{id}/config.json"),
        &json!({ "annotations": annotations, "linux": { "devices": devices } }).to_string(),
    );
    let status = json!({ "pid": pid, "process-start-time": start_time(pid), "cgroup-path": cgroup, "bundle": bundle });
    write(user, &format!("crun/{id}/status"), &status.to_string());
    let state = json!({
        "id": "../../../crun/x", "init_process_pid": pid, "init_process_start": start_time(pid),
        "cgroup_paths": { "": format!("/sys/fs/cgroup{cgroup}") },
        "config": { "labels": labels, "devices": null },
    });
    write(user, &format!("runc/{id}-r/state.json"), &state.to_string());
}

/// A file of the user's below his runtime directory, renamed into place.
fn write(user: &User, path: &str, text: &str) {
    let path = format!("{}/{path}", user.runtime_directory());
    let mut above = Path::new(&path).parent().unwrap();
    fs::create_dir_all(above).unwrap();
    while above != Path::new(&user.runtime_directory()) {
        give(above.to_str().unwrap(), user.uid);
        above = above.parent().unwrap();
    }
    fs::write(format!("{path}.tmp"), text).unwrap();
    give(&format!("{path}.tmp"), user.uid);
    fs::rename(format!("{path}.tmp"), &path).unwrap();
}

/// A process that ends when dropped.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Process {
        Process(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process that sleeps so long, once it is in another namespace of this kind than we are, or in any.
fn sleeper(seconds: u32, kind: Option<&str>) -> u32 {
    let mut found = None;
    let line = format!("sleep\0{seconds}\0");
    wait_for("a process that sleeps", || {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_it =
            |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|its| its.ends_with(line.as_bytes()));
        let is_elsewhere = |pid: u32, kind: &str| {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
            of(&pid.to_string()) != of("self")
        };
        found = pids.find(|pid| is_it(pid) && kind.is_none_or(|kind| is_elsewhere(*pid, kind)));
        found.is_some()
    });
    found.unwrap()
}

fn dev_of(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/root/dev")).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn state_of_others_gets_nothing() {
    let (alice, bob) = (alice(), User::make("qmh-bob", 47_012));
    let device = open_to_all(51);
    let roots = Container::start("crun", "qmh-roots", &[&asks("x", "devname=vcsa51")]);
    let other = Container::start("runc", "qmh-other", &[]);
    let bobs = bob.start("runc", "web", &[]);
    let host = Process::start(Command::new("sleep").arg("4711"));
    let hers = Process::start(&mut alice.command("sleep", &["4712"]));
    // She is in a user namespace of hers, in the mount namespace of root's container.
    let other_pid = other.pid().to_string();
    let nested =
        ["-t", &other_pid, "-m", "-S", "47011", "-G", "47011", "--", "/bin/busybox", "unshare", "-U", "sleep", "4713"];
    let nested = Process::start(Command::new("nsenter").args(nested));
    // And in namespaces of hers, on the host's root directory.
    let on_root = Process::start(&mut alice.command("unshare", &["-Urm", "sleep", "4714"]));
    let gone = Process::start(Command::new("sleep").arg("4715"));
    let gone_pid = gone.0.id();
    let vanished = (gone_pid, start_time(gone_pid));
    drop(gone);

    let agent = Agent::start();
    wait_for("what root's container asks for", || grants().len() == 1);
    let log = fs::read_to_string(agent_log()).unwrap().len();
    let forged = [
        ("roots", roots.pid(), roots.cgroup()),
        ("other", other.pid(), other.cgroup()),
        ("bobs", bobs.pid, "/".into()),
        ("host", host.0.id(), "/".into()),
        ("hers", sleeper(4712, None), other.cgroup()),
        ("init", 1, "/".into()),
        ("own", agent.pid(), "/".into()),
        ("nested", sleeper(4713, Some("user")), other.cgroup()),
        ("onroot", sleeper(4714, Some("mnt")), "/".into()),
        ("gone", vanished.0, other.cgroup()),
        (&*roots.id, roots.pid(), roots.cgroup()),
    ];
    let before: Vec<Vec<String>> = [roots.pid(), other.pid(), bobs.pid].map(dev_of).into();
    for (id, pid, cgroup) in &forged {
        forge(&alice, id, *pid, cgroup);
    }
    let settled = || {
        std::thread::sleep(Duration::from_millis(300));
        qm(&["status"]).ok();
    };
    settled();
    // What comes and goes then is nothing to them either.
    device.unplug();
    device.again();
    fs::set_permissions(&device.path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    agent.reload();
    wait_for("root's container to have it again", || grants().len() == 1);
    settled();
    for agent_there in [true, false] {
        let all = grants();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0]["id"], roots.id.as_str());
        assert_eq!(entries().len(), 1, "{agent_there}");
        let found: serde_json::Value = serde_json::from_str(&qm(&["ps", "--json"]).ok()).unwrap();
        let names: Vec<&str> = found.as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
        // The one on the host's root directory is in namespaces of hers; nothing can be made there.
        let unknown = names.iter().filter(|id| id.starts_with("47011@") && !id.contains("onroot")).count();
        assert_eq!(unknown, 0, "{names:?}");
        if agent_there {
            for name in ["47011@roots", "47011@nested", "47011@init-r", &format!("47011@{}", roots.id)] {
                qm(&["attach", name, &device.path]).fails(3, "no running container");
            }
            let on_root = names.iter().find(|id| id.starts_with("47011@onroot")).copied();
            qm(&["attach", on_root.unwrap(), &device.path]).fails(5, "the host's own");
        }
    }
    qm(&["attach", &roots.id[..12], "/dev/tty9"]).ok();
    assert!(roots.look("/dev/tty9").is_some(), "her id is not root's");
    qm(&["detach", "qmh-roots", "/dev/tty9"]).ok();
    let after: Vec<Vec<String>> = [roots.pid(), other.pid(), bobs.pid].map(dev_of).into();
    assert_eq!(before, after);
    assert!(roots.opens("<>", &device.path));
    assert_eq!(fs::metadata(&device.path).unwrap().mode() & 0o777, 0o666);
    let log = fs::read_to_string(agent_log()).unwrap()[log..].to_owned();
    assert!(!log.contains("panicked"), "{log}");
    drop((nested, on_root, hers));
}

/// Her own container, with the id of one of root's, and a state that asks for all.
fn asks_for_all() {
    let alice = alice();
    let (_open, _closed) = (open_to_all(51), console(52).owned_by(0, 5, 0o600));
    let roots = Container::start("crun", "qmh-roots", &[]);
    let hers = alice.start("runc", "web", &[]);
    // Before the agent: what it knows first counts.
    forge(&alice, &roots.id, hers.pid, &roots.cgroup());
    let _agent = Agent::start();
    wait_for("what she may open", || grants().iter().any(|grant| grant["device"] == "/dev/vcsa51"));
    let all = grants();
    // One process is one container, by whichever of its names it was found first.
    let ids: std::collections::BTreeSet<&str> = all.iter().map(|grant| grant["id"].as_str().unwrap()).collect();
    assert!(ids.len() == 1 && ids.iter().all(|id| id.starts_with("47011@")), "{ids:?}");
    assert!(all.iter().all(|grant| grant["right"] == "node"));
    assert_eq!(entries().len(), 0, "no right in the cgroup that she named");
    for grant in &all {
        let device = grant["device"].as_str().unwrap();
        assert_eq!(
            alice.sh(&format!("test -r {device} && test -w {device}")).code,
            0,
            "{device}: she may open it herself"
        );
        assert_eq!(grant["kind"], "char");
    }
    assert!(!all.iter().any(|grant| grant["device"] == "/dev/vcsa52"));
    assert!(roots.look("/dev/vcsa51").is_none() && roots.look("/dev/vcsa52").is_none());
}

fn files_that_are_none_harm_nobody() {
    let alice = alice();
    let _device = open_to_all(51);
    let roots = Container::start("crun", "qmh-roots", &[&asks("x", "devname=vcsa51")]);
    let hers = alice.start("runc", "web", &[&asks("x", "devname=vcsa51")]);
    let agent = Agent::start();
    wait_for("what they ask for", || grants().len() == 2);
    let run = alice.runtime_directory();
    let script = format!(
        "mkdir -p {run}/crun && cd {run}/crun && \
         mkdir fifo huge deep dir text links up 'with space' \"$(printf 'a\\nb')\" \"$(printf 'e\\033[2J')\" 'lxc:web' 'x@y' && \
         mkfifo fifo/state.json fifo/status && ln -s /etc/shadow links/status && ln -s /etc/shadow links/config.json && \
         ln -s /etc/shadow links/state.json && ln -s /run/crun/{id} link && ln -s / slash && mkdir dir/state.json dir/status && \
         ln -s ../.. up/state.json && head -c 3000000 /dev/zero >huge/state.json && echo nonsense >text/state.json && \
         (yes '[' | head -n 300000 | tr -d '\\n') >deep/state.json && ln {run}/crun/text/state.json up/status && \
         printf '\\377\\376' >text/status && mkdir {run}/bundle && ln -s /etc/shadow {run}/bundle/config.json",
        id = roots.id
    );
    alice.sh(&script).ok();
    forge(&alice, "own", hers.pid, "/");
    // A directory of root's among hers, and a runtime directory that leads to root's.
    fs::create_dir(format!("{run}/crun/of-root")).unwrap();
    fs::write(format!("{run}/crun/of-root/state.json"), "{}").unwrap();
    let started = Instant::now();
    qm(&["ps"]).ok();
    qm(&["status"]).ok();
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    alice
        .sh(&format!("mv {run}/crun {run}/was && ln -s /run/crun {run}/crun && mkdir {run}/.x && mv {run}/.x {run}/x"))
        .ok();
    qm(&["ps"]).ok();
    agent.reload();
    wait_for("it to answer", || qm(&["status"]).code == 0);
    assert_eq!(grants().len(), 2, "{:?}", grants());
    assert!(roots.opens("<>", "/dev/vcsa51") && hers.opens("/dev/vcsa51"));
    let found = qm(&["ps", "--json"]).ok();
    assert!(grants().iter().any(|grant| grant["id"] == hers.full_id().as_str()), "it keeps its name");
    assert!(!found.contains(&format!("47011@{}", roots.id)), "{found}");
    symlink("/run/crun", format!("{run}/again")).unwrap();
}

/// She makes and removes directories as fast as she can, and has more of them than are looked at.
fn a_flood_keeps_nobody_waiting() {
    let alice = alice();
    let device = open_to_all(51);
    let roots = Container::start("crun", "qmh-roots", &[&asks("x", "devname=vcsa51")]);
    let hers = alice.start("runc", "web", &[]);
    let agent = Agent::start();
    wait_for("what root's asks for", || grants().len() == 1);
    let since = fs::read_to_string(agent_log()).unwrap().len();
    for at in 0..150 {
        forge(&alice, &format!("many{at}"), hers.pid, "/");
    }
    let run = alice.runtime_directory();
    let line = format!(
        "cd {run}/crun; while :; do mkdir a b c d; rmdir a b c d; echo '{{}}' >many1/x; mv many1/x many1/status; done"
    );
    let flood = Process::start(&mut alice.command("sh", &["-c", &line]));
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        device.unplug();
        let started = Instant::now();
        device.again();
        wait_for("the node", || roots.look("/dev/vcsa51").is_some());
        slowest = slowest.max(started.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!("slowest plug during the flood: {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let log = || fs::read_to_string(agent_log()).unwrap()[since..].to_owned();
    let told = "user 47011 has more containers than are looked at: the first 256";
    wait_for("it to be told", || log().contains(told));
    std::thread::sleep(Duration::from_secs(2));
    drop(flood);
    let log = log();
    assert_eq!(log.lines().filter(|line| line.contains(told)).count(), 1, "{log}");
    assert!(!log.contains("panicked") && !log.contains("events were lost"), "{log}");
    drop(agent);
}

/// She renames the directory of her runtime again and again; there is a number of watches for all users together.
fn directories_without_end() {
    let alice = alice();
    let _device = open_to_all(51);
    let agent = Agent::start();
    let run = alice.runtime_directory();
    for at in 0..6000 {
        let crun = format!("{run}/crun");
        fs::create_dir(&crun).unwrap();
        give(&crun, alice.uid);
        std::thread::sleep(Duration::from_micros(500));
        fs::rename(&crun, format!("{run}/was-{at}")).unwrap();
    }
    let bob = User::make("qmh-bob", 47_012);
    let his = bob.start("crun", "web", &[&asks("x", "devname=vcsa51")]);
    wait_for("what he asks for", || his.opens("/dev/vcsa51"));
    let hers = alice.start("crun", "web", &[&asks("x", "devname=vcsa51")]);
    wait_for("what she asks for", || hers.opens("/dev/vcsa51"));
    assert!(!agent.log().contains("panicked"));
}

fn a_user_has_so_many_grants() {
    let alice = alice();
    let device = open_to_all(51);
    let roots = Container::start("crun", "qmh-roots", &[&asks("x", "devname=vcsa51")]);
    let agent = Agent::start();
    let since = fs::read_to_string(agent_log()).unwrap().len();
    let asked: Vec<String> =
        (0..60).map(|at| asks(&format!("x{at}"), &format!("devname=vcsa51;as=/dev/x{at}"))).collect();
    let asked: Vec<&str> = asked.iter().map(String::as_str).collect();
    let all: Vec<_> = (0..9).map(|at| alice.start("crun", &format!("web{at}"), &asked)).collect();
    let count = |id: &str| grants().iter().filter(|grant| grant["id"].as_str().unwrap().starts_with(id)).count();
    let log = || fs::read_to_string(agent_log()).unwrap()[since..].to_owned();
    let told = "user 47011 has 512 grants, and no rule gives more";
    wait_within(Duration::from_secs(60), "all that there is", || count("47011@") == 512 && log().contains(told));
    // Nobody else has less for it, and what she may have again comes again.
    device.unplug();
    wait_for("them to go", || grants().is_empty());
    device.again();
    fs::set_permissions(&device.path, fs::Permissions::from_mode(0o666)).unwrap();
    fs::write(format!("/sys/class/vc/{}/uevent", device.path.strip_prefix("/dev/").unwrap()), "add").unwrap();
    wait_within(Duration::from_secs(60), "them to come", || count("47011@") == 512 && grants().len() == 513);
    assert!(roots.opens("<>", "/dev/vcsa51"));
    assert_eq!(log().lines().filter(|line| line.contains(told)).count(), 1, "once");
    drop(all);
    wait_for("hers to go", || grants().len() == 1);
    agent.stop();
}
