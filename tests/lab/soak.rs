//! The soak test: whatever happens, in whatever order, every container has at each quiet point just what the rules say.
//!
//! `scripts/lab.sh soak [RELEASE] [SECONDS]` runs it; `QMH_SOAK_SEED` repeats a run. What happens is drawn from the seed.
//! What is expected is computed here, from what the machine has and the containers ask for, without asking the program.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Case;
use crate::agent::status;
use crate::container::Container;
use crate::everything::{Node, nodes_of_host};
use crate::plug::FIRST_PLUG;
use crate::vm::{Plugged, Vm};

/// Not one of the tier's cases: it takes as long as it is told to.
pub(crate) const CASES: &[Case] = &[("soak::all_is_as_the_rules_say", all_is_as_the_rules_say)];

/// For how long, in the environment.
pub(crate) const SECONDS: &str = "QMH_SOAK_SECONDS";
const SEED: &str = "QMH_SOAK_SEED";

/// What can be plugged in: identities, and drivers of the emulator.
const DEVICES: [(&str, &str); 6] = [
    ("S0", "usb-serial"),
    ("S1", "usb-serial"),
    ("S2", "usb-serial"),
    ("S3", "usb-serial"),
    ("keys", "usb-kbd"),
    ("tablet", "usb-tablet"),
];
/// Denied while the policy is in force.
const DENIED: &str = "S3";
const POLICY: &str = "/etc/qm-hotplug/config.d/50-soak.toml";
const UNIT: &str = "qmh-soak";
/// How long the emulated machine may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a container asks for.
#[derive(Debug, Clone, Copy)]
enum Asks {
    Nothing,
    Sticks,
    /// One stick, whichever number it has, at this path.
    Stick(&'static str, &'static str),
    Keyboards,
    SticksAndKeyboards,
}

/// Runtimes, names and wishes.
const CONTAINERS: [(&str, &str, Asks); 6] = [
    ("crun", "soak-all", Asks::Sticks),
    ("runc", "soak-one", Asks::Stick("S1", "/dev/zigbee")),
    ("crun", "soak-none", Asks::Nothing),
    ("runc", "soak-keys", Asks::Keyboards),
    ("crun", "soak-both", Asks::SticksAndKeyboards),
    ("runc", "soak-denied", Asks::Stick(DENIED, "/dev/modem")),
];

impl Asks {
    fn annotations(self) -> String {
        const STICKS: &str = "--annotation org.containers.qm.device.ttyUSB=true";
        const KEYS: &str =
            "--annotation 'org.containers.qm.hotplug.keys=subsystem=input;devname=input/event*;usb=0627:*'";
        match self {
            Asks::Nothing => String::new(),
            Asks::Sticks => STICKS.into(),
            Asks::Stick(serial, path) => {
                format!("--annotation 'org.containers.qm.hotplug.stick=ttyUSB;serial={serial};as={path}'")
            }
            Asks::Keyboards => KEYS.into(),
            Asks::SticksAndKeyboards => format!("{STICKS} {KEYS}"),
        }
    }

    /// The nodes that it should have.
    fn expected(self, host: &Host, is_denying: bool) -> BTreeSet<Node> {
        let allowed = host.sticks.iter().filter(|(serial, _)| !is_denying || *serial != DENIED);
        let sticks = || allowed.clone().map(|(_, node)| node.clone());
        match self {
            Asks::Nothing => BTreeSet::new(),
            Asks::Sticks => sticks().collect(),
            Asks::Stick(wanted, path) => {
                let its = allowed.clone().filter(|(serial, _)| *serial == wanted);
                its.map(|(_, node)| Node { path: path.into(), ..node.clone() }).collect()
            }
            Asks::Keyboards => host.keyboards.iter().cloned().collect(),
            Asks::SticksAndKeyboards => sticks().chain(host.keyboards.iter().cloned()).collect(),
        }
    }
}

/// What the machine has plugged in, as sysfs and its `/dev` say.
struct Host {
    /// By serial number.
    sticks: BTreeMap<String, Node>,
    keyboards: Vec<Node>,
}

