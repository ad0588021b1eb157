//! The hook alone, without an agent: what was there when a container started reaches it, and the logs say so.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::Case;
use crate::container::{Container, node};
use crate::everything::{CATEGORIES, Everything, Node, nodes_of_host};
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[
    ("hook::every_category_opens_where_asked_for", every_category_opens_where_asked_for),
    ("hook::under_the_names_of_containers_qm", under_the_names_of_containers_qm),
];

/// Asks for render nodes.
const ASKS_FOR_GPU: &str = "--annotation org.containers.qm.wayland-client.gpu=TRUE";

/// The file that the hook writes for what it does about categories and seats.
pub(crate) const LOG: &str = "/var/log/qm-device-manager.log";

/// The file that it writes for what it does about GPUs.
const GPU_LOG: &str = "/var/log/qm-wayland-client-devices.log";

/// crun and runc let every container open this one if it has a node for it.
pub(crate) const TUN: &str = "/dev/net/tun";

/// Nodes that Debian's rules give to root alone, so that a group does not help, besides the consoles:
/// by the beginning of the path.
const FOR_ROOT_ALONE: [&str; 3] = ["/dev/dma_heap/system", "/dev/hidraw", "/dev/i2c-"];

/// The program and its hook, as a package brings them; removed on drop. That is much faster than what `install` has: no
/// systemd is told of the service, which does not run here.
pub(crate) struct Packaged<'vm>(&'vm Vm);

impl<'vm> Packaged<'vm> {
    #[track_caller]
    pub(crate) fn install(vm: &'vm Vm) -> Self {
        let packaged = Self(vm);
        vm.ok("/mnt/repo/scripts/install.sh --destdir /var/tmp/package --binary /usr/local/bin/qm-hotplug && \
               cp -a /var/tmp/package/usr/. /usr/");
        packaged
    }
}

impl Drop for Packaged<'_> {
    fn drop(&mut self) {
        let remove = "cd /var/tmp/package && find . -type f | (cd / && xargs rm -f) && rm -rf /var/tmp/package";
        let output = self.0.sh(remove);
        if !output.success() {
            eprintln!("could not remove the package: {}", output.stderr);
        }
    }
}

fn every_category_opens_where_asked_for(vm: &Vm) {
    let _installed = Packaged::install(vm);
    let _everything = Everything::plug(vm);
    let by_category = CATEGORIES.map(|(category, patterns)| (category, nodes_of_host(vm, patterns)));
    for (category, nodes) in &by_category {
        assert!(!nodes.is_empty(), "the host has nothing of {category}");
    }
    let all: BTreeSet<&Node> = by_category.iter().flat_map(|(_, nodes)| nodes).collect();
    let groups: BTreeSet<&str> = all.iter().map(|node| node.group()).collect();

    let asks: String =
        CATEGORIES.map(|(name, _)| format!("--annotation org.containers.qm.device.{name}=true ")).concat();
    let groups: String = groups.iter().map(|group| format!("--group-add {group} ")).collect();
    // Root is tried in the same containers: it joins them from outside.
    let asks = format!("{asks} {ASKS_FOR_GPU} --user 1000 {groups}");
    let containers = Container::run_all(
        vm,
        &[
            ("crun", "every-crun", &asks),
            ("runc", "every-runc", &asks),
            ("crun", "none-crun", ""),
            ("runc", "gpu-runc", ASKS_FOR_GPU),
        ],
    );
    let [every @ .., none, gpu] = &containers[..] else { unreachable!() };

    let expected: Vec<Node> = all.iter().map(|node| (*node).clone()).collect();
    for container in every {
        assert_eq!(container.nodes(), expected, "{} has not what the host has", container.name);
    }
    assert_eq!(none.nodes(), []);
    assert_eq!(gpu.nodes(), nodes_of_host(vm, "/dev/dri/renderD128"), "not the card itself");
    assert_eq!(gpu.open("/dev/dri/renderD128"), "opens");
    nothing_else_opens(none, &expected, &[TUN]);
    nothing_else_opens(gpu, &expected, &[TUN, "/dev/dri/renderD128"]);

    for container in every {
        opens(container, &expected, false);
        opens(container, &expected, true);
        the_log_tells_of_it(vm, container, &by_category);
        the_journal_tells_of_it(vm, container, &by_category);
    }
    assert_eq!(logged(vm, LOG, &none.name).len(), 0, "the hook ran for {}", none.name);
}

/// The right to open all but `granted` is missing, not only the nodes.
#[track_caller]
pub(crate) fn nothing_else_opens(container: &Container<'_>, all: &[Node], granted: &[&str]) {
    let withheld: Vec<&Node> = all.iter().filter(|node| !granted.contains(&&*node.path)).collect();
    let numbers: Vec<&str> = withheld.iter().map(|node| node.numbers.as_str()).collect();
    for (opened, node) in container.open_all_by_hand(&numbers).iter().zip(withheld) {
        assert_eq!(opened, "Operation not permitted", "{}: {node:?}", container.name);
    }
}

