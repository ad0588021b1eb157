//! Any text as a selector, put to devices with any values, and as configuration files: what cannot be taken is refused
//! in one line, and what can is printed as it is read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qm_hotplug::core::category::Categories;
use qm_hotplug::core::config::ConfigFile;
use qm_hotplug::core::destination;
use qm_hotplug::core::device::{Device, Identity, Kind, Number};
use qm_hotplug::core::facts::{Facts, Sysfs};
use qm_hotplug::core::glob::Glob;
use qm_hotplug::core::grammar::{Author, selection, selector};
use qm_hotplug::core::naming::selector_for;
use qm_hotplug::core::policy::Subject;
use qm_hotplug::core::selection::Selection;
use qm_hotplug::core::settings::Settings;
use qm_hotplug::core::text::printable;

// The first line is the selector, the others are what the devices say of themselves.
fuzz_target!(|text: &str| {
    let (asked, values) = text.split_once('\n').unwrap_or((text, text));
    let bench = Bench::new(values);
    let mut enabled = Categories::default();
    let file = ConfigFile::parse("enable = ['usb', 'block']\n[category.required]\nnodes = ['/dev/robot#']").unwrap();
    enabled.apply(&file).unwrap();
    for (categories, author) in [
        (&Categories::default(), Author::Container),
        (&Categories::default(), Author::Root),
        (&enabled, Author::Container),
    ] {
        read(asked, categories, author, &bench);
    }
    glob(asked, values);
    named(&bench, &enabled);
    settings(text);
});

fn read(text: &str, categories: &Categories, author: Author, bench: &Bench) {
    let found = match selection("x", text, categories, author) {
        Ok(found) => found,
        Err(error) => {
            assert!((1..=text.chars().count() + 1).contains(&error.column), "{error}");
            return assert_one_line(&error.to_string());
        }
    };
    let again = selection("x", &found.to_string(), categories, author);
    assert_eq!(again.as_ref(), Ok(&found), "{text:?} is printed as {:?}", found.to_string());
    if let Ok(policy) = selector(text, categories) {
        assert_eq!(policy.terms, found.selector.terms);
    }
    for device in &bench.devices {
        put_to(&found, &Facts::new(device, bench));
    }
}

fn put_to(selection: &Selection, facts: &Facts<'_>) {
    let (how, failing) = (selection.matches(facts), selection.selector.failing(facts));
    assert_eq!(selection.selector.matches(facts), failing.is_none(), "{failing:?}");
    assert!(how.is_none() || !selection.selector.is_withheld(facts));
    let Some(how) = how else { return };
    for node in selection.nodes(facts.device, how, None) {
        assert!(node.path.starts_with("/dev/"), "{node:?}");
        assert_eq!(destination::check(&node.path).as_ref(), Ok(&node.path));
    }
}

fn glob(text: &str, values: &str) {
    match Glob::parse(text) {
        Err((at, _)) => assert!(at <= text.chars().count()),
        Ok(glob) => {
            let is_literal = |value: &str| glob.literal().is_none_or(|literal| literal == value);
            values.lines().filter(|value| glob.matches(value)).for_each(|value| assert!(is_literal(value)));
        }
    }
    for value in values.lines() {
        let exactly = Glob::exactly(value);
        assert!(exactly.matches(value));
        assert_eq!(Glob::parse(&exactly.to_string()), Ok(exactly));
    }
}

/// The selector that is proposed for a device means it.
fn named(bench: &Bench, categories: &Categories) {
    let all: Vec<Facts<'_>> = bench.devices.iter().map(|device| Facts::new(device, bench)).collect();
    for facts in &all {
        match selector_for(facts, &all, categories) {
            Err(reason) => assert_one_line(&reason),
            Ok(text) => {
                let found = selection("", &text, categories, Author::Container).unwrap();
                assert!(found.matches(facts).is_some(), "{text:?} does not mean {}", facts.device.node);
            }
        }
    }
}

fn settings(text: &str) {
    let good = "[category.arm]\nnodes = ['/dev/arm#']\n[[container]]\nmatch = 'web'\ndevices = ['arm']";
    let quoted = serde_json::to_string(text).unwrap();
    let files = [
        ("/etc/0.toml", good.to_owned()),
        ("/etc/1.toml", text.to_owned()),
        ("/etc/2.toml", format!("[[policy]]\nallow = [{quoted}]\ndeny = [{quoted}]\ncgroup = {quoted}")),
        ("/etc/3.toml", format!("[[container]]\nmatch = {quoted}\ndevices = ['tty']")),
        ("/etc/4.toml", format!("[[container]]\nmatch = '*'\ndevices = [{quoted}]")),
    ];
    let files = files.map(|(path, text)| (path.to_owned(), Ok(text)));
    let (settings, problems) = Settings::read(&files);
    for problem in &problems {
        assert_one_line(problem);
        let path = problem.split(':').next().unwrap();
        assert!(files[1..].iter().any(|(its, _)| its == path), "{problem}");
    }
    assert!(problems.len() < files.len());
    assert!(settings.categories.named("arm").is_some(), "{problems:?}");
    let subject = Subject { names: vec!["web".into()], ..Subject::default() };
    assert_eq!(settings.rules_for(&subject)[0].to_string(), "arm");
    let has_bad_policy = problems.iter().any(|problem| problem.starts_with("/etc/2.toml"));
    assert!(!has_bad_policy || settings.policies.unreadable.is_some(), "{problems:?}");
}

