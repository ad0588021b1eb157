//! Whether a host can do the work: from what was seen of it to lines, each with its state and what to do.

use serde::Serialize;

use crate::core::hook_file::Definition;
use crate::core::host::{Cgroup, Engine, Facts, Filter, HookFile, HookProgram, Rival, Service};

/// How well something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Something works less well, or not for all containers.
    Warning,
    /// The work cannot be done.
    Problem,
}

impl State {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Problem => "problem",
        }
    }
}

/// One line of what `doctor` found. The field names, the topics and the states are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckInfo {
    /// What was looked at: `rights`, `kernel`, `cgroup`, `filter`, `udev`, `hook`, `agent`, `config`, `engines`,
    /// `containers`, `rivals`, `security`. A topic may have several lines.
    pub topic: &'static str,
    /// `ok`, `warning` or `problem`.
    pub state: State,
    /// What was found, in words.
    pub finding: String,
    /// What to do, where not all is well.
    pub remedy: Option<String>,
}

/// How many containers that cannot be worked on get a line of their own.
const SHOWN: usize = 10;

/// All lines, in the order in which one thing needs another.
pub fn lines(facts: &Facts) -> Vec<CheckInfo> {
    let mut lines = vec![rights(facts), kernel(facts), cgroup(facts), filter(facts), udev(facts)];
    lines.extend(hook(facts));
    lines.extend([agent(facts)]);
    lines.extend(configuration(facts));
    lines.extend([engines(facts)]);
    lines.extend(containers(facts));
    lines.extend(rivals(facts));
    lines.extend([security(facts)]);
    lines
}

fn ok(topic: &'static str, finding: impl Into<String>) -> CheckInfo {
    CheckInfo { topic, state: State::Ok, finding: finding.into(), remedy: None }
}

