//! Named points between all effects of a change, at which tests kill the process. Without the feature `fail-points` they
//! are nothing at all.

/// The points that are reached in any container. A test kills at each, and fails if one was not reached.
#[cfg(feature = "fail-points")]
pub const POINTS: &[&str] = &[
    "ledger: before a page is written",
    "ledger: before a page is renamed",
    "ledger: a page is written",
    "ledger: a page is removed",
    "filter: the program is loaded",
    "filter: the program is attached",
    "filter: the program is replaced",
    "filter: the right is set",
    "filter: the right is gone",
    "filter: the right is withdrawn",
    "filter: the right is restored",
    "mark: attached",
    "mark: a copy is attached",
    "mark: in the first one's place",
    "mark: an original is detached",
    "mark: an original is attached",
    "mark: a copy is detached",
    "mark: removed",
    "release: the marks are removed",
    "release: the program is detached",
    "node: a directory is made",
    "node: made under its temporary name",
    "node: a link is made under its temporary name",
    "node: has its owner",
    "node: in its place",
    "node: removed",
    "node: a directory is removed",
    "grant: done, and not settled",
    "mirror: a view is claimed",
    "mirror: a view is unmounted",
    "mirror: a device is noted",
    "mirror: an entry is written",
    "mirror: an entry is removed",
    "persist: before the file is renamed",
    "persist: the file is written",
    "persist: the file is removed",
];

/// Those that are reached in containers with a user namespace alone.
#[cfg(feature = "fail-points")]
pub const MAPPED_POINTS: &[&str] = &[
    "node: its file is made",
    "node: an empty file is made",
    "node: mounted",
    "node: made useless",
    "node: its file is removed",
    "node: unmounted",
];

/// Kills this process with SIGKILL if this is the point whose number, counted from 1 over all points that are reached,
/// `QM_HOTPLUG_KILL_AT` names. The name goes to stderr.
#[cfg(feature = "fail-points")]
pub fn reached(point: &'static str) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static REACHED: AtomicU32 = AtomicU32::new(0);
    assert!([POINTS, MAPPED_POINTS].concat().contains(&point), "'{point}' is not in the list");
    let wanted = std::env::var("QM_HOTPLUG_KILL_AT").ok().and_then(|number| number.parse::<u32>().ok());
    if wanted.is_some_and(|wanted| REACHED.fetch_add(1, Ordering::SeqCst) + 1 == wanted) {
        eprintln!("killed at '{point}'");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// Nothing.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
pub fn reached(_: &'static str) {}
