//! What the rules of a container add to its specification.

use std::collections::HashMap;
use std::io;
use std::time::Instant;

use serde_json::Value;

use crate::core::annotation::{Ignored, Obstacle, rule, whole};
use crate::core::category::Categories;
use crate::core::container::{Runtime, short_id};
use crate::core::device::Number;
use crate::core::policy::{Bounds, Subject};
use crate::core::rule::Rule;
use crate::core::spec::{self, add_devices};
use crate::error::{Error, Result};
use crate::precreate::discovery::{Discovery, Found, Request};
use crate::precreate::log::Log;
use crate::runtime::storage;
use crate::sys::arrival::Arrivals;
use crate::sys::process::outer_user;

/// A rule, or why it is none; and the annotation that it stands in.
type Wish = (Option<String>, std::result::Result<Rule, Ignored>);

/// What a container asks for, after what it gets without asking.
pub(super) fn wishes(
    given: &[Rule],
    asked: &[(String, spec::Annotation)],
    obstacle: Option<Obstacle<'_>>,
    categories: &Categories,
) -> Vec<Wish> {
    let asked = asked.iter().map(|(key, value)| {
        let rule = value_of(key, value, categories);
        let text = value.as_deref().unwrap_or_default();
        (Some(key.clone()), rule.and_then(|rule| whole(rule, key, text, obstacle)))
    });
    given.iter().map(|rule| (None, Ok(rule.clone()))).chain(asked).collect()
}

fn value_of(key: &str, value: &spec::Annotation, categories: &Categories) -> std::result::Result<Rule, Ignored> {
    let no_text = |kind: &str| {
        Err(Ignored { key: key.to_owned(), reason: format!("its value is {kind}, not a string"), required: false })
    };
    match value {
        Ok(text) => rule(key, text, categories).unwrap_or_else(|| no_text("of somebody else")),
        Err(kind) => no_text(kind),
    }
}

/// The container as policies and configured rules know it.
pub(super) fn subject(spec: &Value, wants_image: bool) -> Subject {
    let id = spec::container_id(spec);
    let stored = id.as_ref().and_then(|id| storage::look_up(id, &spec::storage_directories(spec, id)));
    // One that is made of a directory has no image, and that is known.
    let image = stored.as_ref().map(|stored| stored.image.clone().unwrap_or_default());
    let name = stored.and_then(|stored| stored.name);
    Subject {
        // The engine that calls hooks.
        engine: Runtime::Crun.engine(),
        is_nameless: name.is_none(),
        names: name.into_iter().chain(id).collect(),
        image: image.filter(|_| wants_image),
        owner: outer_user(),
        cgroup: spec::cgroup_path(spec).unwrap_or_default(),
    }
}

/// What a person calls the container.
fn label(subject: &Subject) -> String {
    match &*subject.names {
        [] => "(unknown)".into(),
        [id] => short_id(id).to_owned(),
        [name, id, ..] => format!("{name} ({})", short_id(id)),
    }
}