impl Host {
    fn look(vm: &Vm) -> Host {
        let serials = vm.ok("for tty in /sys/class/tty/ttyUSB*; do test -e $tty/device || continue; \
             echo /dev/${tty##*/} $(cat $(readlink -f $tty/device)/../../serial); done");
        let serials: BTreeMap<&str, &str> = serials.lines().filter_map(|line| line.split_once(' ')).collect();
        let sticks = nodes_of_host(vm, "/dev/ttyUSB*");
        let sticks = sticks.into_iter().filter_map(|node| Some(((*serials.get(&*node.path)?).to_owned(), node)));
        let events = vm.ok("for event in /sys/class/input/event*; do case $(readlink -f $event) in *:0627:*) \
             echo /dev/input/${event##*/};; esac; done");
        let keyboards = if events.is_empty() { vec![] } else { nodes_of_host(vm, &events.replace('\n', " ")) };
        Host { sticks: sticks.collect(), keyboards }
    }
}

/// Numbers from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// The machine and what is going on in it.
struct Soak<'vm> {
    vm: &'vm Vm,
    dice: Dice,
    plugged: BTreeMap<&'static str, Plugged<'vm>>,
    containers: BTreeMap<&'static str, (Container<'vm>, Asks)>,
    is_running: bool,
    is_denying: bool,
    /// What was done, for who reads of a failure.
    story: Vec<String>,
}

impl Drop for Soak<'_> {
    fn drop(&mut self) {
        self.vm.sh(&format!("systemctl stop {UNIT}; rm -f {POLICY}; qm-hotplug agent --release"));
    }
}

fn all_is_as_the_rules_say(vm: &Vm) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = number(SECONDS).expect("it is run by scripts/lab.sh soak");
    let random =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_micros() as u64;
    let seed = number(SEED).unwrap_or_else(random);
    eprintln!("    {SEED}={seed} repeats this run");
    let mut soak = Soak {
        vm,
        dice: Dice(seed),
        plugged: BTreeMap::new(),
        containers: BTreeMap::new(),
        is_running: false,
        is_denying: false,
        story: Vec::new(),
    };
    // The drivers are loaded once: that takes long here.
    drop([vm.plug("S0", "usb-serial", json!({ "serial": "S0" })), vm.plug("keys", "usb-kbd", json!({}))]);
    vm.ok("mkdir -p /etc/qm-hotplug/config.d; modprobe --all usbserial ftdi_sio usbhid");
    soak.start_agent();
    let (until, mut quiet_points) = (Instant::now() + Duration::from_secs(seconds), 0);
    while Instant::now() < until {
        for _ in 0..1 + soak.dice.below(6) {
            soak.act();
        }
        soak.compare();
        quiet_points += 1;
    }
    let acts = soak.story.len();
    // In the end nothing is left of it.
    soak.plugged.clear();
    soak.containers.clear();
    soak.compare();
    vm.wait("the last entries to go", PATIENCE, |vm| (status(vm)["entries"] == 0).then_some(()));
    assert_eq!(vm.ok("ls /run/qm-hotplug/ledger"), "", "the ledger is empty");
    eprintln!("    {acts} acts, {quiet_points} quiet points in {seconds} s");
}

