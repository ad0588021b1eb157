//! A container, as its runtime's state describes it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::annotation::PREFIX;
use crate::core::device::Number;

/// Who runs the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// Podman, or whoever else calls crun with its own state directory.
    Crun,
    /// Podman, or whoever else calls runc with its own state directory.
    Runc,
    /// Docker.
    Docker,
    /// containerd without Docker: `ctr`, nerdctl, Kubernetes.
    Containerd,
    /// LXC.
    Lxc,
    /// Incus.
    Incus,
    /// systemd-nspawn.
    Nspawn,
    /// Named by a process id on the command line.
    Pid,
}

/// What may stand before a name, `docker:NAME`.
pub const ENGINES: [&str; 6] = ["podman", "docker", "containerd", "lxc", "incus", "nspawn"];

impl Runtime {
    /// What a person types before the name.
    pub fn engine(self) -> &'static str {
        match self {
            Runtime::Crun | Runtime::Runc => "podman",
            Runtime::Docker => "docker",
            Runtime::Containerd => "containerd",
            Runtime::Lxc => "lxc",
            Runtime::Incus => "incus",
            Runtime::Nspawn => "nspawn",
            Runtime::Pid => "pid",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Runtime::Crun => "crun",
            Runtime::Runc => "runc",
            other => other.engine(),
        })
    }
}

/// Reads `ENGINE:NAME` or a bare name. Errors say what is wrong with it, in words.
pub fn split_engine(text: &str) -> Result<(Option<&'static str>, &str), String> {
    let Some((engine, name)) = text.split_once(':') else { return Ok((None, text)) };
    match ENGINES.iter().find(|known| **known == engine) {
        Some(_) if name.is_empty() => Err(format!("'{text}' has no name after '{engine}:'")),
        Some(engine) => Ok((Some(engine), name)),
        None => Err(format!("'{engine}:' is not known: use a bare name, or one after {}:", ENGINES.join(":, "))),
    }
}

/// A container that was running when its state was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Unique on the host: 64 hexadecimal digits where the engine gives such, else the engine and what is unique there,
    /// `containerd:NAMESPACE/NAME`, `lxc:NAME`, `nspawn:NAME`, or `pid:N`; for an ordinary user's `UID@` and what is unique
    /// among his.
    pub id: String,
    /// The name that a person gave it, where one is known; `USER@NAME` for an ordinary user's.
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
    /// The name of its image, where its engine's state tells.
    pub image: Option<String>,
    /// The user who runs it.
    pub owner: u32,
}

/// How long a user's name for a container, or an id, may be: it becomes a part of a file's name.
const LONGEST: usize = 128;

/// How many bytes of annotations of ours are kept of a user's container: more than rules may have.
const MOST_BYTES: usize = 64 << 10;

impl Container {
    /// The ordinary user whose engine runs it, where it is not root's: its id and its name begin with `USER@`, and nothing
    /// that is known of it is more than that user's word.
    pub fn user(&self) -> Option<u32> {
        (self.owner != 0 && matches!(self.runtime, Runtime::Crun | Runtime::Runc)).then_some(self.owner)
    }

    /// Makes it the container of an ordinary user, whom the host may have a name for: id and name get a beginning that
    /// is his, so that they are never those of another one. What his engine's state says of rights does not count. A
    /// name that could be read in two ways is left out. `None` where its id is none that an engine gives.
    pub fn of_user(self, uid: u32, user: Option<&str>) -> Option<Container> {
        let is_plain = |text: &str| {
            (1..=LONGEST).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
        };
        // A name of digits alone would be taken for the number of another user.
        let is_name = |user: &&str| is_plain(user) && !user.bytes().all(|byte| byte.is_ascii_digit());
        let user = user.filter(is_name).map_or_else(|| uid.to_string(), str::to_owned);
        // All that is written there is kept, and he can write megabytes.
        let mut left = MOST_BYTES;
        let mut annotations = self.annotations;
        annotations.retain(|key, value| {
            let length = key.len() + value.len();
            let is_kept = key.starts_with(PREFIX) && length <= left;
            left -= if is_kept { length } else { 0 };
            is_kept
        });
        is_plain(&self.id).then(|| Container {
            id: format!("{uid}@{}", self.id),
            name: self.name.as_deref().filter(|name| is_plain(name)).map(|name| format!("{user}@{name}")),
            owner: uid,
            devices: Vec::new(),
            annotations,
            ..self
        })
    }

    /// Its id without the engine before it.
    pub fn bare_id(&self) -> &str {
        let rest = self.id.strip_prefix(self.runtime.engine()).and_then(|rest| rest.strip_prefix(':'));
        rest.unwrap_or(&self.id)
    }

