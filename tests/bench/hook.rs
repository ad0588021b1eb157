//! The precreate hook as a whole process, beside one that only copies and one that is written in shell.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{FileType, Mode, makedev, mknodat};
use serde_json::{Value, json};

use crate::figure::{Figure, median, sample};
use crate::support::BINARY;

/// A container that podman 5.4 has made for crun.
const CONFIG: &str = include_str!("../fixtures/trixie/crun/config.json");
const SHELL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/shell-hook.sh");

/// The categories of containers/qm: nodes with `#` for their number, the driver's number, and how many there are on a
/// small and on a large machine.
const CATEGORIES: [(&str, &str, u32, usize, usize); 7] = [
    ("audio", "snd/pcmC0D#p", 116, 4, 10),
    ("video", "video#", 81, 3, 8),
    ("input", "input/event#", 13, 3, 16),
    ("ttys", "tty#", 4, 8, 8),
    ("ttyUSB", "ttyUSB#", 188, 2, 8),
    ("dvb", "dvb/adapter#/frontend0", 212, 2, 6),
    ("radio", "radio#", 82, 1, 4),
];

/// What else is in a host's `/dev` and is nobody's business here.
const OTHERS: [(&str, u32, usize); 4] = [("vcs#", 7, 64), ("vcsa#", 7, 64), ("ttyS#", 204, 32), ("hwrng#", 10, 16)];

const RUNS: usize = 300;

pub fn figures() -> Vec<Figure> {
    let has_jq = Command::new("jq").arg("--version").output().is_ok_and(|said| said.status.success());
    if !has_jq {
        println!("skipped: the hook in shell, since jq is not installed");
    }
    let mut figures = Vec::new();
    let nothing = Case { name: "no annotation of ours", annotations: &[], devices: 0, runs_of_shell: 50 };
    let categories: Vec<&str> = CATEGORIES.iter().map(|row| row.0).collect();
    let small = Case { name: "7 categories, 23 devices", annotations: &categories, devices: 23, runs_of_shell: 10 };
    let large = Case { name: "7 categories, 60 devices", annotations: &categories, devices: 60, runs_of_shell: 5 };
    for (case, target) in [(nothing, "≤ 1.5 × /bin/cat"), (small, ""), (large, "≤ 3 ms")] {
        let _host = Host::with(case.devices);
        figures.extend(case.measure(target, has_jq));
    }
    figures
}

/// A container to be started.
struct Case<'a> {
    name: &'static str,
    annotations: &'a [&'a str],
    devices: usize,
    runs_of_shell: usize,
}

impl Case<'_> {
    fn measure(&self, target: &'static str, has_jq: bool) -> Vec<Figure> {
        let input = self.input();
        let (mut cat, mut hook) = (Vec::new(), Vec::new());
        self.check(&output(BINARY, &["precreate"], &input).1);
        // By turns: what else the machine does meets both.
        for _ in 0..RUNS {
            cat.push(output("/bin/cat", &[], &input).0);
            hook.push(output(BINARY, &["precreate"], &input).0);
        }
        let ratio = median(&hook).as_secs_f64() / median(&cat).as_secs_f64();
        let target = format!("{target}{}here {ratio:.2} × /bin/cat", if target.is_empty() { "" } else { "; " });
        let mut figures = vec![
            Figure::new(format!("hook, {}", self.name), hook, target),
            Figure::new("for comparison: /bin/cat on the same", cat, ""),
        ];
        if has_jq {
            self.check(&output(SHELL, &[], &input).1);
            let shell = sample(self.runs_of_shell, || drop(output(SHELL, &[], &input)));
            figures.push(Figure::new("for comparison: bash, jq, find and stat", shell, ""));
        }
        figures
    }

    /// The file with config.json as the container's engine has it.
    fn input(&self) -> PathBuf {
        let mut spec: Value = serde_json::from_str(CONFIG).unwrap();
        let annotations = spec["annotations"].as_object_mut().unwrap();
        annotations.retain(|key, _| !key.starts_with("org.containers.qm."));
        for category in self.annotations {
            annotations.insert(format!("org.containers.qm.device.{category}"), json!("true"));
        }
        let path = Path::new("/dev/shm/config.json");
        std::fs::write(path, spec.to_string()).unwrap();
        path.to_owned()
    }

    /// Only what does the work is measured.
    fn check(&self, output: &[u8]) {
        let spec: Value = serde_json::from_slice(output).unwrap();
        for (pointer, before) in [("/linux/devices", 0), ("/linux/resources/devices", 1)] {
            let there = spec.pointer(pointer).and_then(Value::as_array).map_or(0, Vec::len);
            assert_eq!(there, before + self.devices, "{pointer}, {}", self.name);
        }
    }
}

/// The whole process, until the last byte of its output is read and it is gone.
fn output(program: &str, arguments: &[&str], input: &Path) -> (Duration, Vec<u8>) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(File::open(input).unwrap()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let start = Instant::now();
    let output = command.output().unwrap();
    let time = start.elapsed();
    assert!(output.status.success(), "{program}: {output:?}");
    // What the container would be shown of udev; it never starts.
    let _ = std::fs::remove_dir_all("/run/qm-hotplug/udev");
    (time, output.stdout)
}

/// What [`Host`] replaces.
const PLACES: [&str; 3] = ["/dev", "/sys/dev/char", "/var/log"];

/// A `/dev` with as many devices of the categories, what the kernel says of them, and a `/var/log` that nobody keeps.
/// Gone when dropped.
struct Host;

impl Host {
    fn with(devices: usize) -> Host {
        for place in PLACES {
            mount(Some("none"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).unwrap();
        }
        std::fs::create_dir("/dev/shm").unwrap();
        std::os::unix::fs::symlink("/proc/self/fd", "/dev/fd").unwrap();
        for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
            node(name, 1, minor);
        }
        for (pattern, major, count) in OTHERS {
            nodes(pattern, major, count);
        }
        let mut there = 0;
        for (_, pattern, major, few, many) in CATEGORIES {
            let count = if devices > 23 { many } else { few.min(devices) };
            nodes(pattern, major, count);
            there += count;
        }
        assert_eq!(there, devices);
        Host
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for place in PLACES {
            umount2(place, MntFlags::MNT_DETACH).unwrap();
        }
    }
}

fn nodes(pattern: &str, major: u32, count: usize) {
    for minor in 0..count as u32 {
        node(&pattern.replace('#', &minor.to_string()), major, minor);
    }
}

fn node(name: &str, major: u32, minor: u32) {
    let path = Path::new("/dev").join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mode = Mode::from_raw_mode(0o666);
    mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, mode, makedev(major, minor)).unwrap();
    let known = format!("/sys/dev/char/{major}:{minor}");
    // Some of what is nobody's business has numbers twice.
    std::fs::create_dir_all(&known).unwrap();
    std::fs::write(format!("{known}/uevent"), format!("MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\n")).unwrap();
}
