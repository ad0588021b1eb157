//! What a host is like, for `doctor`. Nothing is changed, and what is loaded to try the kernel goes at once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::config;
use crate::core::hook_file;
use crate::core::host::{Agent, Cgroup, Engine, Facts, Filter, Found, HookFile, HookProgram, Rival, Seen, Service};
use crate::error::{Error, Result};
use crate::ops::RUN_DIRECTORY;
use crate::ops::live::hold;
use crate::ops::store::{self, Store};
use crate::runtime;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::device_filter::DeviceFilter;
use crate::sys::host::require_fitness;
use crate::sys::process::{Process, running};
use crate::sys::udev;

/// Engines: the name, programs of which it has one, directories of its state.
const ENGINES: [(&str, &[&str], &[&str]); 6] = [
    ("podman", &["podman"], &["/run/crun", "/run/runc"]),
    ("docker", &["dockerd", "docker"], &["/run/docker"]),
    ("containerd", &["containerd"], &["/run/containerd"]),
    ("lxc", &["lxc-start"], &[]),
    ("incus", &["incusd", "incus"], &["/run/incus"]),
    ("nspawn", &["systemd-nspawn"], &["/run/systemd/machines"]),
];

/// udevd's process: systemd's, and eudev's.
const UDEVD: [&str; 2] = ["systemd-udevd", "udevd"];

/// Where systemd looks for units (systemd.unit(5)).
const UNIT_DIRECTORIES: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Our unit.
const UNIT: &str = "qm-hotplug.service";

/// Programs are there also for who has a short PATH, as sudo gives it.
const PROGRAM_DIRECTORIES: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// container-hotplug's program.
const RIVAL: &str = "container-hotplug";

/// Where an engine may be told to start it in the place of a runtime, beside Podman's files.
const ENGINE_FILES: [&str; 2] = ["/etc/docker/daemon.json", "/etc/containerd/config.toml"];

/// Looks at this host. What the agent says is told by who has asked it.
pub fn look(agent: Seen<Result<Option<Agent>, String>>) -> Facts {
    let rights = require_fitness();
    let is_fit = rights.is_ok();
    let root = CgroupRoot::find();
    let podman: Vec<String> = podman_files().iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    let hook_directories = hook_file::directories(&podman);
    Facts {
        program: std::env::current_exe().unwrap_or_default().display().to_string(),
        rights: in_words(rights),
        release: rustix::system::uname().release().to_string_lossy().into_owned(),
        takes_filter: is_fit.then(|| in_words(DeviceFilter::prove())),
        filter: root.as_ref().ok().filter(|_| is_fit).map(|root| in_words(filter(root))),
        containers: is_fit.then(|| containers(root.as_ref().ok())),
        cgroup: in_words(root.map(|root| {
            Cgroup {
                path: root.path.display().to_string(),
                has_v1_devices: Process::open(std::process::id())
                    .and_then(|process| process.cgroups().ok())
                    .is_some_and(|(_, v1_devices)| v1_devices.is_some()),
            }
        })),
        has_udev_socket: udev::is_running(),
        has_udevd: UDEVD.iter().any(|name| !running(name).is_empty()),
        hooks: hooks(&hook_directories),
        hook_directories,
        service: service(),
        agent,
        configuration: configuration(is_fit),
        engines: engines(),
        rivals: rivals(),
        security: security(),
    }
}

fn in_words<T>(result: Result<T>) -> Result<T, String> {
    result.map_err(|error| error.chain())
}

fn filter(root: &CgroupRoot) -> Result<Filter> {
    let standing = DeviceFilter::standing(root)?;
    let grants = Store::peek(RUN_DIRECTORY.as_ref(), store::warn)?.len();
    Ok(Filter { attached: standing.attached, after: standing.after, grants })
}

/// Those that end meanwhile are left out.
fn containers(root: Option<&CgroupRoot>) -> Vec<Found> {
    let mut found = Vec::new();
    for container in runtime::scan() {
        let problem = match root.map(|root| hold(root, &container)) {
            Some(Ok(_)) => None,
            Some(Err(Error::ContainerExited(_))) => continue,
            Some(Err(error)) => Some(error.chain()),
            None => Some(format!("container '{}': there is no cgroup root to work on", container.label())),
        };
        found.push(Found { name: container.label().to_owned(), problem });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The hooks by name, those of the later directory in the place of others.
fn hooks(directories: &[String]) -> Vec<HookFile> {
    let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in directories {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let jsons = entries.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
        files.extend(jsons.filter_map(|path| Some((path.file_name()?.to_owned(), path))));
    }
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).map_err(|error| error.to_string());
        let definition = text.and_then(|text| hook_file::parse(&text));
        let program = definition.as_ref().map_or(HookProgram::Missing, |its| what_is(&its.program));
        HookFile { path: path.display().to_string(), definition, program }
    };
    files.into_values().map(read).collect()
}