    /// What can be typed to mean this one and no other of them.
    pub fn unmistakable(&self, among: &[Container]) -> String {
        let name = self.name.as_deref().unwrap_or_else(|| self.bare_id());
        let is_it = matches!(find(among, Some(self.runtime.engine()), name), Lookup::Found(one) if one.id == self.id);
        if is_it { format!("{}:{name}", self.runtime.engine()) } else { self.id.clone() }
    }

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

/// The first twelve characters of a long hexadecimal id, after the user that may stand before it; other ids stay whole.
pub fn short_id(id: &str) -> &str {
    let start = id.find('@').map_or(0, |at| at + 1);
    let digits = &id[start..];
    if digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()) { &id[..start + 12] } else { id }
}

/// Whether an id looks like one of an ordinary user's container, `1000@…`.
pub fn is_users(id: &str) -> bool {
    id.split_once('@').is_some_and(|(user, _)| !user.is_empty() && user.bytes().all(|byte| byte.is_ascii_digit()))
}

/// How a person names a container on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// `pid:N`: the container that this process is in.
    Pid(u32),
    /// A name, an id or the unique beginning of an id, of whichever engine or of the one before it, `docker:NAME`.
    Name {
        /// One of [`ENGINES`].
        engine: Option<&'static str>,
        /// What follows.
        name: String,
    },
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
        let (engine, name) = split_engine(text).map_err(|reason| format!("in '{text}', {reason}, or pid:N"))?;
        Ok(Reference::Name { engine, name: name.to_owned() })
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