/// Opens each node in the container, as root or by `podman exec` as its own user. No driver of these refuses it.
#[track_caller]
fn opens(container: &Container<'_>, all: &[Node], as_user: bool) {
    let paths: Vec<&str> = all.iter().map(|node| node.path.as_str()).collect();
    let results = if as_user { container.open_by_exec(&paths) } else { container.open_all(&paths) };
    for (result, node) in results.iter().zip(all) {
        let is_for_root_alone = is_for_root_alone(&node.path);
        assert_eq!(!node.is_for_its_group(), is_for_root_alone, "{node:?}");
        let expected = if as_user && is_for_root_alone { "Permission denied" } else { "opens" };
        assert_eq!(result, expected, "{}: {node:?}", container.name);
    }
}

fn is_for_root_alone(path: &str) -> bool {
    let is_console = path.strip_prefix("/dev/tty").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()));
    is_console || FOR_ROOT_ALONE.iter().any(|beginning| path.starts_with(beginning))
}

/// The lines of a log about that container, or about all until the next one begins, without their times.
#[track_caller]
pub(crate) fn logged(vm: &Vm, log: &str, container: &str) -> Vec<String> {
    let text = vm.ok(&format!("if test -e {log}; then cat {log}; fi"));
    let mut is_its_own = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        // "2026-11-21 09:30:00 - NAME - LEVEL - message"
        let (time, rest) = line.split_once(" - ").expect("a time");
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "0000-00-00 00:00:00", "{line}");
        if let Some((_, name)) = rest.split_once("Processing QM device annotations of container ") {
            is_its_own = name.split(' ').next() == Some(container);
        }
        if is_its_own {
            lines.push(rest.to_owned());
        }
    }
    lines
}

#[track_caller]
fn the_log_tells_of_it(vm: &Vm, container: &Container<'_>, by_category: &[(&str, Vec<Node>)]) {
    let name = &container.name;
    let lines = logged(vm, LOG, name);
    let is_there = |message: &str| lines.iter().any(|line| line.starts_with(message));
    let runs = lines.iter().filter(|line| line.contains("Processing QM device annotations of container ")).count();
    assert_eq!(runs, 1, "{name}: the hook runs once for {} annotations: {lines:#?}", by_category.len());
    for (category, nodes) in by_category {
        let count = nodes.len();
        let added = format!("qm-device-manager - INFO - Added {count} {category} devices to container {name}");
        assert!(is_there(&added), "{added:?} is missing in {lines:#?}");
        for node in nodes {
            let numbers: Vec<&str> = node.numbers.split(' ').collect();
            let [kind, major, minor] = numbers[..] else { panic!("{node:?}") };
            let line = format!(
                "qm-device-manager - INFO - Adding device: {} (type={kind}, major={major}, minor={minor})",
                node.path
            );
            assert!(is_there(&line), "{line:?} is missing in {lines:#?}");
        }
    }
    assert_eq!(lines.last().unwrap(), "qm-device-manager - INFO - QM Device Manager hook completed successfully");
    let others: Vec<_> = lines.iter().filter(|line| !line.starts_with("qm-device-manager - INFO - ")).collect();
    assert!(others.is_empty(), "{name}: nothing to warn of: {others:#?}");

    let lines = logged(vm, GPU_LOG, name);
    let added = format!("qm-wayland-client-devices - INFO - Added 1 wayland-client.gpu devices to container {name}");
    assert!(lines.iter().any(|line| line.starts_with(&added)), "{added:?} is missing in {lines:#?}");
}

/// The entries of the hook about that container, oldest first.
#[track_caller]
pub(crate) fn journal(vm: &Vm, container: &str) -> Vec<Value> {
    let printed = vm.ok("journalctl --sync; journalctl SYSLOG_IDENTIFIER=qm-hotplug -o json");
    let entries = printed.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    let is_its_own =
        |entry: &Value| entry["F_CONTAINER"].as_str().is_some_and(|it| it.split(' ').next() == Some(container));
    entries.filter(is_its_own).collect()
}

