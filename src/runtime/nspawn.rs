//! systemd-nspawn registers its containers with systemd-machined, which keeps `/run/systemd/machines/NAME`
//! (systemd, src/machine/machine.c, `machine_save`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::core::container::{Container, Runtime};
use crate::runtime::{Found, file_name, read};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::process::Process;

/// A container of systemd-nspawn, as machined has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its first process.
    pub leader: u32,
    /// The unit that it is in, a scope or a service.
    pub unit: String,
}

/// Reads a machine's file. `None` for machines of others, such as virtual machines; errors are in words.
pub fn parse(text: &str) -> Result<Option<Machine>, String> {
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
    let fields: HashMap<&str, String> = lines.map(|(key, value)| (key, unescaped(value))).collect();
    let field = |name: &str| fields.get(name).map(String::as_str);
    if field("SERVICE") != Some("systemd-nspawn") || field("CLASS") != Some("container") {
        return Ok(None);
    }
    let leader = field("LEADER").and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 0);
    // "SCOPE" is the name of the field for a service as well; it was "UNIT" at times.
    let unit = field("SCOPE").or(field("UNIT")).filter(|unit| !unit.is_empty());
    match leader.zip(unit) {
        Some((leader, unit)) => Ok(Some(Machine { leader, unit: unit.to_owned() })),
        None => Err("it names no LEADER, or neither SCOPE nor UNIT".into()),
    }
}

/// A value, perhaps in quotes; a backslash stands before one that is meant (`machine-a\\x2db.scope` of a machine `a-b`).
fn unescaped(value: &str) -> String {
    let mut characters = value.trim_matches('"').chars();
    std::iter::from_fn(|| characters.next().and_then(|c| if c == '\\' { characters.next() } else { Some(c) })).collect()
}

/// The container's own cgroup, from that of its first process: nspawn keeps the container in `payload` below the unit,
/// and itself in `supervisor`.
pub fn own_cgroup(unit: &str, of_leader: &str) -> Option<String> {
    let mut own = String::new();
    let mut parts = of_leader.split('/').filter(|part| !part.is_empty());
    loop {
        let part = parts.next()?;
        own = format!("{own}/{part}");
        if part == unit {
            break;
        }
    }
    Some(if parts.next() == Some("payload") { own + "/payload" } else { own })
}

/// Looks at a machine's file.
pub fn load(path: &Path) -> Result<Found, String> {
    let name = file_name(path)?;
    // A link from a unit to its machine; machines' names have no colon.
    if name.starts_with("unit:") {
        return Ok(Found::Nothing);
    }
    let Some(machine) = parse(&read(path)?)? else { return Ok(Found::Nothing) };
    let Some(init) = Process::open(machine.leader) else { return Ok(Found::Nothing) };
    let (of_leader, _) = init.cgroups().map_err(|error| error.to_string())?;
    // Without it, the number means another process by now.
    let Some(cgroup) = own_cgroup(&machine.unit, &of_leader) else {
        return Err(format!("process {} is not in {}", init.pid, machine.unit));
    };
    // Until it starts the container's own program, the leader runs what its parent does; with --as-pid2 it does so always,
    // and the program is another process.
    if init.runs_the_program_of(init.parent) && is_alone(&cgroup) {
        return Ok(Found::Starting);
    }
    Ok(Found::Running(Box::new(Container {
        id: format!("nspawn:{name}"),
        name: Some(name.to_owned()),
        runtime: Runtime::Nspawn,
        pid: init.pid,
        start_time: init.start_time,
        cgroup: Some(cgroup),
        annotations: BTreeMap::new(),
        devices: Vec::new(),
        bundle: None,
        image: None,
        owner: Process::open(init.parent).and_then(|parent| parent.owner().ok()).unwrap_or(0),
    })))
}

fn is_alone(cgroup: &str) -> bool {
    CgroupRoot::find().is_ok_and(|root| root.processes_below(cgroup).len() <= 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_of_others_are_no_containers() {
        let file = "# This is private data. Do not parse.\nNAME=web\nSCOPE=machine-web.scope\nSERVICE=systemd-nspawn\n\
                    ROOT=/var/lib/machines/web\nLEADER=412\nCLASS=container\nREALTIME=1\n";
        let web = Machine { leader: 412, unit: "machine-web.scope".into() };
        assert_eq!(parse(file), Ok(Some(web.clone())));
        assert_eq!(parse(&file.replace("SCOPE=", "UNIT=")), Ok(Some(web)));
        assert_eq!(parse(&file.replace("CLASS=container", "CLASS=vm")), Ok(None));
        assert_eq!(parse(&file.replace("systemd-nspawn", "libvirt-lxc")), Ok(None));
        let dashed = file.replace("machine-web", r"machine-my\\x2dweb");
        assert_eq!(parse(&dashed).unwrap().unwrap().unit, r"machine-my\x2dweb.scope");
        assert_eq!(parse(""), Ok(None));
        for damaged in ["LEADER=412", "SCOPE=machine-web.scope"] {
            assert!(parse(&file.replace(damaged, "")).is_err(), "without {damaged}");
        }
        assert!(parse(&file.replace("412", "0")).is_err());
    }

    #[test]
    fn the_container_is_in_payload() {
        let own = |of_leader: &str| own_cgroup("machine-web.scope", of_leader);
        let payload = Some("/machine.slice/machine-web.scope/payload".to_owned());
        assert_eq!(own("/machine.slice/machine-web.scope/payload"), payload);
        assert_eq!(own("/machine.slice/machine-web.scope/payload/init.scope"), payload);
        assert_eq!(own("/machine.slice/machine-web.scope").as_deref(), Some("/machine.slice/machine-web.scope"));
        assert_eq!(
            own("/machine.slice/machine-web.scope/x/payload").as_deref(),
            Some("/machine.slice/machine-web.scope")
        );
        assert_eq!(own("/user.slice"), None);
        assert_eq!(own("/"), None);
    }
}
