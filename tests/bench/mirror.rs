//! What it costs to let those inside know: from udevd's message on the host to a client of libudev in a container, and the
//! agent's memory for each container that is shown udev's database.

use std::process::id;
use std::time::{Duration, Instant};

use crate::figure::Figure;
use crate::support::crowd::Member;
use crate::support::podman::Container;
use crate::support::udev::{Group, Listener, Udevd, devpath};
use crate::support::{Agent, release, run, wait_for};

/// Rounds of each.
const ROUNDS: usize = 200;
/// Containers whose memory is measured.
const CONTAINERS: usize = 100;
/// What udev knows of the console, as much as of an ordinary serial stick.
const RECORD: &str = "S:serial/by-id/usb-x\nI:1\nE:ID_MODEL=Console\nE:ID_SERIAL=Some_Vendor_Some_Product_0001\nG:systemd\nQ:systemd\nV:1\n";

pub fn figures() -> Vec<Figure> {
    let udevd = Udevd::start();
    let asks = ["--annotation", "org.containers.qm.hotplug.console=devname=/dev/vcsa43"];
    let container = Container::start("crun", "qmh-bench-udev", &asks);
    let agent = Agent::start();
    let (inside, host) =
        (Listener::start(container.pid(), Group::Udev(&["vc"])), Listener::start(id(), Group::Udev(&["vc"])));
    let (mut changes, mut floor, mut adds, mut removals) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        drop(std::fs::File::open("/dev/tty43").unwrap());
        wait_for("the console", || std::fs::exists("/dev/vcsa43").unwrap());
        udevd.record("c7:171", RECORD);
        let devpath = devpath("/dev/vcsa43");
        let timed = |action: &str, listener: &Listener| {
            let start = Instant::now();
            udevd.tell(action, &devpath);
            assert!(listener.next().is_some(), "{action}");
            start.elapsed()
        };
        adds.push(timed("add", &inside));
        changes.push(timed("change", &inside));
        (0..2).for_each(|_| assert!(host.next().is_some()));
        floor.push(timed("change", &host));
        assert!(inside.next().is_some());
        let start = Instant::now();
        wait_for("the console's end", || {
            run("/bin/busybox", &["deallocvt", "43"]);
            !std::fs::exists("/dev/vcsa43").unwrap()
        });
        assert!(inside.next().is_some());
        removals.push(start.elapsed());
        udevd.forget("c7:171");
    }
    drop((inside, host, container));
    let before = resident(agent.pid());
    let members: Vec<Member> = (0..CONTAINERS)
        .map(|at| {
            let rule = [("org.containers.qm.hotplug.console", "devname=/dev/vcsa43")];
            Member::start(&format!("qmh-mirror-{at}"), &rule, |_| {})
        })
        .collect();
    let views = || std::fs::read_dir("/run/qm-hotplug/udev").map_or(0, Iterator::count);
    wait_for("all to be shown udev's database", || views() == CONTAINERS);
    std::thread::sleep(Duration::from_millis(500));
    let after = resident(agent.pid());
    println!(
        "the agent's memory for each container with udev's database: {} KiB, and no process",
        (after - before) / 100
    );
    drop((members, agent));
    release();
    vec![
        Figure::new("udevd's add → libudev inside, with node, entry and link", adds, ""),
        Figure::new("udevd's change → libudev inside", changes, ""),
        Figure::new("for comparison: → libudev on the host", floor, ""),
        Figure::new("unplug (a whole busybox) → libudev inside", removals, ""),
    ]
}

/// A process's resident memory in KiB.
fn resident(pid: u32) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
