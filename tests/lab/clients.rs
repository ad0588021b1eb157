//! Programs as Debian has them, in containers with a network namespace of their own: they notice what is plugged in and
//! out when those of the host do.

use std::time::Duration;

use serde_json::json;

use crate::Case;
use crate::agent::Agent;
use crate::container::Container;
use crate::debian::DebianRoot;
use crate::hook::Packaged;
use crate::plug::{FIRST_PLUG, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("clients::unmodified_programs_notice", unmodified_programs_notice)];

/// Until all programs listen: Python and libinput take long to start here.
const LISTENING: Duration = Duration::from_secs(60);

/// How much later than programs on the host those in containers hear of a device at most, in seconds of the emulated
/// machine, whose clock counts instructions: however busy the real one is.
const NOTICED: f64 = 0.1;

/// What follows the events in a container; the last one names where it writes.
const LISTEN: &str = "\
    out=/out/$1; mkdir -p $out; exec 2>&1
    udevadm monitor --udev --property >$out/udevadm &
    python3 /out/clients.py >$out/pyudev &
    stdbuf -oL libinput debug-events | python3 /out/stamp.py >$out/libinput &
    wait";

/// Serial sticks, keyboards, cameras and sound cards.
const ASKS: [&str; 4] = ["ttyUSB", "input", "video", "audio"];

/// The programs that listen, and their output.
struct Listeners<'a> {
    vm: &'a Vm,
    root: &'a DebianRoot<'a>,
    container: &'a Container<'a>,
}

impl<'a> Listeners<'a> {
    #[track_caller]
    fn start(vm: &'a Vm, root: &'a DebianRoot<'a>, container: &'a Container<'a>) -> Self {
        vm.ok(&format!("podman exec --detach {name} sh /out/listen {name}", name = container.name));
        Self { vm, root, container }
    }

    fn file(&self, program: &str) -> String {
        format!("{}/out/{}/{program}", self.root.path(), self.container.name)
    }

    #[track_caller]
    fn wait(&self, programs: &[&str]) {
        let name = &self.container.name;
        for program in programs {
            let line = match *program {
                "udevadm" => "^UDEV - ",
                "pyudev" => "^listening",
                // The devices that are there.
                _ => ".",
            };
            let is_there = format!("grep -q '{line}' {}", self.file(program));
            self.vm.wait_ok(&format!("{program} in {name} to listen"), LISTENING, &is_there);
        }
    }

    /// What `udevadm monitor` printed.
    #[track_caller]
    fn events(&self) -> Vec<UdevEvent> {
        UdevEvent::all(&self.vm.ok(&format!("cat {}", self.file("udevadm"))))
    }

    /// What pyudev heard, in the same form but without properties.
    #[track_caller]
    fn heard(&self) -> Vec<UdevEvent> {
        self.vm.ok(&format!("cat {}", self.file("pyudev"))).lines().filter_map(UdevEvent::of_pyudev).collect()
    }
}

/// A message of udevd.
#[derive(Debug, Clone)]
struct UdevEvent {
    /// When it was received, in seconds since the boot.
    at: f64,
    action: String,
    devpath: String,
    /// Lines `KEY=VALUE`; see [`sorted`].
    properties: Vec<String>,
}

impl UdevEvent {
    /// From the output of `udevadm monitor --property`.
    fn all(text: &str) -> Vec<Self> {
        let mut events = Vec::new();
        for paragraph in text.split("\n\n") {
            let mut lines = paragraph.lines();
            let Some(head) = lines.find_map(|line| line.strip_prefix("UDEV  [")) else { continue };
            let (at, rest) = head.split_once(']').expect("a time");
            let mut words = rest.split_whitespace();
            let mut word = || words.next().expect("an action and a path").to_owned();
            let (action, devpath) = (word(), word());
            let properties = sorted(lines);
            events.push(Self { at: at.parse().expect("seconds"), action, devpath, properties });
        }
        events
    }

    /// From a line of `clients.py`.
    fn of_pyudev(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let at = words.next()?.parse().ok()?;
        let (action, devpath) = (words.next()?.to_owned(), words.next()?.to_owned());
        Some(Self { at, action, devpath, properties: Vec::new() })
    }

    /// Whether it is about the device itself, at this path of the host's or below, and not about what it hangs on.
    fn is_of(&self, names: &[&str]) -> bool {
        let last = self.devpath.rsplit('/').next().unwrap_or_default();
        let has_node = self.properties.iter().any(|line| line.starts_with("MAJOR="));
        has_node && names.iter().any(|name| last.starts_with(name))
    }
}

