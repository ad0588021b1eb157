//! The device filter: loading it, changing it, and what an open costs under it.

use std::fs::File;
use std::os::fd::AsFd;

use qm_hotplug::core::device::{Access, Kind, Number};
use qm_hotplug::core::filter_program;
use qm_hotplug::sys::bpf::Program;
use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;

use crate::figure::{Figure, sample, sample_short};

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
        Figure::new("map insert (a grant's right)", insert, "0.4 µs"),
        Figure::new("map delete (a revocation)", remove, ""),
        Figure::new("override: maps made, program loaded and attached", load, ""),
    ]
}
