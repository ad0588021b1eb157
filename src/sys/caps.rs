//! What the agent may do (capabilities(7)): what it needs and nothing else.

use caps::{CapSet, Capability, CapsHashSet};

use crate::error::{Error, Result};

/// What each capability is for; without one of these nothing works.
pub const NEEDED: [(Capability, &str); 9] = [
    (
        Capability::CAP_SYS_ADMIN,
        "to load device programs, to join mount and network namespaces, to show /run/udev, and to mount nodes in those of user namespaces",
    ),
    (Capability::CAP_SYS_CHROOT, "to join mount namespaces"),
    (Capability::CAP_MKNOD, "to make device nodes"),
    (Capability::CAP_CHOWN, "to give a node its owner"),
    (Capability::CAP_FOWNER, "to remove nodes that belong to others from a sticky directory"),
    (
        Capability::CAP_DAC_OVERRIDE,
        "to write into a container's /dev, whatever its permissions, and to read the runtimes' state",
    ),
    (Capability::CAP_SYS_PTRACE, "to look at a container's root through /proc"),
    (
        Capability::CAP_SETUID,
        "to tell programs of devices as root of theirs, to make files as the root of a user namespace, and to ask as the user of a container",
    ),
    (
        Capability::CAP_SETGID,
        "to tell programs of devices as root of theirs, to make files as the root of a user namespace, and to ask as the user of a container",
    ),
];

/// What the agent keeps beside these, where it has it: a receive buffer that holds a storm of events (SO_RCVBUFFORCE).
const KEPT: Capability = Capability::CAP_NET_ADMIN;

/// Checks that this process has what is needed; the error names the first that it has not.
pub fn require() -> Result<()> {
    for (capability, purpose) in NEEDED {
        if !has(CapSet::Effective, capability) {
            return Err(Error::Unfit(format!(
                "{capability} is missing, which is needed {purpose}: run as root, with sudo"
            )));
        }
    }
    Ok(())
}

/// Gives up all other capabilities for good, for this thread and those that it starts: call it while there is one. A
/// program that it would start gains none, either.
pub fn confine() -> Result<()> {
    let failed = |error: caps::errors::CapsError| Error::host("give up capabilities")(std::io::Error::other(error));
    if !has(CapSet::Permitted, KEPT) {
        tracing::warn!("{KEPT} is missing: where events come faster than they are read, all is compared more often");
    }
    let kept: CapsHashSet = NEEDED.map(|(capability, _)| capability).into_iter().chain([KEPT]).collect();
    let kept = kept.into_iter().filter(|capability| has(CapSet::Permitted, *capability)).collect::<CapsHashSet>();
    // Who may not do this (the unit's process) was bounded by whoever started it.
    if has(CapSet::Effective, Capability::CAP_SETPCAP) {
        let others = caps::all().into_iter().filter(|capability| !kept.contains(capability));
        for capability in others.filter(|capability| has(CapSet::Bounding, *capability)) {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)?;
    nix::sys::prctl::set_no_new_privs().map_err(Error::host("give up new privileges"))
}

fn has(set: CapSet, capability: Capability) -> bool {
    caps::has_cap(None, set, capability).unwrap_or(false)
}
