//! The kernel tier: real cgroups, device programs, namespaces and nodes. Needs root.

#[path = "../support/mod.rs"]
mod support;

mod actor;
mod attach;
mod before;
mod block;
mod explain;
mod filter;
mod foreign;
mod hostile;
mod kernel_bpf;
mod mapped;
mod marks;
mod nodes;
mod permission;
mod probe;
mod refused;
mod stage;
mod standing;
mod unfit;

use libtest_mimic::{Arguments, Trial};

fn main() {
    actor::become_if_asked();
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    support::enter();
    if std::panic::catch_unwind(support::assert_nothing_left).is_err() {
        eprintln!("an earlier run was killed and left this behind, which is taken out now");
        release();
    }
    let tests = [
        filter::TESTS,
        marks::TESTS,
        standing::TESTS,
        refused::TESTS,
        nodes::TESTS,
        mapped::TESTS,
        hostile::TESTS,
        foreign::TESTS,
        attach::TESTS,
        unfit::TESTS,
        block::TESTS,
        permission::TESTS,
        probe::TESTS,
        explain::TESTS,
    ]
    .concat();
    let trials = tests.into_iter().map(|(name, test)| Trial::test(name, move || isolated(test))).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

/// Runs a test between two checks that the kernel holds nothing of ours; a failed one's leftovers are taken out.
fn isolated(test: fn()) -> Result<(), libtest_mimic::Failed> {
    support::assert_nothing_left();
    let result = std::panic::catch_unwind(test);
    release();
    support::assert_nothing_left();
    result.map_err(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "panicked".into()).into()
    })
}

fn release() {
    let root = qm_hotplug::sys::cgroup::CgroupRoot::find().unwrap();
    qm_hotplug::sys::device_filter::DeviceFilter::release(&root).unwrap();
}
