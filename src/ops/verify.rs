//! Proves that a container can open what it was given, without asking the devices' drivers.

use std::path::Path;

use crate::core::container::{Container, Reference};
use crate::core::info::Proven;
use crate::core::ledger::Entry;
use crate::core::proof::{Proof, judge};
use crate::error::{Error, Result};
use crate::ops::RUN_DIRECTORY;
use crate::ops::inspect::{Inspection, NodeFd, Target, of_container, target_of, targets};
use crate::ops::live::lookup;
use crate::ops::store::{self, Store};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::host::require_fitness;

/// Asks about `device`, an absolute path on the host or inside, or about all that the container was granted.
pub fn verify(containers: &[Container], container: &str, device: Option<&str>, open: bool) -> Result<Vec<Proven>> {
    require_fitness()?;
    let cgroups = CgroupRoot::find()?;
    let container = lookup(containers, &Reference::parse(container).map_err(Error::Usage)?)?;
    let entries = of_container(Store::peek(Path::new(RUN_DIRECTORY), store::warn)?, &container);
    let inspection = Inspection::new(&cgroups, &container)?;
    if let Some(reason) = inspection.frozen() {
        return Err(Error::Refused { container: container.label().to_owned(), reason });
    }
    let targets = match device {
        Some(path) => targets(&container, &entries, Some(&inspection), path)?,
        None => {
            let is_node = |entry: &&Entry| entry.left_over.is_none() && entry.grant.node.link_to.is_none();
            entries.iter().filter(is_node).map(target_of).collect()
        }
    };
    targets.iter().map(|target| prove(&container, &inspection, target, open)).collect()
}

fn prove(container: &Container, inspection: &Inspection<'_>, target: &Target, open: bool) -> Result<Proven> {
    let subject = inspection.subject(target);
    let mut opened = false;
    let proof = if subject.access.is_none() {
        Proof { errno: None, reason: Some("only mknod is granted, which is not tried".into()), code: 0 }
    } else {
        let answer = inspection.ask(&subject, open, || NodeFd::of(target))?;
        opened = answer.open == Some(0);
        judge(&subject, &answer)
    };
    // The right and the node of what is unplugged stay where no agent follows.
    let is_gone = target.entry.is_some() && target.device.is_none();
    let proof = match proof.code {
        0 if is_gone => {
            Proof { errno: Some(libc::ENXIO), reason: Some(format!("{} is unplugged", target.node)), code: 4 }
        }
        _ => proof,
    };
    Ok(Proven {
        container: container.label().to_owned(),
        id: container.id.clone(),
        path: target.path.clone(),
        device: target.node.clone(),
        kind: target.number.kind,
        major: target.number.major,
        minor: target.number.minor,
        access: subject.access,
        accessible: (proof.errno.is_some() || proof.code != 0).then_some(proof.code == 0),
        errno: proof.errno,
        reason: proof.reason,
        opened,
        code: proof.code,
    })
}

/// An error where one of them is not accessible: a refusal before all else.
pub fn conclude(proven: &[Proven]) -> Result<()> {
    let failed: Vec<&Proven> = proven.iter().filter(|one| one.code != 0).collect();
    let Some(worst) = failed.iter().find(|one| one.code == 5).or(failed.first()) else { return Ok(()) };
    let others = match failed.len() {
        1 => String::new(),
        several => format!(", and {} more of {}", several - 1, proven.len()),
    };
    Err(Error::Inaccessible {
        container: worst.container.clone(),
        reason: format!(
            "{} is not accessible{others}: {}: see `qm-hotplug explain {} {}`",
            worst.path,
            worst.reason.as_deref().unwrap_or_default(),
            worst.container,
            worst.path
        ),
        code: worst.code,
    })
}
