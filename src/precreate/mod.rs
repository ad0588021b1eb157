//! The OCI precreate hook: `config.json` on stdin, edited, on stdout. It takes the place of containers/qm's
//! `oci-qm-device-manager` and `oci-qm-wayland-client-devices`, and of each under its name.

pub mod discovery;
mod grant;
pub mod log;
mod mirror;

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::config;
use crate::core::annotation::{AT_START, HOTPLUG_PREFIX, PREFIX, UDEV, obstacle};
use crate::core::mirror::Wish;
use crate::core::spec;
use crate::error::{Error, Result};
use crate::precreate::discovery::Discovery;
use crate::precreate::grant::grant;
use crate::precreate::log::Log;

/// One of containers/qm's hooks: what it looks at, and what it calls itself.
#[derive(Debug)]
pub struct Hook {
    /// The name of its program.
    pub program: &'static str,
    /// The name in its log lines.
    name: &'static str,
    title: &'static str,
    log: &'static str,
    /// Whether the annotations of Wayland clients are its own, or all others.
    of_wayland_clients: bool,
}

/// Devices by category, and seats.
pub static DEVICE_MANAGER: Hook = Hook {
    program: "oci-qm-device-manager",
    name: "qm-device-manager",
    title: "QM Device Manager",
    log: "/var/log/qm-device-manager.log",
    of_wayland_clients: false,
};

/// GPUs of Wayland clients.
pub static WAYLAND_CLIENT: Hook = Hook {
    program: "oci-qm-wayland-client-devices",
    name: "qm-wayland-client-devices",
    title: "QM Wayland Client Devices",
    log: "/var/log/qm-wayland-client-devices.log",
    of_wayland_clients: true,
};

impl Hook {
    fn takes(&self, key: &str) -> bool {
        let rest = key.strip_prefix(PREFIX).filter(|_| ![AT_START, UDEV].contains(&key));
        rest.is_some_and(|rest| rest.starts_with("wayland-client.") == self.of_wayland_clients)
    }

    /// The hook that a program of that path is called as, by its file name.
    pub fn called_as(program: &str) -> Option<&'static Hook> {
        let name = Path::new(program).file_name()?.to_str()?;
        [&DEVICE_MANAGER, &WAYLAND_CLIENT].into_iter().find(|hook| hook.program == name)
    }
}

/// What the hook finds around it.
pub struct Surroundings<'a> {
    /// Finds devices.
    pub discovery: &'a dyn Discovery,
    /// The log file, where it is another one than the hook's own.
    pub log: Option<PathBuf>,
    /// Whether containers are shown what this host's udev knows.
    pub has_udev: bool,
}

/// Runs the hook: one of them, or with `None` both, as far as the container has annotations for them. With nothing of
/// ours asked for, stdout is byte for byte stdin. Devices that are not there are no error; a document that is no OCI
/// specification is, and then nothing is written.
pub fn run(
    hook: Option<&'static Hook>,
    around: &Surroundings<'_>,
    input: &mut impl Read,
    output: &mut impl Write,
) -> Result<()> {
    let mut text = Vec::new();
    input.read_to_end(&mut text).map_err(Error::host("read config.json from stdin"))?;
    let mut logs = Vec::new();
    let edited = edit(hook, around, &text, &mut logs).inspect_err(|error| {
        let hook = hook.unwrap_or(&DEVICE_MANAGER);
        logs.push(new_log(hook, around));
        logs.last_mut().expect("it was just put there").error(&error.chain());
    });
    logs.iter().for_each(Log::write);
    output
        .write_all(edited?.as_deref().unwrap_or(&text))
        .and_then(|()| output.flush())
        .map_err(Error::host("write config.json to stdout"))
}

fn new_log(hook: &Hook, around: &Surroundings<'_>) -> Log {
    Log::new(hook.name, around.log.as_deref().unwrap_or(Path::new(hook.log)))
}

/// serde_json takes an object with this key for a number, so that it could come out as another value.
const NUMBER_TOKEN: &str = "$serde_json::private::Number";

