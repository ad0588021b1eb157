//! LXC and Incus keep no process id on disk: a container is its cgroup, `lxc.payload.NAME` at the root, and its init the
//! process in there that is the first of a process namespace of its own.

use std::collections::BTreeMap;
use std::path::Path;

use crate::core::container::{Container, Runtime};
use crate::runtime::{Found, file_name};
use crate::sys::cgroup::CgroupRoot;
use crate::sys::process::Process;

/// Where LXC keeps its containers, unless it is told otherwise.
const LXC_PATH: &str = "/var/lib/lxc";
/// Where Incus does (incus, internal/server/sys).
const INCUS_PATH: &str = "/var/lib/incus/containers";
/// The beginning of the cgroups' names (lxc, src/lxc/cgroups/cgfsng.c, `DEFAULT_PAYLOAD_CGROUP_PREFIX`).
const PAYLOAD: &str = "lxc.payload.";
/// The same of their monitors' (`DEFAULT_MONITOR_CGROUP_PREFIX`).
const MONITOR: &str = "lxc.monitor.";

/// What a monitor's command line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitored {
    /// The directory of all containers of that kind.
    pub path: String,
    /// The container's name there.
    pub name: String,
}

/// Reads `[lxc monitor] LXCPATH NAME`, the title of the process that is init's parent (lxc, src/lxc/lxccontainer.c,
/// `do_lxcapi_start`).
pub fn parse_monitor(command_line: &[u8]) -> Option<Monitored> {
    let text = std::str::from_utf8(command_line).ok()?.trim_end_matches('\0');
    // A path may hold spaces, a name may not.
    let (path, name) = text.strip_prefix("[lxc monitor] ")?.rsplit_once(' ')?;
    (path.starts_with('/') && !name.is_empty()).then(|| Monitored { path: path.to_owned(), name: name.to_owned() })
}

/// Reads `NSpid` of a process's status (proc_pid_status(5)): whether it is the first process of a namespace that is a
/// child of ours.
pub fn is_init(status: &str) -> bool {
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    pids.is_some_and(|pids| {
        let pids: Vec<&str> = pids.split_ascii_whitespace().collect();
        pids.len() == 2 && pids[1] == "1"
    })
}

/// The container of a cgroup `lxc.payload.NAME`, as its monitor says; one in the foreground (`lxc-start -F`) has no such
/// title.
pub fn container(cgroup: &str, monitored: Option<Monitored>, init: &Process, owner: u32) -> Container {
    // A cgroup may have another name than its container: `-1` is added while one of that name is still there.
    let monitored = monitored.unwrap_or_else(|| Monitored {
        path: LXC_PATH.to_owned(),
        name: cgroup.strip_prefix(PAYLOAD).unwrap_or(cgroup).to_owned(),
    });
    let Monitored { path, name } = monitored;
    let (runtime, id) = match path.trim_end_matches('/') {
        LXC_PATH => (Runtime::Lxc, format!("lxc:{name}")),
        INCUS_PATH => (Runtime::Incus, format!("incus:{name}")),
        path => (Runtime::Lxc, format!("lxc:{path}/{name}")),
    };
    Container {
        id,
        name: Some(name),
        runtime,
        pid: init.pid,
        start_time: init.start_time,
        cgroup: Some(format!("/{cgroup}")),
        annotations: BTreeMap::new(),
        devices: Vec::new(),
        bundle: None,
        image: None,
        owner,
    }
}

/// Looks at a cgroup.
pub fn load(directory: &Path) -> Result<Found, String> {
    let cgroup = file_name(directory)?;
    let root = CgroupRoot::find().map_err(|error| error.chain())?;
    let is_init = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| is_init(&text));
    let init = root.processes_below(&format!("/{cgroup}")).into_iter().find(is_init).and_then(Process::open);
    let Some(init) = init else {
        return Ok(if directory.exists() { Found::Starting } else { Found::Nothing });
    };
    // Until it starts the container's own program, init runs what its parent does.
    if init.runs_the_program_of(init.parent) {
        return Ok(Found::Starting);
    }
    // Nobody but root makes cgroups at the root. Without its monitor, nobody knows which container it is.
    let monitors = format!("/{MONITOR}{}", cgroup.strip_prefix(PAYLOAD).unwrap_or_default());
    let its_cgroup = Process::open(init.parent).and_then(|parent| parent.cgroups().ok());
    if its_cgroup.is_none_or(|(unified, _)| unified != monitors) {
        return Ok(Found::Starting);
    }
    let monitored = std::fs::read(format!("/proc/{}/cmdline", init.parent)).ok().and_then(|line| parse_monitor(&line));
    let owner = Process::open(init.parent).and_then(|parent| parent.owner().ok()).unwrap_or(0);
    Ok(Found::Running(Box::new(container(cgroup, monitored, &init, owner))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_says_whose_it_is() {
        let monitored = |path: &str, name: &str| Some(Monitored { path: path.into(), name: name.into() });
        assert_eq!(parse_monitor(b"[lxc monitor] /var/lib/lxc web\0"), monitored("/var/lib/lxc", "web"));
        // The title is written over a longer command line.
        assert_eq!(parse_monitor(b"[lxc monitor] /srv/my lxc web-1\0\0\0"), monitored("/srv/my lxc", "web-1"));
        for other in [&b"lxc-start\0-F\0-n\0web\0"[..], b"[lxc monitor] web\0", b"[lxc monitor] /x \0", b"\xff", b""] {
            assert_eq!(parse_monitor(other), None, "{other:?}");
        }
    }

    #[test]
    fn init_is_the_first_process_of_a_namespace_directly_below_ours() {
        for (status, expected) in [
            ("Name:\tinit\nNSpid:\t4711\t1\n", true),
            ("NSpid:\t4711\n", false),
            ("NSpid:\t4711\t17\n", false),
            ("NSpid:\t4711\t17\t1\n", false),
            ("Name:\tNSpid:\t1\t1\n", false),
            ("", false),
        ] {
            assert_eq!(is_init(status), expected, "{status:?}");
        }
    }

    #[test]
    fn every_container_has_an_id_of_its_own() {
        let init = Process::open(std::process::id()).unwrap();
        let id = |cgroup: &str, monitored: Option<(&str, &str)>| {
            let monitored = monitored.map(|(path, name)| Monitored { path: path.into(), name: name.into() });
            let its = container(cgroup, monitored, &init, 0);
            (its.id, its.name.unwrap(), its.runtime)
        };
        let is = |id: &str, name: &str, runtime| (id.to_owned(), name.to_owned(), runtime);
        assert_eq!(id("lxc.payload.web", Some((LXC_PATH, "web"))), is("lxc:web", "web", Runtime::Lxc));
        assert_eq!(id("lxc.payload.web-1", Some((INCUS_PATH, "web"))), is("incus:web", "web", Runtime::Incus));
        assert_eq!(id("lxc.payload.web-2", Some(("/srv/lxc/", "web"))), is("lxc:/srv/lxc/web", "web", Runtime::Lxc));
        assert_eq!(id("lxc.payload.db", None), is("lxc:db", "db", Runtime::Lxc));
    }
}