/// Fit for a terminal and a log as it is.
#[track_caller]
fn assert_one_line(text: &str) {
    assert_eq!(printable(text), text);
}

/// A stick with a serial port and a keyboard behind two hubs, a disk, and the host's memory.
struct Bench {
    devices: Vec<Device>,
    values: Vec<String>,
}

const ROOT: &str = "/devices/pci0000:00/0000:00:14.0/usb1";
/// Directory, subsystem, node and numbers.
const DEVICES: [(&str, &str, &str, u32, u32); 8] = [
    ("", "usb", "/dev/bus/usb/001/001", 189, 0),
    ("/1-1", "usb", "/dev/bus/usb/001/002", 189, 1),
    ("/1-1/1-1.2", "usb", "/dev/bus/usb/001/003", 189, 2),
    ("/1-1/1-1.2/1-1.2:1.0/ttyUSB0/tty/ttyUSB0", "tty", "/dev/ttyUSB0", 188, 0),
    ("/1-1/1-1.3", "usb", "/dev/bus/usb/001/004", 189, 3),
    ("/1-1/1-1.3/1-1.3:1.1/0003:1/input/input9/event9", "input", "/dev/input/event9", 13, 73),
    ("/virtual/mem", "mem", "/dev/mem", 1, 1),
    ("/1-1/host0/block/sda", "block", "/dev/sda", 8, 0),
];

impl Bench {
    fn new(values: &str) -> Bench {
        // An attribute has 4096 bytes at most.
        let values: Vec<String> = values.lines().take(16).map(|line| line.chars().take(1024).collect()).collect();
        let names = ["ID_SERIAL_SHORT", "ID_MODEL", "ID_VENDOR", "ID_PATH", "DEVLINKS", "CURRENT_TAGS", "ID_SEAT", "X"];
        let properties = names.map(str::to_owned).into_iter().zip(values.iter().cloned());
        let devices = DEVICES.iter().enumerate().map(|(at, (below, subsystem, node, major, minor))| Device {
            number: Number {
                kind: if *subsystem == "block" { Kind::Block } else { Kind::Char },
                major: *major,
                minor: *minor,
            },
            identity: Identity { devpath: format!("{ROOT}{below}"), inode: at as u64, diskseq: None },
            node: (*node).to_owned(),
            subsystem: (*subsystem).to_owned(),
            uid: 0,
            gid: 20,
            mode: 0o660,
            properties: properties.clone().collect(),
        });
        Bench { devices: devices.collect(), values }
    }

    fn value(&self, at: usize) -> Option<String> {
        self.values.get(at).cloned()
    }
}

impl Sysfs for Bench {
    fn read(&self, path: &str) -> Option<String> {
        let (directory, name) = path.strip_prefix(ROOT)?.rsplit_once('/')?;
        let is_usb = DEVICES.iter().any(|(its, subsystem, ..)| *its == directory && *subsystem == "usb");
        match name {
            "bDeviceClass" if is_usb => Some(if directory.ends_with(['2', '3']) { "00" } else { "09" }.to_owned()),
            "idVendor" if is_usb => Some("10c4".to_owned()),
            "idProduct" if is_usb => Some("EA60".to_owned()),
            "serial" | "product" | "manufacturer" if !is_usb => None,
            "bDeviceClass" | "idVendor" | "idProduct" => None,
            "bInterfaceNumber" => directory.rsplit_once(':').filter(|(_, end)| end.len() == 3).map(|_| "00".to_owned()),
            "dev" => DEVICES.iter().find(|it| it.0 == directory).map(|it| format!("{}:{}", it.3, it.4)),
            "serial" => self.value(8),
            "product" => self.value(9),
            "manufacturer" => self.value(10),
            "index" => self.value(11),
            _ => self.value(12 + name.len() % 4),
        }
    }

    fn link(&self, path: &str) -> Option<String> {
        self.value(path.len() % 16)
    }

    fn directories(&self, path: &str) -> Vec<String> {
        let Some(below) = path.strip_prefix(ROOT) else { return Vec::new() };
        let of = |it: &(&str, &str, &str, u32, u32)| {
            let rest = it.0.strip_prefix(below)?.strip_prefix('/')?;
            Some(rest.split('/').next()?.to_owned())
        };
        let mut names: Vec<String> = DEVICES.iter().filter_map(of).collect();
        names.dedup();
        names
    }

    fn property(&self, path: &str, name: &str) -> Option<String> {
        self.device(path)?.properties.get(name).cloned()
    }

    fn device(&self, path: &str) -> Option<Device> {
        self.devices.iter().find(|device| device.identity.devpath == path).cloned()
    }
}
