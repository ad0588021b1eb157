//! Programs as Debian has them, in containers with a network namespace of their own: they notice what is plugged in and
//! out when those of the host do.

use serde_json::json;

use crate::Case;
use crate::agent::Agent;
use crate::container::Container;
use crate::debian::DebianRoot;
use crate::hook::Packaged;
use crate::listeners::{HostMonitor, LISTEN, Listeners, Look, UdevEvent, sorted};
use crate::plug::{FIRST_PLUG, plug_stick};
use crate::vm::{Plugged, SOON, Vm};

pub(crate) const CASES: &[Case] = &[("clients::unmodified_programs_notice", unmodified_programs_notice)];

/// How much later than programs on the host those in containers hear of a device at most, in seconds of the emulated
/// machine, whose clock counts instructions: however busy the real one is.
const NOTICED: f64 = 0.1;

/// Serial sticks, keyboards, cameras and sound cards.
const ASKS: [&str; 4] = ["ttyUSB", "input", "video", "audio"];

fn unmodified_programs_notice(vm: &Vm) {
    let _installed = Packaged::install(vm);
    vm.ok("modprobe --all snd-seq snd-timer");
    let root = DebianRoot::make(vm, "clients");
    root.write("/out/listen", LISTEN);
    root.write("/out/clients.py", include_str!("clients.py"));
    root.write("/out/stamp.py", include_str!("stamp.py"));
    root.write("/out/look.py", include_str!("look.py"));
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
    first.look_again_and_again("aplay", "USB Audio", "aplay -l");
    first.look_again_and_again("v4l2-ctl", "vivid", "v4l2-ctl --list-devices");
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
    ["aplay", "v4l2-ctl"].iter().for_each(|program| first.wait_for_a_look(program, true));
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

    let unplug = |plugged: Plugged<'_>| {
        plugged.unplug();
        vm.ok("udevadm settle");
    };
    // Its node goes some time before the host's udevd has told of that.
    let now = || vm.ok("cut -d ' ' -f 1 /proc/uptime").parse::<f64>().expect("seconds");
    let sound_unplugged = now();
    unplug(sound);
    let camera_unplugged = now();
    vm.wait_ok("all to let go of the camera", FIRST_PLUG, "modprobe -r vivid");
    vm.ok("udevadm settle");
    ["aplay", "v4l2-ctl"].iter().for_each(|program| first.wait_for_a_look(program, false));
    first.look_no_more();
    [stick, keyboard].into_iter().for_each(unplug);
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
    sees_it_in_time(first, "aplay", "controlC0", &on_host, sound_unplugged);
    sees_it_in_time(first, "v4l2-ctl", "video0", &on_host, camera_unplugged);
    for listener in [first, second] {
        let gone = format!("grep -q 'DEVICE_REMOVED.*USB Keyboard' {}", listener.file("libinput"));
        vm.wait_ok("libinput to see the keyboard go", SOON, &gone);
        libinput_sees_it_in_time(listener, &on_host);
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

/// When the host heard of that device with that name, in seconds since the boot.
#[track_caller]
fn when(on_host: &[UdevEvent], action: &str, name: &str) -> f64 {
    let is_it = |event: &&UdevEvent| event.action == action && event.devpath.rsplit('/').next() == Some(name);
    on_host.iter().find(is_it).unwrap_or_else(|| panic!("no {action} of {name}: {on_host:#?}")).at
}

/// A program that is run again and again shows the device in each run that was begun in time, until it is about to be
/// unplugged, and not after it is gone.
#[track_caller]
fn sees_it_in_time(listener: &Listeners<'_>, program: &str, name: &str, on_host: &[UdevEvent], unplugging: f64) {
    let looks = listener.looks(program);
    let (plugged, unplugged) = (when(on_host, "add", name), when(on_host, "remove", name));
    for (what, from, to, is_there) in [("plug", plugged, unplugging, true), ("unplug", unplugged, f64::MAX, false)] {
        let its: Vec<Look> = looks.iter().copied().filter(|look| look.begun >= from && look.ended < to).collect();
        let (saw, missed): (Vec<&Look>, Vec<&Look>) = its.iter().partition(|look| look.is_there == is_there);
        assert!(!saw.is_empty(), "{program} was not run after the {what}: {looks:#?}");
        let latest = missed.iter().map(|look| look.begun - from).fold(0.0, f64::max);
        let (missed, all, latest_ms) = (missed.len(), its.len(), latest * 1e3);
        eprintln!(
            "    {program}: {missed} of {all} runs after the {what} missed it, the latest begun after {latest_ms:.1} ms"
        );
        assert!(latest <= NOTICED, "{program} missed the {what} {latest} s after the host's own event: {its:#?}");
    }
}

/// Its lines have the time at which they came.
#[track_caller]
fn libinput_sees_it_in_time(listener: &Listeners<'_>, on_host: &[UdevEvent]) {
    for (line, action) in [("DEVICE_ADDED", "add"), ("DEVICE_REMOVED", "remove")] {
        let (at, device) = listener.libinput(line, "USB Keyboard");
        let after = at - when(on_host, action, &device);
        eprintln!("    libinput: {action} {device} {:.1} ms after the host's own event", after * 1e3);
        assert!(after <= NOTICED, "libinput: {action} of {device} {after} s after the host's own event");
    }
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