#[track_caller]
fn the_journal_tells_of_it(vm: &Vm, container: &Container<'_>, by_category: &[(&str, Vec<Node>)]) {
    let entries = journal(vm, &container.name);
    for (category, nodes) in
        by_category.iter().chain(&[("wayland-client.gpu", nodes_of_host(vm, "/dev/dri/renderD128"))])
    {
        let told: Vec<&Value> = entries.iter().filter(|entry| entry["F_CATEGORY"] == *category).collect();
        assert_eq!(told.len(), 1, "{}: {category}: {entries:#?}", container.name);
        assert_eq!(told[0]["F_COUNT"], nodes.len().to_string(), "{category}");
        let message = told[0]["MESSAGE"].as_str().expect("a text");
        assert!(
            message.starts_with(&format!("added {} {category} devices to {}", nodes.len(), container.name)),
            "{message}"
        );
    }
}

/// Programs and hooks as containers/qm installs them (its `oci-hooks/*/*.json`), by path alone; gone on drop.
struct NamesOfContainersQm<'vm>(&'vm Vm);

impl<'vm> NamesOfContainersQm<'vm> {
    const PROGRAMS: [(&'static str, &'static str, &'static str); 2] = [
        ("oci-qm-device-manager", r"^org\\.containers\\.qm\\.device\\..*$", "^(true|1|yes)$"),
        ("oci-qm-wayland-client-devices", r"^org\\.containers\\.qm\\.wayland-client\\..*$", "^.*$"),
    ];

    #[track_caller]
    fn install(vm: &'vm Vm) -> Self {
        let installed = Self(vm);
        vm.ok("mkdir -p /usr/libexec/oci/hooks.d /usr/share/containers/oci/hooks.d");
        for (program, annotation, value) in Self::PROGRAMS {
            let path = format!("/usr/libexec/oci/hooks.d/{program}");
            let hook = format!(
                r#"{{"version":"1.0.0","hook":{{"path":"{path}"}},"when":{{"annotations":{{"{annotation}":"{value}"}}}},"stages":["precreate"]}}"#
            );
            vm.ok(&format!(
                "ln -s /usr/local/bin/qm-hotplug {path} && echo '{hook}' >/usr/share/containers/oci/hooks.d/{program}.json"
            ));
        }
        installed
    }
}

impl Drop for NamesOfContainersQm<'_> {
    fn drop(&mut self) {
        for (program, ..) in Self::PROGRAMS {
            self.0.sh(&format!(
                "rm -f /usr/libexec/oci/hooks.d/{program} /usr/share/containers/oci/hooks.d/{program}.json"
            ));
        }
    }
}

fn under_the_names_of_containers_qm(vm: &Vm) {
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    let card = GraphicsCard::load(vm);
    let asks = format!("{ASKS_FOR_STICKS} {ASKS_FOR_GPU}");
    let _theirs = NamesOfContainersQm::install(vm);
    let mut containers = Container::run_all(vm, &[("crun", "theirs-crun", &asks)]);
    for container in &containers {
        assert_eq!(logged(vm, LOG, &container.name).len(), 5, "{}", container.name);
        assert_eq!(logged(vm, GPU_LOG, &container.name).len(), 5, "{}", container.name);
    }
    // Ours runs beside theirs.
    let installed = Packaged::install(vm);
    containers.extend(Container::run_all(vm, &[("runc", "both-runc", &asks)]));
    for container in &containers {
        for path in ["/dev/ttyUSB0", "/dev/dri/renderD128"] {
            assert_eq!(container.node(path), node(vm, path), "{}", container.name);
            assert_eq!(container.open(path), "opens", "{}: {path}", container.name);
        }
        assert_eq!(container.node("/dev/dri/card0"), "nothing", "{}", container.name);
        nothing_is_double(vm, container);
    }
    drop((containers, installed, card, stick));
}

#[track_caller]
fn nothing_is_double(vm: &Vm, container: &Container<'_>) {
    let text =
        vm.ok(&format!("cat /var/lib/containers/storage/overlay-containers/{}/userdata/config.json", container.id));
    let spec: Value = serde_json::from_str(&text).expect("a specification");
    for (list, count) in [("/linux/devices", 2), ("/linux/resources/devices", 2)] {
        let entries = spec.pointer(list).and_then(Value::as_array).cloned().unwrap_or_default();
        let ours: Vec<_> = entries.iter().filter(|it| it["major"] == 188 || it["major"] == 226).collect();
        assert_eq!(ours.len(), count, "{}: {list}: {entries:?}", container.name);
    }
}

/// A graphics card without a screen; gone on drop.
struct GraphicsCard<'vm>(&'vm Vm);

impl<'vm> GraphicsCard<'vm> {
    #[track_caller]
    fn load(vm: &'vm Vm) -> Self {
        let card = Self(vm);
        vm.ok("modprobe vgem");
        vm.wait_ok("the card", SOON, "test $(stat -c %G /dev/dri/renderD128) = render");
        card
    }
}

impl Drop for GraphicsCard<'_> {
    fn drop(&mut self) {
        self.0.sh("udevadm settle; modprobe -r vgem");
    }
}
