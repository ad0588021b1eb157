//! A thousand rules of containers, put to the device of one event: a real one of this host, and a stick behind two hubs
//! that is made of files, for the host may have none.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use qm_hotplug::core::annotation::{HOTPLUG_PREFIX, rules};
use qm_hotplug::core::category::Categories;
use qm_hotplug::core::device::{Device, Identity, Kind, Number};
use qm_hotplug::core::facts::{Facts, Sysfs};
use qm_hotplug::core::ledger::Holder;
use qm_hotplug::core::matcher::{Asking, settle};
use qm_hotplug::core::plan::changes;
use qm_hotplug::core::policy::Bounds;
use qm_hotplug::core::rule::Rule;
use qm_hotplug::sys::sysfs::KernelSysfs;
use qm_hotplug::sys::udev;

use crate::figure::{Figure, sample};

const RULES: usize = 1000;
const ROUNDS: usize = 200;

pub fn figures() -> Vec<Figure> {
    let rules = different_rules();
    let all = udev::scan().unwrap();
    let depth = |device: &&Device| device.identity.devpath.matches('/').count();
    let deepest = all.iter().filter(|device| device.number.kind == Kind::Char).max_by_key(depth).unwrap();
    println!("the deepest device of this host: {}", deepest.identity.devpath);
    let mut figures = measure(&rules, deepest, KernelSysfs::default, "a real device");
    let bench = Bench::mount();
    let stick = &bench.devices[&*bench.stick()];
    figures.extend(measure(&rules, stick, || bench.look(), "a stick behind two hubs"));
    figures.extend(hostile(stick, || bench.look()));
    figures
}

/// What containers can make an event cost at most: as many of the dearest terms as they may have.
fn hostile<S: Sysfs>(device: &Device, look: impl Fn() -> S) -> Vec<Figure> {
    let terms = |count: usize, term: &dyn Fn(usize) -> String| {
        ["tty".to_owned()].into_iter().chain((0..count).map(term)).collect::<Vec<_>>().join(",")
    };
    let parents = terms(15, &|at| format!("parent!=usb=05e3:{at:04x}"));
    let attributes = terms(31, &|at| format!("attrs.x{at}!=1"));
    let globs = terms(31, &|at| format!("attrs.long!=\"*{}{at}\"", "?".repeat(100)));
    let mut figures = Vec::new();
    for (name, text) in [("15 parent=", &parents), ("31 attrs.", &attributes), ("31 long globs", &globs)] {
        // As many as one container may have.
        let count = ((16 << 10) / text.len()).min(64);
        let asked = (0..count).map(|at| (format!("{HOTPLUG_PREFIX}rule{at}"), format!("{text},as=/dev/x{at}")));
        let all = read(asked.collect());
        let cold = sample(10, || {
            let sysfs = look();
            let facts = Facts::new(device, &sysfs);
            assert_eq!(all.iter().filter(|rule| rule.matches(&facts).is_some()).count(), count);
        });
        figures.push(Figure::new(format!("{count} selectors with {name} in one container"), cold, ""));
    }
    let few = read((0..64).map(|at| (format!("{HOTPLUG_PREFIX}rule{at}"), format!("tty,as=/dev/x{at}"))).collect());
    let none = read((0..64).map(|at| (format!("{HOTPLUG_PREFIX}rule{at}"), format!("tty,serial=A{at}"))).collect());
    let holders: Vec<Holder> = (0..1000).map(holder).collect();
    for (name, rules) in [("no one matches", none), ("all match", few)] {
        let all = sample(3, || {
            let sysfs = look();
            let (facts, mut grants, mut refused) = (Facts::new(device, &sysfs), Vec::new(), Vec::new());
            for holder in &holders {
                let bounds = Bounds::default();
                let asking = Asking {
                    holder,
                    named: &[],
                    rules: &rules,
                    bounds: &bounds,
                    group: &|_| None,
                    own_refusal: &|_| None,
                };
                asking.desired(&facts, &mut grants, &mut refused);
            }
            let (kept, _) = settle(grants, &[], |_| false);
            drop(changes(&kept, &[], |_| false));
        });
        figures.push(Figure::new(format!("1,000 containers with 64 selectors each, {name}"), all, ""));
    }
    figures
}

