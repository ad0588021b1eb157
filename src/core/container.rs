//! A container, as its runtime's state describes it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::device::Number;

/// Who knows the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// crun's state directory.
    Crun,
    /// runc's state directory.
    Runc,
    /// Named by a process id on the command line.
    Pid,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Runtime::Crun => "crun",
            Runtime::Runc => "runc",
            Runtime::Pid => "pid",
        })
    }
}

/// A container that was running when its state was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// The runtime's id, or `pid:N`.
    pub id: String,
    /// The name that a person gave it, where one is known.
    pub name: Option<String>,
    /// Which runtime's state it was read from.
    pub runtime: Runtime,
    /// Process id of its init, in the host's process namespace.
    pub pid: u32,
    /// Start time of init in clock ticks after boot (field 22 of proc_pid_stat(5)); with `pid` it names one process for ever.
    pub start_time: u64,
    /// Its cgroup as the state names it: a path below the cgroup2 mount, perhaps with the mount point before it.
    pub cgroup: Option<String>,
    /// Annotations of its OCI specification.
    pub annotations: BTreeMap<String, String>,
    /// Devices that its OCI specification names, each with the path of its node inside: its runtime grants them.
    pub devices: Vec<(Number, String)>,
    /// The directory of its OCI bundle, where one is known.
    pub bundle: Option<String>,
    /// The user who runs it.
    pub owner: u32,
}

impl Container {
    /// What a person would call it: the name, else the first twelve digits of the id.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| short_id(&self.id))
    }

    /// Whether its specification names the device.
    pub fn names(&self, number: Number) -> bool {
        self.devices.iter().any(|(its, _)| *its == number)
    }

    /// Keys and values of its annotations.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        self.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

/// The first twelve characters of a long hexadecimal id; other ids stay whole.
pub fn short_id(id: &str) -> &str {
    if id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()) { &id[..12] } else { id }
}

/// How a person names a container on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// `pid:N`: the container that this process is in.
    Pid(u32),
    /// `podman:NAME`, or the bare name, id or unique beginning of an id.
    Name(String),
}

impl Reference {
    /// Reads `CTR`. Errors say what is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Reference, String> {
        if text.is_empty() {
            return Err("a container's name or id must not be empty".into());
        }
        if let Some(pid) = text.strip_prefix("pid:") {
            return match pid.parse() {
                Ok(pid) if pid > 0 => Ok(Reference::Pid(pid)),
                _ => Err(format!("'{pid}' in '{text}' is no process id")),
            };
        }
        match text.split_once(':') {
            None => Ok(Reference::Name(text.to_owned())),
            Some(("podman", name)) if !name.is_empty() => Ok(Reference::Name(name.to_owned())),
            Some((kind, _)) => {
                Err(format!("'{kind}:' in '{text}' is not known: use podman:NAME, pid:N or a bare name"))
            }
        }
    }
}

/// What came of looking for a container by name.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// Exactly one.
    Found(&'a Container),
    /// None.
    Missing,
    /// Several share the beginning of an id, or a name.
    Ambiguous(Vec<&'a Container>),
}

/// Finds a container by whole id, by name, or by the beginning of its id, in this order.
pub fn find<'a>(containers: &'a [Container], name: &str) -> Lookup<'a> {
    let by = |test: &dyn Fn(&Container) -> bool| containers.iter().filter(|c| test(c)).collect::<Vec<_>>();
    for matches in [
        by(&|c| c.id == name),
        by(&|c| c.name.as_deref() == Some(name)),
        by(&|c| !name.is_empty() && c.id.starts_with(name)),
    ] {
        match matches[..] {
            [] => {}
            [one] => return Lookup::Found(one),
            _ => return Lookup::Ambiguous(matches),
        }
    }
    Lookup::Missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(id: &str, name: Option<&str>) -> Container {
        Container {
            id: id.into(),
            name: name.map(Into::into),
            runtime: Runtime::Crun,
            pid: 1,
            start_time: 1,
            cgroup: None,
            annotations: BTreeMap::new(),
            devices: Vec::new(),
            bundle: None,
            owner: 0,
        }
    }

    #[test]
    fn references() {
        assert_eq!(Reference::parse("pid:17"), Ok(Reference::Pid(17)));
        assert_eq!(Reference::parse("podman:web"), Ok(Reference::Name("web".into())));
        assert_eq!(Reference::parse("web"), Ok(Reference::Name("web".into())));
        for bad in ["", "pid:", "pid:0", "pid:-1", "pid:x", "podman:", "lxc5:web"] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_whole_id_wins_over_a_name_and_a_name_over_a_prefix() {
        let all = [container("abc1", Some("x")), container("abc2", Some("abc")), container("abc", None)];
        assert_eq!(find(&all, "abc"), Lookup::Found(&all[2]));
        assert_eq!(find(&all[..2], "abc"), Lookup::Found(&all[1]));
        assert_eq!(find(&all, "abc1"), Lookup::Found(&all[0]));
        assert!(matches!(find(&all, "ab"), Lookup::Ambiguous(c) if c.len() == 3));
        assert_eq!(find(&all, "zz"), Lookup::Missing);
    }
}