/// Finds a container by whole id, by name, or by the beginning of its id, in this order; with an engine among its own.
pub fn find<'a>(containers: &'a [Container], engine: Option<&str>, name: &str) -> Lookup<'a> {
    let is_its = |c: &&Container| engine.is_none_or(|engine| c.runtime.engine() == engine);
    let by =
        |test: &dyn Fn(&Container) -> bool| containers.iter().filter(is_its).filter(|c| test(c)).collect::<Vec<_>>();
    for matches in [
        by(&|c| c.id == name || engine.is_some() && c.bare_id() == name),
        by(&|c| c.name.as_deref() == Some(name)),
        // An id that begins with its engine is a name, too. What has no user in it means root's.
        by(&|c| {
            !name.is_empty()
                && c.id.starts_with(name)
                && !c.id.contains(':')
                && (c.user().is_none() || name.contains('@'))
        }),
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

    #[test]
    fn of_a_users_annotations_ours_are_kept_and_not_without_end() {
        let value = "x".repeat(1000);
        let key = |at| format!("{PREFIX}hotplug.{at:04}");
        let mut his = container("web", None);
        his.annotations = (0..1000).map(|at| (key(at), value.clone())).collect();
        his.annotations.insert("a.long.one".into(), value.clone());
        his.annotations.insert(format!("{PREFIX}device.ttyUSB"), "true".into());
        let kept = his.of_user(1000, None).unwrap().annotations;
        assert!(kept.keys().all(|key| key.starts_with(PREFIX)) && kept.contains_key(&format!("{PREFIX}device.ttyUSB")));
        let bytes: usize = kept.iter().map(|(key, value)| key.len() + value.len()).sum();
        assert!(bytes > 60_000 && bytes <= MOST_BYTES, "{bytes}");
    }

    fn container(id: &str, name: Option<&str>) -> Container {
        let runtime = ["docker", "containerd", "lxc"].into_iter().find(|engine| id.starts_with(engine));
        Container {
            id: id.into(),
            name: name.map(Into::into),
            runtime: match runtime {
                Some("docker") => Runtime::Docker,
                Some("containerd") => Runtime::Containerd,
                Some("lxc") => Runtime::Lxc,
                _ => Runtime::Crun,
            },
            pid: 1,
            start_time: 1,
            cgroup: None,
            annotations: BTreeMap::new(),
            devices: Vec::new(),
            bundle: None,
            image: None,
            owner: 0,
        }
    }

    #[test]
    fn references() {
        let name = |engine, name: &str| Ok(Reference::Name { engine, name: name.into() });
        assert_eq!(Reference::parse("pid:17"), Ok(Reference::Pid(17)));
        assert_eq!(Reference::parse("podman:web"), name(Some("podman"), "web"));
        assert_eq!(Reference::parse("containerd:k8s.io/web"), name(Some("containerd"), "k8s.io/web"));
        assert_eq!(Reference::parse("web"), name(None, "web"));
        for bad in ["", "pid:", "pid:0", "pid:-1", "pid:x", "podman:", "nspawn:", "lxc5:web", ":web"] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_whole_id_wins_over_a_name_and_a_name_over_a_prefix() {
        let all = [container("abc1", Some("x")), container("abc2", Some("abc")), container("abc", None)];
        assert_eq!(find(&all, None, "abc"), Lookup::Found(&all[2]));
        assert_eq!(find(&all[..2], None, "abc"), Lookup::Found(&all[1]));
        assert_eq!(find(&all, Some("podman"), "abc1"), Lookup::Found(&all[0]));
        assert!(matches!(find(&all, None, "ab"), Lookup::Ambiguous(c) if c.len() == 3));
        assert_eq!(find(&all, None, "zz"), Lookup::Missing);
        assert_eq!(find(&all, Some("lxc"), "abc1"), Lookup::Missing);
    }

    #[test]
    fn a_users_container_has_no_name_that_another_one_could_have() {
        let of = |uid, user, id: &str, name| container(id, name).of_user(uid, user);
        let long = "ab".repeat(32);
        let web = of(1000, Some("alice"), &long, Some("web")).unwrap();
        assert_eq!((web.id.as_str(), web.name.as_deref()), (&*format!("1000@{long}"), Some("alice@web")));
        assert_eq!(short_id(&web.id), "1000@abababababab");
        assert_eq!(web.user(), Some(1000));
        for (user, id, name, expected) in [
            (None, "abc1", Some("web"), ("1000@abc1", Some("1000@web"))),
            (Some("0"), "abc1", Some("web"), ("1000@abc1", Some("1000@web"))),
            (Some("bob@web"), "abc1", Some("web"), ("1000@abc1", Some("1000@web"))),
            (Some("alice"), "abc1", Some("bob@web"), ("1000@abc1", None)),
            (Some("alice"), "abc1", Some("web\u{1b}[2J"), ("1000@abc1", None)),
            (Some("alice"), "abc1", Some(""), ("1000@abc1", None)),
        ] {
            let made = of(1000, user, id, name).unwrap();
            assert_eq!((made.id.as_str(), made.name.as_deref()), expected);
        }
        for id in ["", "lxc:web", "a@b", "a/b", "a\nb", &"x".repeat(129)] {
            assert_eq!(of(1000, None, id, None), None, "{id:?}");
        }
        assert!(is_users("1000@abc") && !is_users("web@abc") && !is_users("@abc") && !is_users("abc"));
    }

    #[test]
    fn a_bare_name_means_roots() {
        let user = |uid, name, id: &str| container(id, Some("web")).of_user(uid, Some(name)).unwrap();
        let all = [container("10aa", Some("web")), user(1000, "alice", "10ab"), user(10, "bob", "10ab")];
        assert_eq!(find(&all, None, "web"), Lookup::Found(&all[0]));
        assert_eq!(find(&all, None, "10"), Lookup::Found(&all[0]));
        assert_eq!(find(&all[1..], None, "web"), Lookup::Missing);
        assert_eq!(find(&all[1..], None, "10"), Lookup::Missing);
        assert_eq!(find(&all, None, "alice@web"), Lookup::Found(&all[1]));
        assert_eq!(find(&all, Some("podman"), "bob@web"), Lookup::Found(&all[2]));
        assert_eq!(find(&all, None, "1000@10"), Lookup::Found(&all[1]));
        assert_eq!(find(&all, None, "10@1"), Lookup::Found(&all[2]));
        assert_eq!(find(&all, Some("docker"), "alice@web"), Lookup::Missing);
        let offered: Vec<String> = all.iter().map(|one| one.unmistakable(&all)).collect();
        assert_eq!(offered, ["podman:web", "podman:alice@web", "podman:bob@web"]);
    }

    #[test]
    fn what_is_offered_for_an_ambiguous_name_finds_one_each() {
        let all = [
            container("dockerabc", Some("web")),
            container("abc1", Some("web")),
            container("abc2", None),
            container("lxc:web", Some("web")),
            container("lxc:/srv/lxc/web", Some("web")),
            container("containerd:a/db", Some("db")),
            container("containerd:b/db", Some("db")),
        ];
        assert!(matches!(find(&all, None, "web"), Lookup::Ambiguous(c) if c.len() == 4));
        let offered: Vec<String> = all.iter().map(|one| one.unmistakable(&all)).collect();
        let expected = ["docker:web", "podman:web", "podman:abc2", "lxc:web"];
        assert_eq!(offered[..4], expected);
        assert_eq!(offered[4..], ["lxc:/srv/lxc/web", "containerd:a/db", "containerd:b/db"]);
        for (one, offered) in all.iter().zip(offered) {
            let Ok(Reference::Name { engine, name }) = Reference::parse(&offered) else { panic!("{offered}") };
            assert_eq!(find(&all, engine, &name), Lookup::Found(one), "{offered}");
        }
        assert_eq!(find(&all, None, "lx"), Lookup::Missing);
    }
}