/// The edited document, or `None` where nothing changes.
fn edit(
    hook: Option<&'static Hook>,
    around: &Surroundings<'_>,
    text: &[u8],
    logs: &mut Vec<Log>,
) -> Result<Option<Vec<u8>>> {
    let bad = |reason: String| Error::BadFile { path: "config.json on stdin".into(), reason };
    if text.iter().all(u8::is_ascii_whitespace) {
        return Err(bad("it is empty: an OCI specification is expected".into()));
    }
    let (settings, problems) = config::settings();
    if hook.is_none() && !settings.has_rules() && is_without_ours(text) {
        return Ok(None);
    }
    if text.windows(NUMBER_TOKEN.len()).any(|window| window == NUMBER_TOKEN.as_bytes()) {
        return Err(bad(format!("it has '{NUMBER_TOKEN}' in it, which could not be kept as it is")));
    }
    let mut spec: Value = serde_json::from_slice(text).map_err(|error| bad(format!("not valid JSON: {error}")))?;
    let annotations = spec::annotations(&spec).map_err(bad)?;
    let of = |hook: &Hook| annotations.iter().filter(|(key, _)| hook.takes(key)).cloned().collect::<Vec<_>>();
    let subject = grant::subject(&spec, settings.policies.look_at_images());
    let given = settings.rules_for(&subject);
    if hook.is_none() && given.is_empty() && annotations.iter().all(|(key, _)| !key.starts_with(PREFIX)) {
        return Ok(None);
    }
    let hooks = match hook {
        Some(hook) => vec![hook],
        None if of(&WAYLAND_CLIENT).is_empty() => vec![&DEVICE_MANAGER],
        None if of(&DEVICE_MANAGER).is_empty() && given.is_empty() => vec![&WAYLAND_CLIENT],
        None => vec![&DEVICE_MANAGER, &WAYLAND_CLIENT],
    };
    let texts = annotations.iter().map(|(key, value)| (key.as_str(), value.as_deref().unwrap_or_default()));
    let obstacle = obstacle(texts.clone());
    let (mut changed, mut granted, mut asks) = (false, Vec::new(), false);
    for hook in hooks {
        let mut asked = of(hook);
        // Selectors first, as the agent has them: what they say of a node counts before what a category says.
        asked.sort_by_key(|(key, _)| !key.starts_with(HOTPLUG_PREFIX));
        let given = if hook.of_wayland_clients { &[][..] } else { &given };
        logs.push(new_log(hook, around));
        let log = logs.last_mut().expect("it was just put there");
        if asked.is_empty() && given.is_empty() {
            log.info("No QM device annotations found");
        } else {
            // Also where no device is there: what is no specification is no better for that.
            spec::check(&spec).map_err(bad)?;
            for problem in &problems {
                tracing::warn!("passed over: {problem}");
                log.warning(&format!("Passing over {problem}"));
            }
            let wishes = grant::wishes(given, &asked, obstacle, &settings.categories);
            let bounds = settings.policies.bounds(&subject);
            asks |= !wishes.is_empty();
            changed |= grant(&mut spec, &subject, &bounds, wishes, around.discovery, log, &mut granted)?;
            log.info(&format!("Total devices in spec: {}", spec::device_count(&spec)));
        }
        log.info(&format!("{} hook completed successfully", hook.title));
    }
    if around.has_udev && asks {
        changed |= mirror::show(&mut spec, Wish::of(texts), &granted);
    }
    Ok(changed.then(|| serde_json::to_vec(&spec).expect("a JSON value is printable")))
}

/// Whether it is a specification that has nothing of ours in it: that is seen without taking it apart.
fn is_without_ours(text: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(borrow, default)]
        annotations: Option<HashMap<Cow<'a, str>, IgnoredAny>>,
    }
    // Whatever is wrong with it, the whole look at it tells. To serde, an array could be a structure, too.
    if text.trim_ascii_start().first() != Some(&b'{') {
        return false;
    }
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let head: serde_json::Result<Head<'_>> = serde_json::from_str(text);
    head.is_ok_and(|head| head.annotations.is_none_or(|all| !all.keys().any(|key| key.starts_with(PREFIX))))
}

#[cfg(test)]
mod tests;
