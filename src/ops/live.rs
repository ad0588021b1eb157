//! From what a person or a runtime names to what can be worked on: a running container with a cgroup of its own.

use std::os::fd::AsFd;

use crate::core::container::{Container, Lookup, Reference, Runtime, find, short_id};
use crate::core::device::Device;
use crate::core::ledger::Holder;
use crate::core::policy::Subject;
use crate::error::{Error, Result};
use crate::runtime::storage;
use crate::sys::cgroup::{CgroupRoot, own_path};
use crate::sys::group;
use crate::sys::host::Host;
use crate::sys::namespace::{inside, visited};
use crate::sys::ownership;
use crate::sys::permission;
use crate::sys::process::Process;
use crate::sys::user::Account;
use crate::sys::user_namespace::made_by;

/// Finds the container that `reference` names among those given.
pub fn lookup(containers: &[Container], reference: &Reference) -> Result<Container> {
    let (engine, name) = match reference {
        Reference::Pid(pid) => return of_process(containers, *pid),
        Reference::Name { engine, name } => (*engine, name),
    };
    match find(containers, engine, name) {
        Lookup::Found(container) => Ok(container.clone()),
        Lookup::Missing => {
            Err(Error::NoSuchContainer(engine.map_or(name.clone(), |engine| format!("{engine}:{name}"))))
        }
        Lookup::Ambiguous(several) => Err(Error::AmbiguousContainer {
            name: name.clone(),
            candidates: several.iter().map(|container| candidate(container, containers)).collect(),
        }),
    }
}

/// What can be typed for it, and the id that was perhaps begun.
fn candidate(container: &Container, all: &[Container]) -> String {
    let typed = container.unmistakable(all);
    if typed.ends_with(&container.id) { typed } else { format!("{typed} ({})", container.id) }
}

/// `pid:N`: the known container that the process is in, else the process itself.
fn of_process(containers: &[Container], pid: u32) -> Result<Container> {
    let name = format!("pid:{pid}");
    let process = Process::open(pid).ok_or_else(|| Error::NoSuchContainer(name.clone()))?;
    let looked = |error| Error::host::<std::io::Error>(format!("look at the mount namespace of process {pid}"))(error);
    if process.shares_host_mounts().map_err(looked)? {
        return Err(Error::Refused {
            container: name,
            reason: "it is in the host's mount namespace, so it is no container: name a process inside one".into(),
        });
    }
    let namespace = process.mount_namespace().map_err(looked)?;
    let is_in = |container: &&Container| {
        let init = Process::open_same(container.pid, container.start_time);
        init.and_then(|init| init.mount_namespace().ok()).is_some_and(|its| its == namespace)
    };
    if let Some(known) = containers.iter().find(is_in) {
        return Ok(known.clone());
    }
    Ok(Container {
        id: name,
        name: None,
        runtime: Runtime::Pid,
        pid,
        start_time: process.start_time,
        cgroup: None,
        annotations: Default::default(),
        devices: Default::default(),
        bundle: None,
        image: None,
        owner: process.owner().map_err(looked)?,
    })
}

/// The holder's process, if that is still there.
pub fn still(holder: &Holder) -> Option<Process> {
    let (pid, start_time) = (holder.pid, holder.start_time);
    visited(pid, start_time).or_else(|| Process::open_same(pid, start_time))
}

/// The process of a grant's container, if it still runs. Of a user's container, one whose namespaces are his: whoever acts
/// on it looks each time.
pub fn process_of(holder: &Holder) -> Result<Process> {
    let exited = || Error::ContainerExited(holder.label().to_owned());
    let process = still(holder).ok_or_else(exited)?;
    if holder.user != 0 {
        let refusal = ownership::refusal(&process, holder.user).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => exited(),
            _ => Error::Host { what: format!("look at the namespaces of process {}", holder.pid), source },
        })?;
        if let Some(reason) = refusal {
            return Err(Error::Refused { container: holder.label().to_owned(), reason });
        }
    }
    Ok(process)
}

