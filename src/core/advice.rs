//! What to do where a container cannot open a device.

use crate::core::annotation::DEVICE_PREFIX;
use crate::core::category::is_forbidden;
use crate::core::device::Kind;
use crate::core::explanation::{Ask, Situation, allowed};
use crate::core::proof::{Found, Seen, Subject};

/// What a rule's grant is compared by again.
const COMPARES: &str = "which compares what annotations ask for with what is there";

/// Each a clause. Empty where nothing could be asked: the reason for that says what to do.
pub(super) fn advice(facts: &Situation<'_>) -> Vec<String> {
    let Situation { container, node, filter, .. } = facts;
    let Subject { path, number, .. } = &facts.subject;
    if facts.device.is_none() {
        return vec![format!("plug {node} in")];
    }
    let Ok(answer) = &facts.answer else { return Vec::new() };
    let there = match &answer.found {
        Found::Node(seen) if seen.number == *number => Some(seen),
        _ => None,
    };
    let (refused, has) = (answer.filter == Some(1), facts.has_right());
    let attach = attach(facts);
    let mut all = Vec::new();
    match &facts.grant {
        None if refused || there.is_none() => all.push(get(facts, there.is_none() && answer.found != Found::Missing)),
        Some(grant) if there.is_none() || refused && !has => all.push(match (grant.manual, facts.agent) {
            (true, _) => format!("qm-hotplug detach {container} {path}, then {attach}"),
            (false, true) => format!("systemctl restart qm-hotplug, {COMPARES}"),
            (false, false) => format!("systemctl start qm-hotplug, {COMPARES}"),
        }),
        _ if refused && has && filter.below && !filter.marked => {
            all.push("systemctl restart qm-hotplug, which puts the mark back".into());
        }
        _ => {}
    }
    if refused && has && !filter.after.is_empty() {
        all.push(format!("have whoever attached {} at the cgroup root detach it", filter.after.join(", ")));
    }
    if let Some(seen) = there.filter(|_| facts.grant.is_some() || !refused) {
        permissions(facts, seen, answer.user, answer.directory, &attach, &mut all);
    }
    if all.is_empty() {
        all.push("see `qm-hotplug status`".into());
    }
    all
}

fn attach(facts: &Situation<'_>) -> String {
    let Situation { container, node, subject, .. } = facts;
    let destination = if subject.path == *node { String::new() } else { format!(" {}", subject.path) };
    format!("qm-hotplug attach {container} {node}{destination}")
}

/// How the container would get the device.
fn get(facts: &Situation<'_>, is_taken: bool) -> String {
    let attach = match is_taken {
        true => {
            format!("qm-hotplug attach {} {} DEST, with another path inside as DEST", facts.container, facts.node)
        }
        false => attach(facts),
    };
    let asks_for = |ask: &Ask| match (&ask.rule, facts.device) {
        (Ok(rule), Some(device)) => allowed(rule, facts, device).is_ok(),
        _ => false,
    };
    if facts.asks.iter().any(asks_for) {
        return match (&facts.in_use, facts.agent) {
            (Some(_), _) if facts.subject.number.kind == Kind::Block => {
                format!("{attach}, if the host can do without it")
            }
            (Some(_), _) => "wait until it is free, or see to that".into(),
            (None, false) => {
                "start the agent, which grants what annotations ask for: systemctl start qm-hotplug".into()
            }
            (None, true) => format!("see why the agent has not granted it: journalctl -t qm-hotplug; or {attach}"),
        };
    }
    let refused = |ask: &Ask| {
        let (rule, device) = (ask.rule.as_ref().ok()?, facts.device?);
        rule.matches(device).and_then(|_| allowed(rule, facts, device).err())
    };
    if let Some(reason) = facts.asks.iter().find_map(refused) {
        if facts.own_refusal.as_ref() == Some(&reason) {
            return format!("give the user that permission as said above, or {attach}");
        }
        return format!("change the policy ({reason}), and have it read: qm-hotplug reload; or {attach}");
    }
    let annotation = match facts.category {
        Some(category) => {
            let enable = if category.enabled { "" } else { ", which has to be enabled" };
            format!("--annotation {DEVICE_PREFIX}{}=true{enable}", category.name)
        }
        None if is_forbidden(facts.subject.number) => return attach,
        None => format!("the annotation that `qm-hotplug devices --annotation {}` prints", facts.node),
    };
    format!("{attach}, or start it with {annotation}")
}

fn permissions(
    facts: &Situation<'_>,
    seen: &Seen,
    user: Option<i32>,
    directory: bool,
    attach: &str,
    all: &mut Vec<String>,
) {
    let Situation { container, node, subject, .. } = facts;
    if seen.nodev {
        all.push(format!("qm-hotplug attach {container} {node} DEST, with a path below /dev as DEST"));
    }
    all.extend(match (user, directory) {
        (None | Some(0 | 1), _) => None,
        (_, true) => Some("let its user reach the directory inside".into()),
        (_, false) if facts.grant.as_ref().is_some_and(|grant| grant.manual) => {
            Some(format!("qm-hotplug detach {container} {}, then {attach} with --mode, --uid or --gid", subject.path))
        }
        (_, false) => {
            Some(format!("start it with --group-add {}, or give the host's node another mode by a udev rule", seen.gid))
        }
    });
}