/// Lines, and the words in each: links and tags are in no particular order. Properties that udevd keeps to its rules,
/// whose names begin with a dot, are not in its database.
fn sorted<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let in_order = |line: &str| {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let separator = if key.ends_with("TAGS") { ':' } else { ' ' };
        let mut words: Vec<&str> = value.split(separator).collect();
        words.sort_unstable();
        format!("{key}={}", words.join(" "))
    };
    let mut lines: Vec<String> = lines.filter(|line| !line.starts_with('.')).map(in_order).collect();
    lines.sort();
    lines
}

/// `udevadm monitor` of the host; ended on drop.
struct HostMonitor<'vm>(&'vm Vm);

impl<'vm> HostMonitor<'vm> {
    const OUTPUT: &'static str = "/run/lab-host-events";

    #[track_caller]
    fn start(vm: &'vm Vm) -> Self {
        vm.ok(&format!(
            "systemd-run --quiet --collect --unit=lab-host-monitor -p StandardOutput=file:{0} \
             udevadm monitor --udev --property",
            Self::OUTPUT,
        ));
        let monitor = Self(vm);
        vm.wait_ok("the host's monitor", LISTENING, &format!("grep -q '^UDEV - ' {}", Self::OUTPUT));
        monitor
    }

    #[track_caller]
    fn events(&self) -> Vec<UdevEvent> {
        UdevEvent::all(&self.0.ok(&format!("cat {}", Self::OUTPUT)))
    }
}

impl Drop for HostMonitor<'_> {
    fn drop(&mut self) {
        self.0.sh(&format!("systemctl stop lab-host-monitor; rm -f {}", Self::OUTPUT));
    }
}

