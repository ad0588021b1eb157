//! The runtime tier: podman with runc and crun, and real events of this kernel. Needs root.
//!
//! Every case runs once with each runtime and leaves nothing behind, also when it fails: devices, containers and the
//! agent go when their values are dropped, the rest goes in [`clean`].

mod adoption;
mod agent;
mod agent_restart;
mod agent_socket;
mod attach;
mod containers;
mod detach;
mod doctor;
mod engines;
mod exact;
mod forged;
mod hook;
mod host_dev;
mod hotplug;
#[cfg(feature = "fail-points")]
mod killed;
mod lxc_device;
mod mirror;
mod monitor;
mod operation;
mod persist;
mod plug;
mod policy;
mod precreate;
mod read_only;
mod refusals;
mod refused_containers;
mod refused_destinations;
mod rootless;
mod selectors;
mod state;
mod storm;
mod updates;
mod userns;
mod verify;

#[path = "../support/mod.rs"]
mod support;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use libtest_mimic::{Arguments, Trial};
use support::podman;

/// A case: its name and what it does with containers of a runtime. It fails by panicking.
type Case = (&'static str, fn(&str));
/// A case that needs no container, or one of one runtime only.
type CaseOnce = (&'static str, fn());

fn main() {
    let mut arguments = Arguments::from_args();
    // There is one device filter, and one set of device numbers.
    arguments.test_threads = Some(1);
    let cases = [
        attach::CASES,
        detach::CASES,
        lxc_device::CASES,
        doctor::CASES,
        host_dev::CASES,
        hotplug::CASES,
        mirror::CASES,
        agent::CASES,
        agent_restart::CASES,
        adoption::CASES,
        persist::CASES,
        agent_socket::CASES,
        updates::CASES,
        hook::CASES,
        precreate::CASES,
        refusals::CASES,
        monitor::CASES,
        operation::CASES,
        refused_destinations::CASES,
        refused_containers::CASES,
        verify::CASES,
        selectors::CASES,
        policy::CASES,
        engines::CASES,
        rootless::CASES,
        userns::CASES,
        read_only::CASES,
    ];
    let each = |(name, case): &Case| {
        let case = *case;
        podman::RUNTIMES.map(|runtime| trial(format!("{name}::{runtime}"), move || case(runtime)))
    };
    let mut trials: Vec<Trial> = cases.into_iter().flatten().flat_map(each).collect();
    for (name, case) in [
        adoption::ONCE,
        doctor::ONCE,
        agent_socket::ONCE,
        monitor::ONCE,
        operation::ONCE,
        refusals::ONCE,
        refused_containers::ONCE,
        selectors::ONCE,
        policy::ONCE,
        storm::ONCE,
        containers::ONCE,
        engines::ONCE,
        forged::ONCE,
    ]
    .into_iter()
    .flatten()
    {
        trials.push(trial((*name).to_owned(), case));
    }
    #[cfg(feature = "fail-points")]
    trials
        .extend([killed::ONCE, userns::ONCE].into_iter().flatten().map(|(name, case)| trial((*name).to_owned(), case)));
    if !arguments.list {
        support::enter();
        podman::remove_leftovers();
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        podman::clean_up();
        plug::remove_links();
        let _ = std::fs::remove_file(support::agent_log());
    }
    conclusion.exit();
}

/// With `TIMES` in the environment says how long each case took.
fn trial(name: String, case: impl Fn() + Send + 'static) -> Trial {
    let shown = name.clone();
    Trial::test(name, move || {
        let started = std::time::Instant::now();
        let result = catch_unwind(AssertUnwindSafe(case));
        if std::env::var_os("TIMES").is_some() {
            eprintln!("TIME {:.2} {shown}", started.elapsed().as_secs_f64());
        }
        let cleaned = catch_unwind(AssertUnwindSafe(clean));
        result.and(cleaned).unwrap_or_else(|panic| resume_unwind(panic));
        Ok(())
    })
}

/// Takes out what a case may have left, and looks whether anything of ours is still there.
fn clean() {
    podman::remove_all();
    plug::remove_links();
    // What the hook showed to containers that no agent saw.
    let _ = std::fs::remove_dir_all("/run/qm-hotplug/udev");
    support::unconfigure();
    let _ = std::fs::remove_dir_all("/var/lib/qm-hotplug/attached");
    support::release();
    support::assert_nothing_left();
    assert_eq!(state::ledger(), Default::default(), "the ledger is empty");
    let left = std::fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.file_name());
    assert_eq!(
        left.filter(|name| name.to_string_lossy().starts_with(".qm-hotplug")).count(),
        0,
        "half-made nodes in /dev"
    );
}