/// Adds what the rules ask for; what that is, goes to `granted`, too. Returns whether that changed anything.
pub(super) fn grant(
    spec: &mut Value,
    subject: &Subject,
    bounds: &Bounds,
    wishes: Vec<Wish>,
    discovery: &dyn Discovery,
    log: &mut Log,
    granted: &mut Vec<Number>,
) -> Result<bool> {
    let container = label(subject);
    log.info(&format!("Processing QM device annotations of container {container}"));
    let root = spec.pointer("/root/path").and_then(Value::as_str).map(str::to_owned);
    let bad = |reason| Error::BadFile { path: "config.json on stdin".into(), reason };
    let begun = Instant::now();
    let (mut changed, mut at_start, mut taken) = (false, Vec::new(), HashMap::<String, Number>::new());
    for (key, wish) in wishes {
        let refuse = |code: u8, reason: String| Error::Required {
            code,
            container: container.clone(),
            rule: key.clone().unwrap_or_else(|| "a [[container]] of the configuration".into()),
            reason,
        };
        let rule = match wish {
            Ok(rule) => rule,
            Err(Ignored { reason, required: true, .. }) => return Err(refuse(2, reason)),
            Err(Ignored { key, reason, .. }) => {
                tracing::warn!(container, "annotation {key} ignored: {reason}");
                log.warning(&format!("Skipping annotation {key}: {reason}"));
                continue;
            }
        };
        let what = match &rule {
            Rule::Category(category) => format!("{} devices", category.name),
            Rule::Seat(seat) => format!("Wayland seat devices for {}", seat.name),
            Rule::Selection(selection) => format!("{} devices", selection.name),
        };
        let request = Request { bounds, root: root.as_deref(), taken: &taken };
        let found = match look(&rule, &request, discovery, begun) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(container, "cannot look for {what}: {error}");
                log.warning(&format!("Cannot look for {what}: {error}"));
                if rule.selection().is_some_and(|selection| selection.options.required) {
                    return Err(refuse(1, format!("it is required, and cannot be looked for: {error}")));
                }
                continue;
            }
        };
        for (path, reason) in &found.withheld {
            tracing::warn!(container, device = path, "{path} not granted: {reason}");
            log.warning(&format!("Not adding device: {path}: {reason}"));
        }
        if let Some(selection) = rule.selection().filter(|it| it.options.required && found.devices.is_empty()) {
            let withheld = found.withheld.first().map(|(path, reason)| format!("{path} is not granted: {reason}"));
            let waited = selection.options.wait.map_or(String::new(), |wait| format!(" after {wait:?}"));
            let missing = || format!("no device that matches '{}' is plugged in{waited}", selection.selector);
            let code = if withheld.is_some() { 5 } else { 4 };
            return Err(refuse(code, format!("it is required, and {}", withheld.unwrap_or_else(missing))));
        }
        // As containers/qm's hook does, also where no device is found.
        changed |= spec::ensure_linux(spec);
        let added = add_devices(spec, &found.devices).map_err(bad)?;
        for device in &found.devices {
            let number = device.number;
            taken.insert(device.path.clone(), number);
            granted.push(number);
            log.info(&format!(
                "Adding device: {} (type={}, major={}, minor={})",
                device.path,
                number.kind.letter(),
                number.major,
                number.minor
            ));
        }
        for path in &added.corrected {
            tracing::warn!(container, device = path, "{path} had stale numbers, which are corrected");
            log.warning(&format!("Correcting stale numbers of device: {path}"));
        }
        let count = found.devices.len();
        if let (0, Rule::Seat(seat)) = (count, &rule) {
            tracing::warn!(container, "no devices found for seat {}, or it does not exist", seat.name);
            log.warning(&format!("No devices found for seat {} or seat does not exist", seat.name));
        }
        tracing::info!(container, category = %rule, count, "added {count} {what} to {container}");
        log.info(&format!("Added {count} {what} to container {container}"));
        changed |= added != Default::default();
        if rule.selection().is_some() {
            at_start.extend(added.devices.into_iter().chain(added.corrected));
        }
    }
    spec::note_at_start(spec, &at_start);
    Ok(changed)
}

/// Looks for what the rule stands for; again and again, where it says that it is to be waited for. All wait from the same
/// moment on: one after the other they could outlast what engines give a hook.
fn look(rule: &Rule, request: &Request<'_>, discovery: &dyn Discovery, begun: Instant) -> io::Result<Found> {
    let wait = rule.selection().and_then(|selection| selection.options.wait);
    let Some(deadline) = wait.map(|wait| begun + wait) else { return discovery.devices(rule, request) };
    let mut arrivals = Arrivals::listen()?;
    loop {
        let found = discovery.devices(rule, request)?;
        // What is there and refused is not waited for.
        if !found.devices.is_empty() || !found.withheld.is_empty() || !arrivals.wait(deadline)? {
            return Ok(found);
        }
    }
}