fn unmodified_programs_notice(vm: &Vm) {
    let _installed = Packaged::install(vm);
    vm.ok("modprobe --all snd-seq snd-timer");
    let root = DebianRoot::make(vm, "clients");
    root.write("/out/listen", LISTEN);
    root.write("/out/clients.py", include_str!("clients.py"));
    root.write("/out/stamp.py", include_str!("stamp.py"));
    // One started before the agent, which had nothing of the hook's either, is no different: see the runtime tier.
    let agent = Agent::start(vm);
    let all: String = ASKS.map(|name| format!("--annotation org.containers.qm.device.{name}=true ")).concat();
    let sticks = "--annotation org.containers.qm.device.ttyUSB=true";
    // Two that share a network, as in a pod, and hear of each device once; and one alone.
    let mut asking = root.run_all(&[("crun", "all-crun", &all)], "sleep 100000");
    let all_and_network = format!("{all} --network=container:all-crun");
    let others = [("runc", "all-runc", &*all_and_network), ("runc", "sticks-runc", sticks)];
    asking.extend(root.run_all(&others, "sleep 100000"));
    let deaf = root.run_all(&[("crun", "deaf-crun", "")], "sleep 100000").remove(0);
    let host = HostMonitor::start(vm);
    let listeners: Vec<Listeners<'_>> =
        asking.iter().chain([&deaf]).map(|container| Listeners::start(vm, &root, container)).collect();
    listeners[..2].iter().for_each(|listener| listener.wait(&["udevadm", "pyudev", "libinput"]));
    let [first, second, sticks_alone, hears_nothing] = &listeners[..] else { unreachable!() };
    [sticks_alone, hears_nothing].iter().for_each(|listener| listener.wait(&["udevadm", "pyudev"]));

    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    asking.iter().for_each(|container| container.wait_for("/dev/ttyUSB0"));
    shows_what_the_host_shows(vm, &asking, &deaf);
    let keyboard = vm.plug("keyboard", "usb-kbd", json!({}));
    for listener in [first, second] {
        let has_it = format!("grep -q 'DEVICE_ADDED.*USB Keyboard' {}", listener.file("libinput"));
        vm.wait_ok("libinput to see the keyboard", FIRST_PLUG, &has_it);
    }
    let listed = |command: &str| -> Vec<String> {
        let all = vm.ok(command);
        let keyboards = all.split("\n\n").filter(|one| one.contains("USB Keyboard"));
        // Groups are counted among the devices that a program sees.
        let lines = |one: &str| one.lines().filter(|line| !line.starts_with("Group:")).collect::<Vec<_>>().join("\n");
        keyboards.map(lines).collect()
    };
    let on_host = listed("libinput list-devices");
    assert_eq!(on_host.len(), 1, "{on_host:?}");
    for container in &asking[..2] {
        assert_eq!(listed(&format!("podman exec {} libinput list-devices", container.name)), on_host);
    }
    // One after the other: how long a device takes is measured.
    let sound = vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" }));
    vm.wait_ok("the sound card", FIRST_PLUG, "test -c /dev/snd/controlC0 && udevadm settle");
    vm.sh_within(FIRST_PLUG, "modprobe vivid n_devs=1");
    vm.wait_ok("the camera", FIRST_PLUG, "test -c /dev/video0 && udevadm settle");
    for container in &asking[..2] {
        container.wait_for("/dev/video0");
        container.wait_for("/dev/snd/controlC0");
        let name = &container.name;
        let cameras = vm.ok(&format!("podman exec {name} v4l2-ctl --list-devices"));
        assert!(cameras.contains("vivid") && cameras.contains("/dev/video0"), "{name}: {cameras}");
        let cards = vm.ok(&format!("podman exec {name} aplay -l"));
        assert!(cards.contains("USB Audio"), "{name}: {cards}");
    }
    let wholes = wholes(vm);
    for directory in &wholes {
        let info = format!("udevadm info {directory}");
        for container in &asking[..2] {
            let shown = vm.ok(&format!("podman exec {} {info}", container.name));
            assert_eq!(sorted(shown.lines()), sorted(vm.ok(&info).lines()), "{}", container.name);
        }
        let shown = vm.ok(&format!("podman exec {} {info}", asking[2].name));
        assert!(!shown.contains("ID_BUS"), "{} was not granted any of it: {shown}", asking[2].name);
    }

    for plugged in [stick, keyboard, sound] {
        plugged.unplug();
        vm.ok("udevadm settle");
    }
    vm.wait_ok("udev to let go of the camera", FIRST_PLUG, "modprobe -r vivid");
    vm.ok("udevadm settle");
    let is_gone = "! test -e /dev/ttyUSB0 && ! test -e /dev/video0 && ! test -e /dev/snd/controlC0";
    for container in &asking {
        vm.wait_ok("all to go", SOON, &container.outside(&format!("sh -c '{is_gone}'")));
    }
    for container in &asking[..2] {
        let name = &container.name;
        let shown = vm.sh(&format!("podman exec {name} sh -c 'v4l2-ctl --list-devices; aplay -l' 2>&1")).stdout;
        assert!(!shown.contains("vivid") && !shown.contains("USB Audio"), "{name}: {shown}");
    }
    let on_host = host.events();
    for listener in [first, second] {
        let gone = format!("grep -q 'DEVICE_REMOVED.*USB Keyboard' {}", listener.file("libinput"));
        vm.wait_ok("libinput to see the keyboard go", SOON, &gone);
        hear_what_the_host_hears(
            listener,
            &on_host,
            &["ttyUSB", "event", "mouse", "video", "media", "pcm", "controlC"],
        );
        for directory in &wholes {
            let devpath = directory.trim_start_matches("/sys");
            let actions: Vec<String> =
                listener.events().into_iter().filter(|its| its.devpath == devpath).map(|its| its.action).collect();
            let (first, last) = (actions.first().map(String::as_str), actions.last().map(String::as_str));
            assert_eq!((first, last), (Some("add"), Some("remove")), "{devpath}: {actions:?}");
            assert!(actions[1..actions.len() - 1].iter().all(|action| action == "change"), "{devpath}: {actions:?}");
        }
    }
    hear_what_the_host_hears(sticks_alone, &on_host, &["ttyUSB"]);
    let heard: Vec<UdevEvent> = sticks_alone.events();
    assert!(heard.iter().all(|event| event.is_of(&["ttyUSB"])), "more than it was granted: {heard:#?}");
    let heard = hears_nothing.events();
    assert!(heard.is_empty(), "a container without grants heard of {heard:#?}");
    agent.print_times("clients");
    replugged_at_once(vm, &agent, first);
}

