//! Completion in a shell, from what is there now. `COMPLETE=bash qm-hotplug` prints what the shell has to read once; at
//! each Tab that calls `COMPLETE=bash qm-hotplug -- WORD...`. Files are read and nothing else is done: no agent is
//! asked, and what cannot be read is passed over without a word.

mod bash;
mod offer;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::CommandFactory;
use clap_complete::env::{Fish, Shells, Zsh};
use clap_complete::{CompleteEnv, CompletionCandidate};
use rustix::fs::{FileType, stat};

use crate::cli::Cli;
use crate::cli::complete::bash::Bash;
use crate::cli::complete::offer::Offer;
use crate::config;
use crate::core::facts::Facts;
use crate::ops::RUN_DIRECTORY;
use crate::ops::devices::natural;
use crate::ops::persist::Persisted;
use crate::ops::store::Store;
use crate::runtime;
use crate::sys::sysfs::KernelSysfs;
use crate::sys::udev;

/// Answers a shell and ends the process, where one asks. Who has exported `COMPLETE` still starts containers through the
/// hook: a shell calls without a command, or with `--` in its place.
pub fn answer_shell() {
    if matches!(std::env::args_os().nth(1), Some(first) if first != "--") {
        return;
    }
    CompleteEnv::with_factory(Cli::command).shells(Shells(&[&Bash, &Fish, &Zsh])).complete();
}

/// `CTR`: the running containers.
pub(super) fn containers(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, |typed| offer::containers(&runtime::scan(), typed))
}

/// `CTR` of what is kept for restarts, too.
pub(super) fn containers_and_kept(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, |typed| {
        let mut all = offer::containers(&runtime::scan(), typed);
        for kept in Persisted::look().all() {
            if all.iter().all(|one| one.text != kept.container.name) {
                all.push(Offer::new(&kept.container.name, "kept for its restart"));
            }
        }
        all
    })
}

/// `DEV`: nodes on the host, and links to them.
pub(super) fn devices(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, |typed| paths(typed).into_iter().map(|path| Offer::new(path, "")).collect())
}

/// `DEV` as a path or a selector.
pub(super) fn devices_or_selector(typed: &OsStr) -> Vec<CompletionCandidate> {
    let is_path = typed.is_empty() || typed.as_encoded_bytes().starts_with(b"/");
    if is_path { devices(typed) } else { selector(typed) }
}

/// `SELECTOR`.
pub(super) fn selector(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, |typed| {
        let (settings, _) = config::settings();
        // Only values come from devices, and to look at these takes time.
        let devices = if typed.contains('=') { udev::scan().unwrap_or_default() } else { Vec::new() };
        let sysfs = KernelSysfs::default();
        let facts: Vec<Facts<'_>> = devices.iter().map(|device| Facts::new(device, &sysfs)).collect();
        offer::selector(&settings.categories, &facts, typed)
    })
}

/// `DEV` of what the container that was typed before has: paths inside.
pub(super) fn granted(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, |_| {
        let words: Vec<String> = std::env::args_os().filter_map(|word| word.into_string().ok()).collect();
        let containers = runtime::scan();
        let named = offer::container_among(&containers, &words);
        let entries = Store::peek(Path::new(RUN_DIRECTORY), |_, _| {}).unwrap_or_default();
        let is_its = |id: &String| named.is_some_and(|container| container.id == *id);
        let in_force = entries.iter().filter(|entry| is_its(&entry.grant.holder.id));
        let mut paths: Vec<String> = in_force.map(|entry| entry.grant.node.path.clone()).collect();
        for kept in Persisted::look().all() {
            let is_named = || words.contains(&kept.container.name);
            if named.map_or_else(is_named, |container| kept.is_for(container)) {
                paths.extend(kept.devices.iter().map(|device| device.node.path.clone()));
            }
        }
        paths.sort();
        paths.dedup();
        paths.iter().map(|path| Offer::new(path, "")).collect()
    })
}

/// The same, and where that is nothing, the devices of the host: a person asks also for what is missing.
pub(super) fn granted_or_devices(typed: &OsStr) -> Vec<CompletionCandidate> {
    let its = granted(typed);
    if its.is_empty() { devices(typed) } else { its }
}

/// What `/dev` has in the directory that was typed: nodes, links to them, and directories to go on in. To ask udev takes
/// ten times as long.
fn paths(typed: &str) -> Vec<String> {
    let directory = typed.rfind('/').map_or("", |at| &typed[..=at]);
    let directory = if directory.starts_with("/dev/") { directory } else { "/dev/" };
    let Ok(of_dev) = stat("/dev") else { return Vec::new() };
    let names = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let path = |name: OsString| {
        let path = format!("{directory}{}", name.to_str()?);
        // Those of /dev/stdin and its like lead to whatever the shell has open.
        let is_of_process = std::fs::read_link(&path).is_ok_and(|target| target.starts_with("/proc"));
        let found = stat(&path).ok().filter(|_| !is_of_process)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::CharacterDevice | FileType::BlockDevice => Some(path),
            // Others, as /dev/pts, are file systems of their own.
            FileType::Directory if found.st_dev == of_dev.st_dev => Some(path + "/"),
            _ => None,
        }
    };
    let mut paths: Vec<String> = names.filter_map(path).collect();
    paths.sort_by(|a, b| natural(a).cmp(&natural(b)));
    paths
}

/// Those that begin with what was typed, where a shell can take the rest as it is: what was typed is the person's own.
fn candidates(typed: &OsStr, offers: impl FnOnce(&str) -> Vec<Offer>) -> Vec<CompletionCandidate> {
    let Some(typed) = typed.to_str() else { return Vec::new() };
    let mut offers = offers(typed);
    offers.retain(|offer| offer.text.strip_prefix(typed).is_some_and(offer::is_plain));
    let help = |text: String| if text.is_empty() { None } else { Some(text.into()) };
    offers.into_iter().map(|Offer { text, help: its }| CompletionCandidate::new(text).help(help(its))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_devices() {
        let all = paths("");
        assert!(all.contains(&"/dev/null".into()) && all == paths("/dev/nul") && all == paths("/de"), "{all:?}");
        for other in ["/dev/pts", "/dev/pts/", "/dev/stdin", "/dev/fd", "/dev/fd/", "/dev/log"] {
            assert!(!all.contains(&other.into()), "{other}");
        }
        assert!(paths("/dev/net/t").iter().all(|path| path.starts_with("/dev/net/")));
        assert_eq!(paths("/dev/nothing/x"), [""; 0]);
    }
}
