//! A thousand containers, and seventy thousand grants.

use std::time::{Duration, Instant};

use crate::figure::Figure;
use crate::support::crowd::Member;
use crate::support::{self, Agent, qm, wait_for};

/// How many containers; ten of them ask for the consoles.
const CONTAINERS: usize = 1000;
const ASKING: usize = 10;
const ROUNDS: usize = 50;
/// How long the idle agent is looked at.
const IDLE: Duration = Duration::from_secs(20);

/// One event that ten of a thousand want, and what the agent costs meanwhile.
pub fn figures() -> Vec<Figure> {
    let crowd: Vec<Member> = (0..CONTAINERS)
        .map(|n| {
            let category = if n % (CONTAINERS / ASKING) == 0 { "ttys" } else { "audio" };
            Member::start(&format!("qmh-{n}"), &[(&format!("org.containers.qm.device.{category}"), "true")], |_| {})
        })
        .collect();
    let start = Instant::now();
    let agent = Agent::start();
    let adopted = start.elapsed();
    println!(
        "agent's start until it answers, with {CONTAINERS} containers, {ASKING} of which get 8 nodes: {adopted:?}"
    );
    let asking: Vec<&Member> = crowd.iter().filter(|member| !member.nodes().is_empty()).collect();
    assert_eq!(asking.len(), ASKING, "only those who ask are touched");
    for _ in 0..ROUNDS {
        for (action, is_there) in [("remove", false), ("add", true)] {
            std::fs::write("/sys/class/tty/tty7/uevent", action).unwrap();
            let is_done = |member: &&Member| member.device_at("/dev/tty7").is_some() == is_there;
            wait_for("all ten", || asking.iter().all(is_done));
        }
    }
    // The log is written after the act.
    std::thread::sleep(Duration::from_millis(100));
    let log = agent.log();
    let last_of_ten = |what: &str| -> Vec<Duration> {
        crate::micros(&log, &format!("{what} /dev/tty7"))
            .chunks(ASKING)
            .filter_map(|ten| ten.iter().max().copied())
            .collect()
    };
    let (up, down) = (last_of_ten("granted"), last_of_ten("revoked"));
    let before = wake_ups(agent.pid());
    std::thread::sleep(IDLE);
    let woken = wake_ups(agent.pid()) - before;
    println!(
        "idle agent: {woken} wake-ups in {IDLE:?} (target: none but the watchdog's), {}",
        crate::resident(agent.pid())
    );
    drop(agent);
    drop(crowd);
    support::release();
    full();
    vec![
        Figure::new(format!("{CONTAINERS} containers: add → the last of {ASKING} has it"), up, "≤ 20 ms"),
        Figure::new(format!("{CONTAINERS} containers: remove → the last of {ASKING} has it not"), down, "≤ 20 ms"),
    ]
}

/// How often the threads of a process have gone to sleep by themselves.
fn wake_ups(pid: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |thread: std::fs::DirEntry| -> Option<u64> {
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
    };
    threads.filter_map(of).sum()
}

/// Every container has every terminal of this host: more grants than the filter's map has room for at first.
fn full() {
    let asking =
        [("org.containers.qm.hotplug.all", "subsystem=tty"), ("org.containers.qm.hotplug.mem", "subsystem=mem")];
    let crowd: Vec<Member> = (0..CONTAINERS).map(|n| Member::start(&format!("qmh-{n}"), &asking, |_| {})).collect();
    for what in ["first start", "second start"] {
        let start = Instant::now();
        let agent = Agent::start_within(Duration::from_secs(600));
        let took = start.elapsed();
        println!(
            "{what}, {CONTAINERS} containers with {} nodes each: {took:?}, {}",
            crowd[0].nodes().len(),
            crate::resident(agent.pid())
        );
        let status = qm(&["status"]).ok();
        println!("{status}");
        let start = Instant::now();
        std::fs::write("/sys/class/tty/tty7/uevent", "remove").unwrap();
        wait_for("the node to go everywhere", || crowd.iter().all(|member| member.device_at("/dev/tty7").is_none()));
        println!("one unplug from all of them: {:?}", start.elapsed());
        let start = Instant::now();
        std::fs::write("/sys/class/tty/tty7/uevent", "add").unwrap();
        wait_for("the node to come everywhere", || crowd.iter().all(|member| member.device_at("/dev/tty7").is_some()));
        println!("one plug to all of them: {:?}", start.elapsed());
    }
    let start = Instant::now();
    let count = crowd.len();
    drop(crowd);
    support::release();
    println!("{count} ends and the release of the rest: {:?}", start.elapsed());
}