/// The files of containers.conf(5) for root, those that count more behind the others.
fn podman_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for directory in ["/usr/share/containers", "/etc/containers"] {
        let more = Path::new(directory).join("containers.conf.d");
        let entries = fs::read_dir(more).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut more: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "conf")).collect();
        more.sort();
        files.push(Path::new(directory).join("containers.conf"));
        files.extend(more);
    }
    files
}

fn what_is(program: &str) -> HookProgram {
    let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    match fs::metadata(program) {
        Ok(its) if !is_executable(&its) => HookProgram::Missing,
        Ok(its) if fs::metadata("/proc/self/exe").is_ok_and(|ours| identity(&ours) == identity(&its)) => {
            HookProgram::Ours
        }
        Ok(_) => HookProgram::Other,
        Err(_) => HookProgram::Missing,
    }
}

fn is_executable(metadata: &fs::Metadata) -> bool {
    metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
}

fn service() -> Service {
    // A link of `systemctl enable` may lead to a file that is not there any more.
    let wanted_in = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let wants = |path: &PathBuf| path.extension().is_some_and(|end| end == "wants" || end == "requires");
        entries.filter(wants).any(|path| path.join(UNIT).is_symlink())
    };
    Service {
        has_systemd: Path::new("/run/systemd/system").is_dir(),
        installed: UNIT_DIRECTORIES.iter().any(|directory| Path::new(directory).join(UNIT).exists()),
        enabled: UNIT_DIRECTORIES.iter().any(|directory| wanted_in(directory)),
    }
}

/// What is wrong with the configuration. An ordinary user may not be let to read it.
fn configuration(is_fit: bool) -> Seen<Vec<String>> {
    let (_, problems) = config::settings();
    let is_hidden = |problem: &String| problem.ends_with("(os error 13)");
    (is_fit || !problems.iter().any(is_hidden)).then_some(problems)
}

fn engines() -> Vec<Engine> {
    let look = |(name, programs, places): (&'static str, &[&str], &[&'static str])| {
        let state: Vec<&str> = places.iter().copied().filter(|place| Path::new(place).is_dir()).collect();
        let is_there = !state.is_empty() || programs.iter().any(|program| program_at(program).is_some());
        is_there.then_some(Engine { name, state })
    };
    ENGINES.into_iter().filter_map(look).collect()
}

/// Where a program is.
fn program_at(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(PROGRAM_DIRECTORIES.map(PathBuf::from));
    directories.map(|directory| directory.join(name)).find(|path| fs::metadata(path).is_ok_and(|it| is_executable(&it)))
}

fn rivals() -> Vec<Rival> {
    let files = ENGINE_FILES.map(PathBuf::from).into_iter().chain(podman_files());
    let names_it = |path: &PathBuf| fs::read_to_string(path).is_ok_and(|text| text.contains(RIVAL));
    let processes = running(RIVAL).into_iter().map(Rival::Process);
    let configured = files.filter(names_it).map(|path| Rival::Configuration(path.display().to_string()));
    let program = program_at(RIVAL).map(|path| Rival::Program(path.display().to_string()));
    processes.chain(configured).chain(program).collect()
}

fn security() -> Vec<&'static str> {
    let says = |path: &str, text: &str| fs::read_to_string(path).is_ok_and(|its| its.trim() == text);
    let modules = [
        ("SELinux is enforcing", says("/sys/fs/selinux/enforce", "1")),
        ("SELinux is permissive", says("/sys/fs/selinux/enforce", "0")),
        ("AppArmor is in force", says("/sys/module/apparmor/parameters/enabled", "Y")),
    ];
    modules.into_iter().filter(|(_, is_so)| *is_so).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_of_the_administrator_take_the_place_of_those_of_packages() {
        let (packages, administrator) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let own = std::env::current_exe().unwrap();
        let write = |directory: &tempfile::TempDir, name: &str, program: &str| {
            let text = format!(r#"{{"hook": {{"path": "{program}"}}, "stages": ["precreate"]}}"#);
            fs::write(directory.path().join(name), text).unwrap();
        };
        write(&packages, "a.json", "/bin/sh");
        write(&packages, "b.json", "/bin/sh");
        write(&administrator, "b.json", own.to_str().unwrap());
        write(&administrator, "c.json", "/etc/passwd");
        fs::write(administrator.path().join("d.json"), "{").unwrap();
        fs::write(administrator.path().join("notes.txt"), "{").unwrap();
        let directory = |directory: &tempfile::TempDir| directory.path().to_str().unwrap().to_owned();
        let found = hooks(&[directory(&packages), "/nonexistent".into(), directory(&administrator)]);
        let seen: Vec<_> = found.iter().map(|hook| (hook.path.clone(), hook.program)).collect();
        let at = |directory: &tempfile::TempDir, name: &str| directory.path().join(name).display().to_string();
        assert_eq!(
            seen,
            [
                (at(&packages, "a.json"), HookProgram::Other),
                (at(&administrator, "b.json"), HookProgram::Ours),
                (at(&administrator, "c.json"), HookProgram::Missing),
                (at(&administrator, "d.json"), HookProgram::Missing),
            ]
        );
        assert!(found[3].definition.as_ref().unwrap_err().starts_with("not valid JSON"));
    }
}