impl Soak<'_> {
    /// Something happens.
    fn act(&mut self) {
        let story = match self.dice.below(20) {
            0..8 => self.plug_or_unplug(),
            8..12 => self.start_or_remove(),
            12 => self.with_some_container("podman restart --time 0"),
            13 => self.with_some_container("podman update --cpu-shares 512"),
            14 | 15 => self.kill_or_start_agent(),
            16 | 17 => self.change_policy(),
            18 => self.command("udevd", "systemctl restart systemd-udevd"),
            _ => self.command("daemon-reload", "systemctl daemon-reload"),
        };
        self.story.push(story);
    }

    fn plug_or_unplug(&mut self) -> String {
        let (id, driver) = DEVICES[self.dice.below(DEVICES.len())];
        if self.plugged.remove(id).is_some() {
            return format!("unplug {id}");
        }
        let properties = if driver == "usb-serial" { json!({ "serial": id }) } else { json!({}) };
        self.plugged.insert(id, self.vm.plug(id, driver, properties));
        format!("plug {id}")
    }

    fn start_or_remove(&mut self) -> String {
        let (runtime, name, asks) = CONTAINERS[self.dice.below(CONTAINERS.len())];
        if self.containers.remove(name).is_some() {
            return format!("remove {name}");
        }
        let container = Container::run(self.vm, runtime, name, &asks.annotations());
        self.containers.insert(name, (container, asks));
        format!("start {name}")
    }

    fn with_some_container(&mut self, command: &str) -> String {
        if self.containers.is_empty() {
            return "nothing".into();
        }
        let at = self.dice.below(self.containers.len());
        let (container, _) = self.containers.values_mut().nth(at).expect("one of them");
        self.vm.ok(&format!("{command} {}", container.name));
        if command.contains("restart") {
            container.look_again();
        }
        format!("{command} {}", container.name)
    }

    fn kill_or_start_agent(&mut self) -> String {
        if !self.is_running {
            self.start_agent();
            return "start the agent".into();
        }
        self.vm
            .ok(&format!("systemctl kill --signal=KILL {UNIT}; while systemctl --quiet is-active {UNIT}; do :; done"));
        self.is_running = false;
        "kill the agent".into()
    }

    fn start_agent(&mut self) {
        self.vm.ok(&format!(
            "systemctl reset-failed {UNIT} 2>/dev/null; \
             systemd-run --quiet --unit={UNIT} --service-type=notify --collect /usr/local/bin/qm-hotplug agent",
        ));
        self.is_running = true;
    }

    fn change_policy(&mut self) -> String {
        self.is_denying = !self.is_denying;
        let change = match self.is_denying {
            true => format!("printf '[[policy]]\\ndeny = [\"serial={DENIED}\"]\\n' >{POLICY}"),
            false => format!("rm {POLICY}"),
        };
        self.vm.ok(&change);
        if self.is_running {
            self.vm.ok(&format!("systemctl kill --signal=HUP {UNIT}"));
        }
        format!("policy {}", self.is_denying)
    }

    fn command(&self, what: &str, command: &str) -> String {
        self.vm.ok(command);
        what.into()
    }

    /// A quiet point: nothing happens any more, and the agent runs. Nodes and rights are compared with the rules.
    fn compare(&mut self) {
        if !self.is_running {
            self.start_agent();
        }
        self.vm.wait("the emulator's devices", FIRST_PLUG, |vm| {
            let sticks = self.plugged.keys().filter(|id| id.starts_with('S')).count();
            vm.ok("udevadm settle");
            let host = Host::look(vm);
            (host.sticks.len() == sticks && host.keyboards.len() == self.plugged.len() - sticks).then_some(())
        });
        let until = Instant::now() + PATIENCE;
        loop {
            let host = Host::look(self.vm);
            let wrong: Vec<String> = self.containers.values().filter_map(|it| self.what_is_wrong(&host, it)).collect();
            if wrong.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "{}\n{}", wrong.join("\n"), self.story.join(", "));
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn what_is_wrong(&self, host: &Host, (container, asks): &(Container<'_>, Asks)) -> Option<String> {
        let expected = asks.expected(host, self.is_denying);
        let found: BTreeSet<Node> = container.nodes().into_iter().collect();
        if found != expected {
            return Some(format!("{} has {found:?} instead of {expected:?}", container.name));
        }
        // Each number that any of these devices ever had.
        let numbers: Vec<String> =
            (0..4).map(|n| format!("c 188 {n}")).chain((64..76).map(|n| format!("c 13 {n}"))).collect();
        let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
        let opened = container.open_all_by_hand(&numbers);
        let wrong = numbers.iter().zip(opened).find(|(number, opened)| {
            let may = expected.iter().any(|node| node.numbers == **number);
            may != (opened == "opens") || !may && opened != "Operation not permitted"
        });
        wrong.map(|(number, opened)| format!("{}: {number}: {opened}; it should have {expected:?}", container.name))
    }
}