fn holder(at: usize) -> Holder {
    let id = format!("{at:064x}");
    let cgroup = format!("/machine.slice/libpod-{id}.scope");
    Holder { id, name: None, pid: at as u32, start_time: 1, cgroup, cgroup_id: at as u64, user: 0 }
}

fn measure<S: Sysfs>(rules: &[Rule], device: &Device, look: impl Fn() -> S, name: &str) -> Vec<Figure> {
    let count = |facts: &Facts<'_>| rules.iter().filter(|rule| rule.matches(facts).is_some()).count();
    let cold = sample(ROUNDS, || _ = count(&Facts::new(device, &look())));
    let sysfs = look();
    let facts = Facts::new(device, &sysfs);
    let matching = count(&facts);
    let warm = sample(ROUNDS, || _ = count(&facts));
    vec![
        Figure::new(format!("1,000 rules, {name}, nothing known yet"), cold, "< 1 ms"),
        Figure::new(format!("… all known; {matching} of the rules ask for it"), warm, "< 1 ms"),
    ]
}

/// What containers ask for in practice; most of it is not this device.
fn different_rules() -> Vec<Rule> {
    let text = |at: usize| match at % 10 {
        0 => format!("tty,as=/dev/console{at}"),
        1 => format!("tty,usb=10c4:{at:04x}"),
        2 => format!("ttyUSB,serial=A{at:06}"),
        3 => format!("devname=/dev/serial/by-id/usb-*-if{at:02}-port0,links=udev"),
        4 => format!("tty,parent=(usb=05e3:{at:04x})"),
        5 => format!("subsystem=tty,attrs.product=*Bridge {at}*"),
        6 => format!("serial,model!=CP2102*,port=1-1.{at}"),
        7 => format!("ttyACM,as=/dev/modem{at},mode=0660"),
        8 => format!("hidraw,usb=0627:{at:04x},children"),
        _ => format!("driver=cp210x,pci=00:14.*,id_path=*-usb-0:{at}:1.0"),
    };
    read((0..RULES).map(|at| (format!("{HOTPLUG_PREFIX}rule{at}"), text(at))).collect())
}

/// Each as if it stood in a container of its own.
fn read(asked: Vec<(String, String)>) -> Vec<Rule> {
    let asked = asked.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let (mut all, categories) = (Vec::new(), Categories::default());
    for one in asked {
        let (found, ignored) = rules([one], &categories);
        assert_eq!(ignored, [], "{one:?}");
        all.extend(found);
    }
    all
}

/// The directory that is replaced by files of ours. Put back when dropped.
const PLACE: &str = "/sys/devices/virtual/tty";
/// Below it, like the controller and its root hub.
const ROOT: &str = "/pci0000:00/0000:00:14.0/usb1";
const STICK: &str = "/1-1/1-1.2/1-1.2.3";

/// A root hub, two hubs one in the other, each with three sticks in it.
struct Bench {
    devices: std::collections::HashMap<String, Device>,
}

impl Bench {
    fn mount() -> Bench {
        mount(Some("none"), PLACE, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).unwrap();
        let mut bench = Bench { devices: Default::default() };
        bench.usb("", "1d6b", "09", 1);
        bench.usb("/1-1", "05e3", "09", 2);
        bench.usb("/1-1/1-1.2", "05e3", "09", 3);
        // As long as an attribute can be that counts.
        bench.file("", "long", &"a".repeat(1023));
        for (at, hub) in ["/1-1/1-1", "/1-1/1-1.2/1-1.2"].into_iter().enumerate() {
            for port in 3..6 {
                let (path, minor) = (format!("{hub}.{port}"), (10 * at + port) as u32);
                bench.usb(&path, "10c4", "00", minor);
                let name = path.rsplit('/').next().unwrap();
                let (interface, tty) = (format!("{path}/{name}:1.0"), format!("ttyUSB{minor}"));
                bench.file(&interface, "bInterfaceNumber", "00");
                bench.link(&interface, "driver", "cp210x");
                bench.link(&format!("{interface}/{tty}"), "driver", "cp210x");
                bench.node(&format!("{interface}/{tty}/tty/{tty}"), "tty", &format!("/dev/{tty}"), (188, minor));
            }
        }
        bench
    }

