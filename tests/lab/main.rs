//! The lab tier: real systemd, udevd, Podman and USB hot-plug in an emulated Debian machine.
//!
//! Run it with `scripts/lab.sh [bookworm|trixie] [FILTER]`, which builds the image and the binary first.
//! All cases share one boot and run one after the other, in the order of [`cases`]: each leaves the machine
//! as it found it (what it plugged is unplugged, its containers are gone), also when it fails, because
//! [`vm::Plugged`] and [`container::Container`] clean up on drop.

mod agent;
mod channel;
mod checkpoint;
mod clients;
mod container;
mod debian;
mod demo;
mod enable;
mod everything;
mod forks;
mod gadget;
mod hook;
mod hub;
mod incus;
mod inner_systemd;
mod install;
mod listeners;
mod mapped;
mod nested;
mod operation;
mod plug;
mod qmp;
mod reboot;
mod recipes;
mod rootless;
mod runtimes;
mod seat;
mod select;
mod select_ask;
mod select_options;
mod selinux;
mod smoke;
mod soak;
mod survive;
mod varlink;
mod vm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::vm::{Image, Vm};

/// A case: its name and what it does with the running machine. It fails by panicking.
pub(crate) type Case = (&'static str, fn(&Vm));

/// Every case of the tier. A new file of cases is added here. The soak test runs alone, when it is asked for.
fn cases() -> impl Iterator<Item = Case> {
    if std::env::var_os(soak::SECONDS).is_some() {
        return soak::CASES.to_vec().into_iter();
    }
    let is_bookworm = std::env::var("QMH_LAB_RELEASE").as_deref() == Ok("bookworm");
    let in_bookworm = |cases: &'static [Case]| if is_bookworm { cases } else { &[] };
    let in_trixie = |cases: &'static [Case]| if is_bookworm { &[] } else { cases };
    // Long ones are in one of the releases, so that both take the same time. Trixie's Podman finds no CRIU; bookworm has no Incus, and its policy of SELinux
    // no containers.
    [
        smoke::CASES,
        plug::CASES,
        in_bookworm(clients::CASES),
        in_bookworm(inner_systemd::CASES),
        survive::CASES,
        nested::CASES,
        in_trixie(mapped::CASES),
        install::CASES,
        operation::CASES,
        demo::CASES,
        hook::CASES,
        in_bookworm(enable::CASES),
        in_bookworm(seat::CASES),
        // Bookworm's systemd has no client for it.
        in_trixie(varlink::CASES),
        in_bookworm(select::CASES),
        in_bookworm(select_options::CASES),
        in_bookworm(select_ask::CASES),
        rootless::CASES,
        runtimes::CASES,
        // Bookworm's Podman knows no quadlets.
        in_trixie(recipes::CASES),
        in_trixie(incus::CASES),
        in_trixie(selinux::CASES),
        hub::CASES,
        forks::CASES,
        in_bookworm(checkpoint::CASES),
        // The last one: what others leave in /run is gone then.
        reboot::CASES,
    ]
    .concat()
    .into_iter()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One machine, and its USB ports and device numbers, belong to one case at a time.
    arguments.test_threads = Some(1);

    if arguments.list {
        let listed = cases().map(|(name, _)| Trial::test(name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, listed).exit_code();
    }
    let Some(image) = Image::from_environment() else {
        eprintln!("the lab tier needs an image and a build: run scripts/lab.sh [bookworm|trixie] [FILTER]");
        return ExitCode::FAILURE;
    };
    let vm = Arc::new(Vm::boot(&image));
    eprintln!(
        "{} runs after {:.1} s, console: {}",
        image.release,
        vm.boot_time().as_secs_f64(),
        vm.console().display()
    );

    let trials = cases().map(|(name, run)| {
        let vm = Arc::clone(&vm);
        Trial::test(name, move || {
            let started = Instant::now();
            // libtest-mimic would catch a panic too, but then its message says nothing of the console log.
            let result = catch_unwind(AssertUnwindSafe(|| run(&vm)));
            eprintln!("    {name} took {:.1} s", started.elapsed().as_secs_f64());
            result.map_err(|_| Failed::from(format!("console log: {}", vm.console().display())))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
    // The last handle on the machine goes out of scope here, which ends it.
}
