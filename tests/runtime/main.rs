//! The runtime tier: podman with runc and crun, and real events of this kernel. Needs root.

#[path = "../support/mod.rs"]
mod support;

use libtest_mimic::{Arguments, Trial};
use support::{podman, podman::Container, qm};

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    support::enter();
    let trials = vec![Trial::test("smoke", || {
        for runtime in podman::RUNTIMES {
            let c = Container::start(runtime, "qmh-smoke", &[]);
            c.sh("echo hi >/tmp/x").ok();
            assert!(c.opens("<>", "/dev/null"));
            qm(&["attach", &c.name, "/dev/tty3"]).ok();
            assert!(c.opens("<>", "/dev/tty3"));
            qm(&["detach", &c.name, "/dev/tty3"]).ok();
        }
        support::assert_nothing_left();
        Ok(())
    })];
    let conclusion = libtest_mimic::run(&arguments, trials);
    podman::clean_up();
    conclusion.exit();
}