    fn stick(&self) -> String {
        let is_it = |path: &&String| path.contains(STICK) && path.contains("/tty/ttyUSB");
        self.devices.keys().find(is_it).unwrap().clone()
    }

    fn usb(&mut self, path: &str, vendor: &str, class: &str, minor: u32) {
        let product = if class == "09" { "USB2.0 Hub" } else { "CP2102 USB to UART Bridge Controller" };
        for (name, text) in [
            ("idVendor", vendor),
            ("idProduct", "ea60"),
            ("bDeviceClass", class),
            ("product", product),
            ("manufacturer", "Silicon Labs"),
            ("serial", &format!("A{minor:06}")),
        ] {
            self.file(path, name, text);
        }
        self.link(path, "driver", "usb");
        self.node(path, "usb", &format!("/dev/bus/usb/001/{minor:03}"), (189, minor));
    }

    fn node(&mut self, path: &str, subsystem: &str, node: &str, (major, minor): (u32, u32)) {
        self.file(path, "dev", &format!("{major}:{minor}"));
        let devpath = format!("{}{ROOT}{path}", PLACE.trim_start_matches("/sys"));
        // As many properties as udev has for a stick.
        let mut properties: std::collections::BTreeMap<_, _> =
            (0..25).map(|at| (format!("ID_PROPERTY_{at}"), "some value".to_owned())).collect();
        let link = format!("/dev/serial/by-id/usb-Silicon_Labs_CP2102_A{minor:06}-if00-port0");
        properties.insert("DEVLINKS".into(), format!("{link} /dev/serial/by-path/pci-0000:00:14.0-usb-0:{minor}:1.0"));
        properties.insert("ID_PATH".into(), format!("pci-0000:00:14.0-usb-0:{minor}:1.0"));
        let device = Device {
            number: Number { kind: Kind::Char, major, minor },
            identity: Identity { devpath: devpath.clone(), inode: 1, diskseq: None },
            node: node.to_owned(),
            subsystem: subsystem.to_owned(),
            uid: 0,
            gid: 20,
            mode: 0o660,
            properties,
        };
        self.devices.insert(devpath, device);
    }

    fn file(&self, path: &str, name: &str, text: &str) {
        let directory = format!("{PLACE}{ROOT}{path}");
        std::fs::create_dir_all(&directory).unwrap();
        // The size of all attributes that are text; white space at the end does not count.
        let page = rustix::param::page_size();
        std::fs::write(Path::new(&directory).join(name), text.to_owned() + &"\n".repeat(page - text.len())).unwrap();
    }

    fn link(&self, path: &str, name: &str, to: &str) {
        let directory = format!("{PLACE}{ROOT}{path}");
        std::fs::create_dir_all(&directory).unwrap();
        std::os::unix::fs::symlink(format!("/sys/bus/usb/drivers/{to}"), Path::new(&directory).join(name)).unwrap();
    }

    fn look(&self) -> Look<'_> {
        Look { bench: self, kernel: KernelSysfs::default() }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        umount2(PLACE, MntFlags::MNT_DETACH).unwrap();
    }
}

/// Reads the files as the agent does. libudev does not take them for devices: it is asked for another one instead, for
/// the time that it takes.
struct Look<'a> {
    bench: &'a Bench,
    kernel: KernelSysfs,
}

impl Sysfs for Look<'_> {
    fn read(&self, path: &str) -> Option<String> {
        self.kernel.read(path)
    }

    fn link(&self, path: &str) -> Option<String> {
        self.kernel.link(path)
    }

    fn directories(&self, path: &str) -> Vec<String> {
        self.kernel.directories(path)
    }

    fn property(&self, path: &str, name: &str) -> Option<String> {
        self.kernel.property("/devices/virtual/mem/null", name);
        self.bench.devices.get(path)?.properties.get(name).cloned()
    }

    fn device(&self, path: &str) -> Option<Device> {
        self.kernel.device("/devices/virtual/mem/null").unwrap();
        self.bench.devices.get(path).cloned()
    }
}
