//! The device filter: loading it, changing it, and what an open costs under it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use qm_hotplug::core::device::{Access, Kind, Number};
use qm_hotplug::core::filter_program::{self, Insn, REPORTS_PER_WINDOW};
use qm_hotplug::sys::bpf::Program;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;

use crate::figure::{Figure, sample, sample_short};

/// What a refused open costs in a cgroup of its own, two levels below the root: not watched, watched but told often
/// enough in this second, and reported.
fn refused(root: &CgroupRoot, filter: &DeviceFilter) -> (Vec<Duration>, Vec<Duration>, Vec<Duration>) {
    let parent = root.path.join("qm-hotplug-bench");
    let directory = parent.join("refused");
    std::fs::create_dir_all(&directory).unwrap();
    let cgroup = root.open("/qm-hotplug-bench/refused").unwrap();
    let deny = Program::load("only_refuses", &[Insn::new(0xb7, 0, 0, 0, 0), Insn::new(0x95, 0, 0, 0, 0)]).unwrap();
    deny.attach(cgroup.as_fd()).unwrap();
    let (before, own) = (own_cgroup(root), std::process::id().to_string());
    std::fs::write(directory.join("cgroup.procs"), &own).unwrap();
    let open = || drop(File::open("/dev/null").unwrap_err());
    let not_watched = sample_short(200, 2000, open);
    filter.watch(cgroup.id).unwrap();
    let limited = sample_short(200, 2000, open);
    // To watch it anew starts a new second.
    let reported = (0..1000).flat_map(|_| {
        filter.watch(cgroup.id).unwrap();
        sample_short(1, REPORTS_PER_WINDOW, open)
    });
    let reported = reported.collect();
    filter.unwatch(cgroup.id).unwrap();
    std::fs::write(before.join("cgroup.procs"), &own).unwrap();
    std::fs::remove_dir(&directory).and_then(|()| std::fs::remove_dir(&parent)).unwrap();
    (not_watched, limited, reported)
}

fn own_cgroup(root: &CgroupRoot) -> PathBuf {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    root.path.join(path.trim_start_matches('/'))
}

pub fn figures() -> Vec<Figure> {
    let root = CgroupRoot::find().unwrap();
    DeviceFilter::release(&root).unwrap();
    let open = || drop(File::open("/dev/null").unwrap());
    let bare = sample_short(200, 2000, open);
    let other = Program::load("only_allows", &filter_program::allow()).unwrap();
    other.attach(root.as_fd()).unwrap();
    let under_other = sample_short(200, 2000, open);
    other.detach(root.as_fd()).unwrap();
    let mut load = Vec::new();
    for _ in 0..30 {
        load.extend(sample(1, || drop(DeviceFilter::open(&root).unwrap())));
        DeviceFilter::release(&root).unwrap();
    }
    let filter = DeviceFilter::open(&root).unwrap();
    let under = sample_short(200, 2000, open);
    let (refused, limited, reported) = refused(&root, &filter);
    let mut minor = 0;
    let insert = sample_short(100, 300, || {
        minor += 1;
        filter.set(7, Number { kind: Kind::Char, major: 500, minor }, Access::ALL).unwrap();
    });
    let remove = sample_short(100, 300, || {
        filter.set(7, Number { kind: Kind::Char, major: 500, minor }, Access::NONE).unwrap();
        minor -= 1;
    });
    DeviceFilter::release(&root).unwrap();
    vec![
        Figure::new("open() of an allowed device, no filter of ours", bare, "643 ns here once"),
        Figure::new("… under one device program that only allows", under_other, ""),
        Figure::new("open() of an allowed device, under the filter", under, "+14 ns"),
        Figure::new("open() of a refused device, not watched", refused, ""),
        Figure::new("… watched, as many as are told in a second already", limited, ""),
        Figure::new("… watched and reported", reported, ""),
        Figure::new("map insert (a grant's right)", insert, "0.4 µs"),
        Figure::new("map delete (a revocation)", remove, ""),
        Figure::new("override: maps made, program loaded and attached", load, ""),
    ]
}
