//! Programs that follow udev's events, on the machine and in containers with a Debian inside, and what they heard.

use std::time::Duration;

use crate::container::Container;
use crate::debian::DebianRoot;
use crate::vm::Vm;

/// Until all programs listen: Python and libinput take long to start here.
const LISTENING: Duration = Duration::from_secs(60);

/// What follows the events in a container; the last one names where it writes.
pub(crate) const LISTEN: &str = "\
    out=/out/$1; mkdir -p $out; exec 2>&1
    udevadm monitor --udev --property >$out/udevadm &
    python3 /out/clients.py >$out/pyudev &
    stdbuf -oL libinput debug-events | python3 /out/stamp.py >$out/libinput &
    wait";

/// The programs that listen, and their output.
pub(crate) struct Listeners<'a> {
    vm: &'a Vm,
    root: &'a DebianRoot<'a>,
    pub(crate) container: &'a Container<'a>,
}

impl<'a> Listeners<'a> {
    #[track_caller]
    pub(crate) fn start(vm: &'a Vm, root: &'a DebianRoot<'a>, container: &'a Container<'a>) -> Self {
        vm.ok(&format!("podman exec --detach {name} sh /out/listen {name}", name = container.name));
        Self { vm, root, container }
    }

    pub(crate) fn file(&self, program: &str) -> String {
        format!("{}/out/{}/{program}", self.root.path(), self.container.name)
    }

    #[track_caller]
    pub(crate) fn wait(&self, programs: &[&str]) {
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

    /// Runs a program in the container over and over, to see from when on its output has `text`.
    #[track_caller]
    pub(crate) fn look_again_and_again(&self, program: &str, text: &str, command: &str) {
        let name = &self.container.name;
        let output = format!("/out/{name}/{program}");
        let looks = format!("python3 /out/look.py \"{text}\" {command} >{output}");
        self.vm.ok(&format!("podman exec --detach {name} sh -c '{looks}'"));
        self.wait_for_a_look(program, false);
    }

    /// Waits until a run of it showed that.
    #[track_caller]
    pub(crate) fn wait_for_a_look(&self, program: &str, is_there: bool) {
        let said = if is_there { " there" } else { " not there" };
        let is_last = format!("tail -n 1 {} | grep -q '[0-9]{said}'", self.file(program));
        self.vm.wait_ok(&format!("{program} to run"), LISTENING, &is_last);
    }

    /// Ends all that runs over and over.
    pub(crate) fn look_no_more(&self) {
        self.vm.ok("pkill -f '[/]out/look.py'");
    }

    /// The runs of a program, in order.
    #[track_caller]
    pub(crate) fn looks(&self, program: &str) -> Vec<Look> {
        let look = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let mut word = || words.next().expect("two times and what was seen");
            let mut time = || word().parse().expect("seconds");
            Look { begun: time(), ended: time(), is_there: word() == "there" }
        };
        self.vm.ok(&format!("cat {}", self.file(program))).lines().map(look).collect()
    }

    /// When libinput said that of the device with that name, and the device's node: `event4`.
    #[track_caller]
    pub(crate) fn libinput(&self, said: &str, name: &str) -> (f64, String) {
        let lines = self.vm.ok(&format!("grep '{said}.*{name}' {}", self.file("libinput")));
        let mut words = lines.split_whitespace();
        let at = words.next().and_then(|at| at.parse().ok()).expect("a time");
        let device = words.next().expect("a device").trim_start_matches('-').to_owned();
        (at, device)
    }

    /// What `udevadm monitor` printed.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<UdevEvent> {
        UdevEvent::all(&self.vm.ok(&format!("cat {}", self.file("udevadm"))))
    }

    /// What pyudev heard, in the same form but without properties.
    #[track_caller]
    pub(crate) fn heard(&self) -> Vec<UdevEvent> {
        self.vm.ok(&format!("cat {}", self.file("pyudev"))).lines().filter_map(UdevEvent::of_pyudev).collect()
    }
}

/// A run of a program that looks once and ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    /// When it was begun, in seconds since the boot.
    pub(crate) begun: f64,
    /// When it ended.
    pub(crate) ended: f64,
    /// Whether it showed the device.
    pub(crate) is_there: bool,
}

/// A message of udevd.
#[derive(Debug, Clone)]
pub(crate) struct UdevEvent {
    /// When it was received, in seconds since the boot.
    pub(crate) at: f64,
    pub(crate) action: String,
    pub(crate) devpath: String,
    /// Lines `KEY=VALUE`; see [`sorted`].
    pub(crate) properties: Vec<String>,
}

impl UdevEvent {
    /// From the output of `udevadm monitor --property`.
    pub(crate) fn all(text: &str) -> Vec<Self> {
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
    pub(crate) fn of_pyudev(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let at = words.next()?.parse().ok()?;
        let (action, devpath) = (words.next()?.to_owned(), words.next()?.to_owned());
        Some(Self { at, action, devpath, properties: Vec::new() })
    }

    /// Whether it is about the device itself, at this path of the host's or below, and not about what it hangs on.
    pub(crate) fn is_of(&self, names: &[&str]) -> bool {
        let last = self.devpath.rsplit('/').next().unwrap_or_default();
        let has_node = self.properties.iter().any(|line| line.starts_with("MAJOR="));
        has_node && names.iter().any(|name| last.starts_with(name))
    }
}

/// Lines, and the words in each: links and tags are in no particular order. Properties that udevd keeps to its rules,
/// whose names begin with a dot, are not in its database.
pub(crate) fn sorted<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
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
pub(crate) struct HostMonitor<'vm>(&'vm Vm);

impl<'vm> HostMonitor<'vm> {
    const OUTPUT: &'static str = "/run/lab-host-events";

    #[track_caller]
    pub(crate) fn start(vm: &'vm Vm) -> Self {
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
    pub(crate) fn events(&self) -> Vec<UdevEvent> {
        UdevEvent::all(&self.0.ok(&format!("cat {}", Self::OUTPUT)))
    }
}

impl Drop for HostMonitor<'_> {
    fn drop(&mut self) {
        self.0.sh(&format!("systemctl stop lab-host-monitor; rm -f {}", Self::OUTPUT));
    }
}
