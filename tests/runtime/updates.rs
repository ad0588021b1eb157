//! Grants outlive what runtimes and engines do to a running container.

use qm_hotplug::sys::cgroup::CgroupRoot;
use qm_hotplug::sys::device_filter::DeviceFilter;

use crate::Case;
use crate::agent::{TTYS, assert_has_ttys};
use crate::plug::block;
use crate::state::programs_on;
use crate::support::podman::{Container, podman, runtime as call};
use crate::support::{Agent, Said, grants, qm, wait_for};

pub(crate) const CASES: &[Case] = &[
    ("updates::grants_survive_without_an_agent", grants_survive_without_an_agent),
    ("updates::grants_survive_and_the_mark_is_put_back", grants_survive_and_the_mark_is_put_back),
    ("updates::a_write_to_the_cgroup_brings_the_mark_back", a_write_to_the_cgroup_brings_the_mark_back),
    ("updates::another_container_starts_and_ends", another_container_starts_and_ends),
];

/// `runc update` or `crun update`, with a resource that needs no cgroup controller: this machine has none.
fn update(c: &Container) -> Said {
    let resources = std::env::temp_dir().join(format!("qmh-resources-{}.json", std::process::id()));
    std::fs::write(&resources, r#"{"devices":[{"allow":false,"access":"rwm"}]}"#).unwrap();
    let said = call(&c.runtime, &["update", "--resources", resources.to_str().unwrap(), &c.id]);
    std::fs::remove_file(&resources).unwrap();
    said
}

fn grants_survive_without_an_agent(runtime: &str) {
    let device = block(41);
    let c = Container::start(runtime, "qmh-update", &[]);
    qm(&["attach", &c.name, &device.path]).ok();
    let marked = programs_on(&c.cgroup());
    update(&c).ok();
    // crun detaches every program and attaches one of its own; runc before 1.2 leaves the filter alone.
    let after = if runtime == "crun" { &marked[1..] } else { &marked[..] };
    assert_eq!(programs_on(&c.cgroup()), after);
    assert!(c.opens("<>", &device.path), "after {runtime} update");
    podman(&["update", &c.name]).ok();
    assert!(c.opens("<>", &device.path), "after podman update");
    podman(&["pause", &c.name]).ok();
    podman(&["unpause", &c.name]).ok();
    assert!(c.opens("<>", &device.path), "after pause");
    qm(&["detach", &c.name, &device.path]).ok();
    assert!(!c.opens("<>", &device.path));
}

fn grants_survive_and_the_mark_is_put_back(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-update-2", &TTYS);
    let device = block(42);
    qm(&["attach", &c.name, &device.path]).ok();
    assert_has_ttys(&c);
    let root = CgroupRoot::find().unwrap();
    let cgroup = root.open(&c.cgroup()).unwrap();
    let filter = DeviceFilter::existing(&root).unwrap().unwrap();
    let programs = programs_on(&c.cgroup());
    for (what, update) in
        [("update", &update as &dyn Fn(&Container) -> Said), ("podman update", &|c| podman(&["update", &c.name]))]
    {
        // As a runtime does that detaches all programs and attaches its own anew.
        filter.unmark(&cgroup).unwrap();
        update(&c).ok();
        // Only runc writes its state when it updates; with crun the next change of anything is the occasion.
        if runtime == "crun" {
            qm(&["attach", &c.name, &device.path]).ok();
        }
        wait_for("the mark in first place", || filter.is_marked(&cgroup).unwrap());
        assert_eq!(programs_on(&c.cgroup()), programs, "{what}");
        assert_has_ttys(&c);
        assert!(c.opens("<>", &device.path), "{what}");
    }
    assert_eq!(grants().len(), 9);
}

/// What crun's update does last, and all that can be heard of it: it writes limits into the cgroup.
fn a_write_to_the_cgroup_brings_the_mark_back(runtime: &str) {
    let _agent = Agent::start();
    let c = Container::start(runtime, "qmh-written", &[]);
    let device = block(42);
    qm(&["attach", &c.name, &device.path]).ok();
    let root = CgroupRoot::find().unwrap();
    let cgroup = root.open(&c.cgroup()).unwrap();
    let filter = DeviceFilter::existing(&root).unwrap().unwrap();
    for _ in 0..3 {
        filter.unmark(&cgroup).unwrap();
        std::fs::write(format!("/sys/fs/cgroup{}/cgroup.max.depth", c.cgroup()), "max").unwrap();
        wait_for("the mark in first place", || filter.is_marked(&cgroup).unwrap());
    }
    assert!(c.opens("<>", &device.path));
}

fn another_container_starts_and_ends(runtime: &str) {
    let device = block(43);
    let c = Container::start(runtime, "qmh-lasting", &[]);
    qm(&["attach", &c.name, &device.path]).ok();
    for other in crate::support::podman::RUNTIMES {
        drop(Container::start(other, "qmh-passing", &[]));
        assert!(c.opens("<>", &device.path), "{other}");
    }
}
