//! What was seen of a host, for [`crate::core::diagnosis`].

use crate::core::hook_file::Definition;

/// What only root can see is `None` for others.
pub type Seen<T> = Option<T>;

/// All that was seen of a host.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Path of this program.
    pub program: String,
    /// Whether this process may do the work, or why not.
    pub rights: Result<(), String>,
    /// `uname -r`.
    pub release: String,
    /// Whether the kernel takes the programs of the device filter, or why not.
    pub takes_filter: Seen<Result<(), String>>,
    /// The cgroup2 hierarchy, or why there is none to work on.
    pub cgroup: Result<Cgroup, String>,
    /// The device filter that is in force. `None` also where there is no cgroup2 hierarchy.
    pub filter: Seen<Result<Filter, String>>,
    /// Whether udevd's socket is there.
    pub has_udev_socket: bool,
    /// Whether a process of udevd's runs.
    pub has_udevd: bool,
    /// Where engines look for hooks.
    pub hook_directories: Vec<String>,
    /// The hooks that they read.
    pub hooks: Vec<HookFile>,
    /// The service.
    pub service: Service,
    /// The agent: `Ok(None)` where none runs.
    pub agent: Seen<Result<Option<Agent>, String>>,
    /// What is wrong with the configuration.
    pub configuration: Seen<Vec<String>>,
    /// The container engines that there are.
    pub engines: Vec<Engine>,
    /// The running containers.
    pub containers: Seen<Vec<Found>>,
    /// Where container-hotplug was found.
    pub rivals: Vec<Rival>,
    /// Security modules that are in force.
    pub security: Vec<&'static str>,
}

/// The cgroup2 hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// Where its root is mounted.
    pub path: String,
    /// Whether the host has the devices controller of cgroup v1 too.
    pub has_v1_devices: bool,
}

/// The device filter at the cgroup root.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Whether it is attached.
    pub attached: bool,
    /// Names of foreign programs that run after ours.
    pub after: Vec<String>,
    /// Grants in the ledger.
    pub grants: usize,
}

/// A file in a hooks directory.
#[derive(Debug, Clone)]
pub struct HookFile {
    /// Its path.
    pub path: String,
    /// What it says, or why it cannot be read.
    pub definition: Result<Definition, String>,
    /// What its program is.
    pub program: HookProgram,
}

/// What the program of a hook is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookProgram {
    /// This program, whatever the path.
    Ours,
    /// Another one.
    Other,
    /// Nothing that can be started.
    Missing,
}

/// The systemd service.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// Whether systemd runs this host.
    pub has_systemd: bool,
    /// Whether it knows our unit.
    pub installed: bool,
    /// Whether it starts it at boot.
    pub enabled: bool,
}

/// An agent that runs.
#[derive(Debug, Clone)]
pub struct Agent {
    /// Its version.
    pub version: String,
    /// What it says is wrong with the configuration.
    pub configuration: Vec<String>,
}

/// A container engine.
#[derive(Debug, Clone)]
pub struct Engine {
    /// What stands before a container's name.
    pub name: &'static str,
    /// The directories of its state that are there.
    pub state: Vec<&'static str>,
}

/// A running container.
#[derive(Debug, Clone)]
pub struct Found {
    /// As a person would name it.
    pub name: String,
    /// Why it cannot be worked on.
    pub problem: Option<String>,
}

/// A trace of container-hotplug, which replaces device filters of containers that it has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rival {
    /// A process with that number.
    Process(u32),
    /// A configuration file of an engine that names it.
    Configuration(String),
    /// Its program.
    Program(String),
}