/// Checks that a container can be worked on, and finds its own cgroup.
pub fn hold(cgroups: &CgroupRoot, container: &Container) -> Result<Holder> {
    let label = container.label().to_owned();
    let refuse = |reason: String| Error::Refused { container: label.clone(), reason };
    let process =
        Process::open_same(container.pid, container.start_time).ok_or_else(|| Error::ContainerExited(label.clone()))?;
    let look = |what: &str| {
        let (what, label) = (format!("look at the {what} of process {}", container.pid), label.clone());
        // A process that is ending has no namespaces any more, a moment before its end is reported.
        move |source: std::io::Error| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Error::ContainerExited(label),
            _ => Error::Host { what, source },
        }
    };
    if process.shares_host_mounts().map_err(look("mount namespace"))? {
        return Err(refuse(
            "its init is in the host's mount namespace, so it is no container or is still starting".into(),
        ));
    }
    if let Some(user) = container.user() {
        if let Some(reason) = ownership::refusal(&process, user).map_err(look("namespaces"))? {
            return Err(refuse(format!("{reason}, and what user {user} says of it does not count")));
        }
        if process.has_hosts_root().map_err(look("root directory"))? {
            return Err(refuse(
                "its root directory is the host's own: it is no container, or it is still starting".into(),
            ));
        }
        // No runtime of a user's loads a device filter, and a cgroup that he names may have others in it than his
        // container: the right is the node.
        return Ok(Holder::without_cgroup(container));
    }
    if process.has_own_user_namespace().map_err(look("user namespace"))? {
        let made_by = made_by(container.pid).map_err(look("user namespace"))?;
        if made_by != 0 {
            return Err(refuse(format!(
                "user {made_by} made its user namespace, and only containers that root started are served: start it as root"
            )));
        }
    }
    let (unified, v1_devices) = process.cgroups().map_err(|_| Error::ContainerExited(label.clone()))?;
    if let Some(path) = v1_devices.filter(|path| path != "/") {
        return Err(refuse(format!(
            "it is under the devices controller of cgroup v1 at {path}, which this device filter cannot lift: boot with systemd.unified_cgroup_hierarchy=1"
        )));
    }
    // A runtime's state names the cgroup; where it names none, the container has none. `pid:N` has no state.
    let own = match (container.runtime, &container.cgroup) {
        (Runtime::Pid, _) => own_path(&unified, None),
        (_, Some(state)) => own_path(&unified, Some(state)),
        (_, None) => None,
    };
    let no_cgroup = || {
        refuse(format!(
            "it has no cgroup of its own (its init is in {unified}), so a right for it would be a right for others: start it without --cgroups=disabled"
        ))
    };
    let path = own.ok_or_else(no_cgroup)?;
    let cgroup = cgroups.open(&path).map_err(|_| Error::ContainerExited(label.clone()))?;
    // A runtime that names a cgroup has made it for the container; a bare process may be in anybody's.
    if container.runtime == Runtime::Pid && is_shared_with_host(cgroups, &path) {
        return Err(no_cgroup());
    }
    if cgroup.is_too_deep() {
        return Err(refuse(format!("its cgroup {path} is too deep: the device filter reaches 31 levels")));
    }
    if process.has_exited() {
        return Err(Error::ContainerExited(label));
    }
    Ok(Holder::new(container, &path, cgroup.id))
}

/// Whether a process in the host's mount namespace is in this very cgroup: the cgroup is not the container's own then.
/// `podman exec` and the runtimes enter the cgroup a moment before the mount namespace, so it is looked at twice.
fn is_shared_with_host(cgroups: &CgroupRoot, path: &str) -> bool {
    let shared = || {
        let pids = cgroups.processes(path).unwrap_or_default();
        pids.iter().filter_map(|pid| Process::open(*pid)).any(|process| process.shares_host_mounts().unwrap_or(false))
    };
    shared() && {
        std::thread::sleep(std::time::Duration::from_millis(20));
        shared()
    }
}

/// The container as policies and configured rules know it. Its image is looked up where a policy asks for it.
pub fn subject(container: &Container, holder: Option<&Holder>, wants_image: bool) -> Subject {
    let beside = || Some(container.bundle.as_ref()?.strip_suffix(&format!("/{}/userdata", container.id))?.to_owned());
    let stored = || storage::look_up(&container.id, &[beside()?]).map(|stored| stored.image.unwrap_or_default());
    let stated = || container.cgroup.clone().filter(|_| container.user().is_none());
    let cgroup = holder.map(|holder| holder.cgroup.clone()).or_else(stated);
    let bare_id = Some(container.bare_id()).filter(|id| container.name.as_deref() != Some(id));
    Subject {
        engine: container.runtime.engine(),
        names: container.name.as_deref().into_iter().chain(bare_id).map(str::to_owned).collect(),
        // Whoever names its containers by such ids gives them other names, too.
        is_nameless: container.name.is_none() && short_id(&container.id) != container.id,
        // Of a user's container that is not known: his files say what he wants.
        image: (wants_image && container.user().is_none()).then(|| container.image.clone().or_else(stored)).flatten(),
        owner: container.owner,
        is_users: container.user().is_some(),
        cgroup: cgroup.unwrap_or_default(),
    }
}

/// Why the user whose container it is may not have the device by asking for it, in words.
pub fn own_refusal(user: u32, device: &Device) -> Option<String> {
    permission::refusal(device, &Account::of(user))
}

/// The container's own `/etc/group`, read inside: its file system may be of its own making.
pub fn groups(container: &Container, host: Host) -> Result<String> {
    let label = container.label();
    let process = process_of(&Holder::without_cgroup(container))?;
    let descriptors = group::own_descriptors().map_err(Error::host("look at our own descriptors"))?;
    let read = inside(label, &process, host, move |inside| group::read(inside.root, descriptors.as_fd()))?;
    read.map_err(|source| Error::InContainer {
        container: label.to_owned(),
        what: "read its /etc/group".into(),
        source,
    })
}