/// A sound card is unplugged and plugged in again before the agent comes to it.
#[track_caller]
fn replugged_at_once(vm: &Vm, agent: &Agent<'_>, listener: &Listeners<'_>) {
    let plug = || {
        let sound = vm.plug("sound", "usb-audio", json!({ "audiodev": "silence" }));
        vm.wait_ok("the sound card", FIRST_PLUG, "test -c /dev/snd/controlC0 && udevadm settle");
        sound
    };
    let of_card = || -> Vec<String> {
        let events = listener.events().into_iter().filter(|its| its.devpath.ends_with("/sound/card0"));
        events.map(|its| its.action).filter(|action| action != "change").collect()
    };
    let before = of_card().len();
    let sound = plug();
    listener.container.wait_for("/dev/snd/controlC0");
    agent.pause(true);
    sound.unplug();
    vm.wait_ok("the sound card to go", FIRST_PLUG, "! test -e /dev/snd/controlC0 && udevadm settle");
    let sound = plug();
    agent.pause(false);
    let heard = |count: usize| {
        vm.wait("the card's events", SOON, |_| (of_card().len() >= before + count).then_some(()));
    };
    heard(3);
    sound.unplug();
    heard(4);
    assert_eq!(of_card()[before..], ["add", "remove", "add", "remove"]);
    listener.container.wait_for_no("/dev/snd/controlC0");
}

/// The sound card and the keyboard's input device: they have no node, but their parts have, which were granted.
#[track_caller]
fn wholes(vm: &Vm) -> Vec<String> {
    let found = vm.ok("readlink -f /sys/class/sound/card0; readlink -f /sys/class/input/event*/device | grep /usb");
    let wholes: Vec<String> = found.lines().map(str::to_owned).collect();
    assert!(wholes.len() > 1, "{wholes:?}");
    wholes
}

/// The same database and links, and nothing of devices that were not granted.
#[track_caller]
fn shows_what_the_host_shows(vm: &Vm, asking: &[Container<'_>], deaf: &Container<'_>) {
    let info = "udevadm info /dev/ttyUSB0";
    let links = "sh -c 'cd /dev/serial/by-id && for link in *; do echo $link $(readlink $link); done'";
    // Not from outside: udevadm 257 needs a /proc that knows it.
    let exec = |container: &Container<'_>, command: &str| format!("podman exec {} {command}", container.name);
    let (by_udev, linked) = (sorted(vm.ok(info).lines()), vm.ok(links));
    for container in asking {
        vm.wait_ok("the links", SOON, &container.outside("test -e /dev/serial/by-id"));
        assert_eq!(sorted(vm.ok(&exec(container, info)).lines()), by_udev, "{}", container.name);
        assert_eq!(vm.ok(&exec(container, links)), linked, "{}", container.name);
    }
    let [.., sticks_alone] = asking else { unreachable!() };
    assert_eq!(vm.ok(&sticks_alone.outside("ls /run/udev/data")), "c188:0");
    let seen = vm.ok(&deaf.outside("sh -c 'ls /run/udev/data /dev/serial 2>/dev/null; true'"));
    assert_eq!(seen, "", "{}", deaf.name);
}

/// Each event that the host heard of these devices, exactly as often, and with the same properties.
#[track_caller]
fn hear_what_the_host_hears(listener: &Listeners<'_>, on_host: &[UdevEvent], names: &[&str]) {
    let name = &listener.container.name;
    let (by_udevadm, by_pyudev) = (listener.events(), listener.heard());
    let (mut latest, mut of_latest) = (f64::MIN, String::new());
    let mut count = 0;
    for event in on_host.iter().filter(|event| event.is_of(names)) {
        let is_it = |its: &&UdevEvent| its.action == event.action && its.devpath == event.devpath;
        let of_host = on_host.iter().filter(is_it).count();
        for (program, heard) in [("udevadm", &by_udevadm), ("pyudev", &by_pyudev)] {
            let found: Vec<&UdevEvent> = heard.iter().filter(is_it).collect();
            assert_eq!(found.len(), of_host, "{program} in {name}: {event:#?}\n{found:#?}");
            let nearest = found.iter().map(|its| its.at - event.at).min_by(|a, b| a.abs().total_cmp(&b.abs()));
            let after = nearest.expect("one at least");
            if after > latest {
                (latest, of_latest) = (after, format!("{program}: {} {}", event.action, event.devpath));
            }
        }
        if event.action != "remove" {
            let its = by_udevadm.iter().find(is_it).expect("it was counted");
            assert_eq!(its.properties, event.properties, "{name}: {} {}", event.action, event.devpath);
        }
        count += 1;
    }
    assert!(count > 1, "the host heard of {names:?} too little: {on_host:#?}");
    eprintln!("    {name}: {count} events, the latest {:.1} ms after the host's own ({of_latest})", latest * 1e3);
    assert!(latest <= NOTICED, "{name}: {latest} s after the host's own event: {of_latest}");
}