fn warning(topic: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> CheckInfo {
    CheckInfo { topic, state: State::Warning, finding: finding.into(), remedy: Some(remedy.into()) }
}

fn problem(topic: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> CheckInfo {
    CheckInfo { state: State::Problem, ..warning(topic, finding, remedy) }
}

/// What was not looked at is not called well.
fn unseen(topic: &'static str) -> CheckInfo {
    warning(topic, "not looked at: that takes root's rights", "sudo qm-hotplug doctor")
}

fn rights(facts: &Facts) -> CheckInfo {
    match &facts.rights {
        Ok(()) => ok("rights", "root, with all capabilities that are needed"),
        Err(reason) => problem("rights", reason, "sudo qm-hotplug doctor, on the host itself"),
    }
}

fn kernel(facts: &Facts) -> CheckInfo {
    let release = &facts.release;
    match &facts.takes_filter {
        None => unseen("kernel"),
        Some(Ok(())) => ok("kernel", format!("Linux {release} takes the device filter")),
        Some(Err(reason)) => problem(
            "kernel",
            reason,
            "boot Linux 6.1 or newer; what this one was built with: grep CGROUP_BPF /boot/config-$(uname -r)",
        ),
    }
}

fn cgroup(facts: &Facts) -> CheckInfo {
    match &facts.cgroup {
        Ok(Cgroup { path, has_v1_devices: false }) => ok("cgroup", format!("cgroup2 at {path}")),
        Ok(Cgroup { path, has_v1_devices: true }) => warning(
            "cgroup",
            format!("cgroup2 at {path}; containers under the devices controller of cgroup v1 cannot be served"),
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
        // The reason ends with what to do.
        Err(reason) => {
            let (finding, remedy) = reason.split_once(": ").unwrap_or((reason, "run on the host itself"));
            problem("cgroup", finding, remedy)
        }
    }
}

fn filter(facts: &Facts) -> CheckInfo {
    let path = match (&facts.cgroup, &facts.rights) {
        (Ok(cgroup), _) => &cgroup.path,
        (Err(_), Err(_)) => return unseen("filter"),
        (Err(_), Ok(())) => return warning("filter", "not looked at: there is no cgroup root", "see cgroup, above"),
    };
    match &facts.filter {
        None => unseen("filter"),
        Some(Err(reason)) => problem("filter", reason, "sudo qm-hotplug status"),
        Some(Ok(Filter { attached: false, grants: 0, .. })) => ok("filter", "not loaded, since nothing is granted"),
        Some(Ok(Filter { attached: false, grants, .. })) => problem(
            "filter",
            format!("not attached to the cgroup root, so {grants} grants do not hold"),
            "sudo systemctl restart qm-hotplug",
        ),
        Some(Ok(Filter { after, .. })) if after.is_empty() => ok("filter", "runs last at the cgroup root"),
        Some(Ok(Filter { after, .. })) => warning(
            "filter",
            format!("{} at the cgroup root runs after ours and may refuse what is granted", after.join(", ")),
            format!("sudo qm-hotplug explain CTR DEV says whether it does; sudo bpftool cgroup list {path} shows it"),
        ),
    }
}

fn udev(facts: &Facts) -> CheckInfo {
    let start = match facts.service.has_systemd {
        true => "sudo systemctl restart systemd-udevd",
        false => "sudo /lib/systemd/systemd-udevd --daemon",
    };
    match (facts.has_udev_socket, facts.has_udevd) {
        (true, true) => ok("udev", "udevd runs"),
        (true, false) => {
            warning("udev", "/run/udev/control is there, but no udevd runs: its events may not come", start)
        }
        (false, true) => warning("udev", "udevd runs without /run/udev/control, so it is not heard", start),
        (false, false) => {
            warning("udev", "no udevd: devices come from the kernel, without udev's permissions and links", start)
        }
    }
}

/// The hook of ours, then what others have put beside it.
fn hook(facts: &Facts) -> Vec<CheckInfo> {
    let install = "sudo scripts/install.sh, in a checkout";
    let at_precreate = |definition: &Definition| definition.stages.iter().any(|stage| stage == "precreate");
    let (mut lines, mut has_ours) = (Vec::new(), false);
    for HookFile { path, definition, program } in &facts.hooks {
        let definition = match definition {
            Ok(definition) => definition,
            Err(reason) => {
                let finding = format!("{path}: {reason}; engines that read it start no container");
                lines.push(problem("hook", finding, format!("sudo mv {path} {path}.bad, or mend it")));
                continue;
            }
        };
        let its = &definition.program;
        let is_for_us = is_named(path, "qm-hotplug.json") || is_named(its, "qm-hotplug");
        match program {
            HookProgram::Ours if at_precreate(definition) => {
                has_ours = true;
                lines.push(ok("hook", format!("{path} starts this program")));
            }
            HookProgram::Ours => {
                lines.push(problem("hook", format!("{path} starts this program, but not at precreate"), install));
            }
            HookProgram::Missing => {
                let finding =
                    format!("{path} starts {its}, which is no program: containers that it is for do not start");
                let remedy = if is_for_us { install.to_owned() } else { format!("sudo mv {path} {path}.bad") };
                lines.push(problem("hook", finding, remedy));
                has_ours |= is_for_us;
            }
            HookProgram::Other if is_for_us => {
                let finding = format!("{path} starts {its}, and this is {}", facts.program);
                lines.push(warning("hook", finding, format!("sudo {its} doctor, or {install}")));
                has_ours = true;
            }
            HookProgram::Other if file_name(its).starts_with("oci-qm-") => lines.push(warning(
                "rivals",
                format!("{path} starts containers/qm's {its}: what it gives does not open"),
                format!("sudo ln -sf {} {its}, or sudo rm {path}", facts.program),
            )),
            HookProgram::Other => {
                // Those at `prestart`, its older name, are at createRuntime.
                let early = ["precreate", "createRuntime", "prestart"];
                if let Some(stage) = definition.stages.iter().find(|stage| early.contains(&stage.as_str())) {
                    lines.push(warning(
                        "rivals",
                        format!("{path} starts {its} at {stage}, where it may change a container's devices"),
                        format!("see what it does: cat {path}"),
                    ));
                }
            }
        }
    }
    if !has_ours {
        let finding = format!(
            "none of ours in {}: what is plugged in at a container's start comes when an agent finds the container",
            facts.hook_directories.join(" or ")
        );
        lines.insert(0, warning("hook", finding, install));
    }
    lines.sort_by_key(|line| line.topic == "rivals");
    lines
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn is_named(path: &str, name: &str) -> bool {
    file_name(path) == name
}

fn agent(facts: &Facts) -> CheckInfo {
    let Service { has_systemd, installed, enabled } = facts.service;
    let ours = env!("CARGO_PKG_VERSION");
    match &facts.agent {
        None => unseen("agent"),
        Some(Err(reason)) => problem("agent", reason, "sudo systemctl restart qm-hotplug"),
        Some(Ok(Some(agent))) if agent.version != ours => warning(
            "agent",
            format!("version {} runs, and this program is {ours}", agent.version),
            "sudo systemctl restart qm-hotplug",
        ),
        Some(Ok(Some(_))) if has_systemd && !enabled => warning(
            "agent",
            "runs, but is not started at boot",
            if installed { "sudo systemctl enable qm-hotplug" } else { "sudo scripts/install.sh, in a checkout" },
        ),
        Some(Ok(Some(agent))) => ok("agent", format!("runs, version {}", agent.version)),
        Some(Ok(None)) => {
            let remedy = match (has_systemd, installed) {
                (true, true) => "sudo systemctl enable --now qm-hotplug",
                (true, false) => "sudo scripts/install.sh, in a checkout",
                (false, _) => "sudo qm-hotplug agent",
            };
            let unit = match (has_systemd, installed, enabled) {
                (false, ..) => "",
                (true, false, _) => ", and its unit is not installed",
                (true, true, false) => ", and is not started at boot",
                (true, true, true) => ", though it is enabled",
            };
            warning("agent", format!("does not run: plugs and unplugs are not followed{unit}"), remedy)
        }
    }
}

fn configuration(facts: &Facts) -> Vec<CheckInfo> {
    let Some(problems) = &facts.configuration else { return vec![unseen("config")] };
    let agents = match &facts.agent {
        Some(Ok(Some(agent))) => &agent.configuration[..],
        _ => &[],
    };
    match (&problems[..], agents) {
        ([], []) => vec![ok("config", "valid")],
        ([], [first, ..]) => {
            let finding = format!("valid, but the agent goes by an older one, where it found {first}");
            vec![warning("config", finding, "sudo qm-hotplug reload")]
        }
        (all, _) => {
            let line = |reason: &String| {
                let file = reason.split(':').next().unwrap_or_default();
                problem("config", reason, format!("mend {file}, then sudo qm-hotplug reload"))
            };
            all.iter().map(line).collect()
        }
    }
}

fn engines(facts: &Facts) -> CheckInfo {
    match &facts.engines[..] {
        [] => {
            warning("engines", "none is installed whose containers are found", "sudo apt-get install podman, for one")
        }
        all => {
            let describe = |engine: &Engine| match &engine.state[..] {
                [] => engine.name.to_owned(),
                state => format!("{} ({})", engine.name, state.join(", ")),
            };
            ok("engines", all.iter().map(describe).collect::<Vec<_>>().join(", "))
        }
    }
}

fn containers(facts: &Facts) -> Vec<CheckInfo> {
    let Some(all) = &facts.containers else { return vec![unseen("containers")] };
    let bad = || all.iter().filter_map(|found| Some((&found.name, found.problem.as_ref()?)));
    let finding = match (all.len(), bad().count()) {
        (0, _) => "none runs".to_owned(),
        (count, 0) => format!("{count} found, and all can be served"),
        (count, bad) => format!("{count} found, and {} can be served", count - bad),
    };
    let mut lines = vec![ok("containers", finding)];
    let remedy = |name: &String| format!("start {name} in another way, then look with sudo qm-hotplug ps");
    lines.extend(bad().take(SHOWN).map(|(name, reason)| warning("containers", reason, remedy(name))));
    if let Some(more) = bad().count().checked_sub(SHOWN + 1) {
        lines.push(warning("containers", format!("{} more cannot be served", more + 1), "sudo qm-hotplug ps"));
    }
    lines
}

fn rivals(facts: &Facts) -> Vec<CheckInfo> {
    let line = |rival: &Rival| match rival {
        Rival::Process(pid) => (
            format!("container-hotplug runs as process {pid}: it replaces the device filters of its containers"),
            "start those containers without it".to_owned(),
        ),
        Rival::Configuration(file) => (
            format!("{file} has an engine start container-hotplug"),
            format!("take it out: grep -n container-hotplug {file}"),
        ),
        Rival::Program(path) => (format!("container-hotplug is installed: {path}"), format!("sudo rm {path}")),
    };
    facts.rivals.iter().map(line).map(|(finding, remedy)| warning("rivals", finding, remedy)).collect()
}

fn security(facts: &Facts) -> CheckInfo {
    match &facts.security[..] {
        [] => ok("security", "neither SELinux nor AppArmor is in force"),
        all => {
            ok("security", format!("{}; `qm-hotplug explain` names a container's context or profile", all.join(", ")))
        }
    }
}

#[cfg(test)]
#[path = "diagnosis_tests.rs"]
mod tests;
