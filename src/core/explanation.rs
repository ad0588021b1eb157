//! Why a container can or cannot open a device: from facts to findings, and what to do.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::core::advice::advice;
use crate::core::category::{Category, is_forbidden};
use crate::core::device::{Access, Kind};
use crate::core::facts::Facts;
use crate::core::policy::Bounds;
use crate::core::proof::{Answer, Found, Subject, errno_name, judge, user_may_not};
use crate::core::rule::Rule;

/// Whether a finding helps or stands in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is in the way here.
    Good,
    /// This is in the way.
    Bad,
    /// Worth knowing.
    Note,
}

/// One line of the explanation. The field names and topics are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `rule`, `grant`, `filter`, `node`, `mount`, `mode`, `lsm`, `device`, `container`.
    pub topic: Cow<'static, str>,
    /// Good, bad or a note.
    pub verdict: Verdict,
    /// In words.
    pub text: String,
}

/// The explanation. The field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Whether init can open the device; `None` where that could not be asked.
    pub accessible: Option<bool>,
    /// In the order in which they matter.
    pub findings: Vec<Finding>,
    /// What to do, each as a clause; empty where all is well.
    pub advice: Vec<String>,
}

/// A rule of the container.
#[derive(Debug, Clone)]
pub struct Ask {
    /// The annotation's key, or where else it comes from.
    pub source: String,
    /// What it asks for, or why it grants nothing.
    pub rule: Result<Rule, String>,
}

/// What a foreign device program says, asked alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alone {
    /// It lets the access pass.
    Allows,
    /// It refuses it.
    Refuses,
    /// It cannot be asked; why, in words.
    Unknown(String),
}

/// A foreign device program on the way from the container to the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The cgroup that it is attached to, `/` for the root.
    pub cgroup: String,
    /// Its name, often empty.
    pub name: String,
    /// Its id.
    pub id: u32,
    /// What it says.
    pub verdict: Alone,
}

/// How the device filter is for one container and one device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Foreign programs, in the order in which they run.
    pub programs: Vec<Judged>,
    /// What our map grants; `None` where our program is not attached.
    pub granted: Option<Access>,
    /// Whether the right from the container's start is withdrawn.
    pub withdrawn: bool,
    /// Whether our mark is in first place on the container's cgroup.
    pub marked: bool,
    /// Whether init is in a cgroup below the container's own, where a grant holds by the mark alone.
    pub below: bool,
    /// Names of foreign programs at the root that run after ours.
    pub after: Vec<String>,
    /// Whether rights are not given to this container in the filter: its node is its right.
    pub is_none: bool,
}

/// A grant in the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// Its rights.
    pub access: Access,
    /// `attached by hand` or `by its annotation for ttyUSB`.
    pub origin: String,
    /// Whether a person gave it, and not a rule.
    pub manual: bool,
    /// What could not be taken back, where that is so.
    pub left_over: Option<String>,
}

/// All that is known.
pub struct Situation<'a> {
    /// The container's name, as the advice is to name it.
    pub container: &'a str,
    /// The device's node on the host.
    pub node: &'a str,
    /// The device, while it is plugged in.
    pub device: Option<&'a Facts<'a>>,
    /// Why no rule gives it to a container now: the host uses it, another container has it for itself alone, or its path
    /// inside is another device's.
    pub in_use: Option<String>,
    /// What is asked about inside.
    pub subject: Subject,
    /// Its annotations, and what the host's configuration gives it.
    pub asks: Vec<Ask>,
    /// What its annotations may ask for.
    pub bounds: &'a Bounds,
    /// Why the user whose container it is may not ask for the device, where no policy gives it to him.
    pub own_refusal: Option<String>,
    /// A category that has the device.
    pub category: Option<&'a Category>,
    /// The grant in the ledger.
    pub grant: Option<Granted>,
    /// Whether an agent runs.
    pub agent: bool,
    /// Why the container cannot be served; then there is nothing to say of the filter.
    pub problem: Option<String>,
    /// The filter.
    pub filter: Filter,
    /// What the kernel answered inside, or why it was not asked.
    pub answer: Result<Answer, String>,
    /// What a security module calls init.
    pub label: Option<String>,
}

impl Situation<'_> {
    /// Whether our map grants what is asked for.
    pub(super) fn has_right(&self) -> bool {
        let wanted = self.subject.access.bits();
        self.filter.granted.is_some_and(|granted| granted.bits() & wanted == wanted)
    }
}

/// Puts the facts into words.
pub fn explain(facts: &Situation<'_>) -> Explanation {
    let mut all = Vec::new();
    device(facts, &mut all);
    rules(facts, &mut all);
    grant(facts, &mut all);
    if let Some(problem) = &facts.problem {
        all.push(bad("container", problem.clone()));
        return Explanation { accessible: None, findings: all, advice: Vec::new() };
    }
    filter(facts, &mut all);
    node(facts, &mut all);
    if let Some(text) = facts.label.as_deref().and_then(security) {
        all.push(note("lsm", text));
    }
    let accessible = facts.answer.as_ref().ok().map(|answer| judge(&facts.subject, answer).code == 0);
    let advice = if accessible == Some(true) { Vec::new() } else { advice(facts) };
    Explanation { accessible, findings: all, advice }
}

fn good(topic: &'static str, text: impl Into<String>) -> Finding {
    Finding { topic: topic.into(), verdict: Verdict::Good, text: text.into() }
}

fn bad(topic: &'static str, text: impl Into<String>) -> Finding {
    Finding { topic: topic.into(), verdict: Verdict::Bad, text: text.into() }
}

fn note(topic: &'static str, text: impl Into<String>) -> Finding {
    Finding { topic: topic.into(), verdict: Verdict::Note, text: text.into() }
}

fn device(facts: &Situation<'_>, all: &mut Vec<Finding>) {
    match facts.device {
        Some(Facts { device, .. }) => {
            all.push(good("device", format!("{} is {} on the host", device.node, device.number)));
        }
        None => all.push(bad("device", format!("{} ({}) is not plugged in", facts.node, facts.subject.number))),
    }
    if let Some(reason) = &facts.in_use {
        all.push(bad("device", format!("no annotation gives it to a container now: {reason}")));
    }
}

fn rules(facts: &Situation<'_>, all: &mut Vec<Finding>) {
    if facts.asks.is_empty() {
        all.push(note("rule", "the container has no annotation that asks for devices"));
    }
    for ask in &facts.asks {
        all.push(match &ask.rule {
            Err(reason) => note("rule", format!("{} ignored: {reason}", ask.source)),
            Ok(rule) => match facts.device.map(|device| allowed(rule, facts, device)) {
                None => note("rule", format!("{rule} ({})", ask.source)),
                Some(Ok(())) => good("rule", format!("{rule} ({}): yes", ask.source)),
                Some(Err(reason)) => note("rule", format!("{rule} ({}): no, {reason}", ask.source)),
            },
        });
    }
}

/// Whether the rule asks for the device and may; else why not, in words.
pub(super) fn allowed(rule: &Rule, facts: &Situation<'_>, device: &Facts<'_>) -> Result<(), String> {
    let bounded = || facts.bounds.refusal(device).or_else(|| facts.own_refusal.clone());
    match why_not(rule, device).or_else(|| rule.is_bounded().then(bounded).flatten()) {
        None => Ok(()),
        Some(reason) => Err(reason),
    }
}

/// Why the rule does not ask for the device, in words; `None` where it does.
pub fn why_not(rule: &Rule, facts: &Facts<'_>) -> Option<String> {
    if rule.matches(facts).is_some() {
        return None;
    }
    let device = facts.device;
    let (node, number) = (&device.node, device.number);
    if is_forbidden(number) {
        return Some(format!("{node} is the host itself, which no annotation grants"));
    }
    let kind = |kind: Kind| if kind == Kind::Block { "block" } else { "character" };
    Some(match rule {
        Rule::Category(category) if category.kind != number.kind && category.contains_node(node) => {
            format!("{node} is a {} device", kind(number.kind))
        }
        Rule::Category(_) => format!("{node} is not in this category"),
        Rule::Selection(selection) => match selection.selector.failing(facts) {
            Some(reason) if selection.selector.is_withheld(facts) => reason,
            Some(term) => format!("the term {term} does not match"),
            None => "it is not what the selector means".into(),
        },
        Rule::Seat(_) if number.kind == Kind::Block => format!("{node} is a block device, which no seat has"),
        Rule::Seat(seat) => {
            let its = device.properties.get("ID_SEAT").map(String::as_str).filter(|its| !its.is_empty());
            let withheld = seat.withheld.iter().find(|category| category.contains(device));
            match (its.unwrap_or("seat0"), withheld) {
                (its, _) if its != seat.name => format!("{node} belongs to {its}"),
                (_, Some(category)) => format!("{node} is in the category {}, which no seat brings", category.name),
                _ => format!("udev assigns {node} to no seat"),
            }
        }
    })
}

fn grant(facts: &Situation<'_>, all: &mut Vec<Finding>) {
    let Some(grant) = &facts.grant else {
        all.push(note("grant", "none"));
        return;
    };
    let text = format!("{} at {}, {}", grant.access, facts.subject.path, grant.origin);
    all.push(match &grant.left_over {
        Some(reason) => bad("grant", format!("{text}; left over: {reason}")),
        None => good("grant", text),
    });
}

fn filter(facts: &Situation<'_>, all: &mut Vec<Finding>) {
    let Filter { programs, granted, withdrawn, marked, below, after, is_none } = &facts.filter;
    let access = facts.subject.access;
    let verdict = facts.answer.as_ref().ok().and_then(|answer| answer.filter);
    let has = facts.has_right();
    let map = match granted {
        _ if *is_none => "the node is the right in a container of an ordinary user".to_owned(),
        None => "our program is not attached".to_owned(),
        Some(granted) if granted.is_none() => "no grant in our map".to_owned(),
        Some(granted) => format!("our map grants {granted}"),
    };
    match verdict {
        Some(0) if has => all.push(good("filter", format!("lets {access} pass: {map}"))),
        Some(0) => all.push(good("filter", format!("lets {access} pass, without us: {map}"))),
        Some(1) => {}
        Some(errno) => all.push(bad("filter", format!("{} for root: not the device filter", errno_name(errno)))),
        None => all.push(note("filter", format!("not asked; {map}"))),
    }
    let refused = verdict == Some(1);
    for program in programs {
        let what = name_of(program);
        match &program.verdict {
            Alone::Refuses if refused => all.push(bad("filter", format!("refused by {what}; {map}"))),
            Alone::Refuses if has && verdict == Some(0) => {
                all.push(note("filter", format!("refused by {what}, lifted by our grant")));
            }
            Alone::Refuses => all.push(note("filter", format!("refused by {what}"))),
            Alone::Unknown(reason) if verdict != Some(0) => {
                all.push(note("filter", format!("{what} cannot be asked alone: {reason}")));
            }
            _ => {}
        }
    }
    if *withdrawn {
        let text = "its right from the container's start is withdrawn until the device is granted again";
        all.push(bad("filter", text));
    }
    if refused && has && *below && !*marked {
        let text = "our mark is not in first place on its cgroup: the grant holds in that cgroup itself, not below";
        all.push(bad("filter", text));
    }
    if has && !after.is_empty() {
        let text = format!("{} at the cgroup root runs after ours and has the last word", after.join(", "));
        all.push(if refused { bad("filter", text) } else { note("filter", text) });
    }
    if refused && !all.iter().any(|finding| finding.topic == "filter" && finding.verdict == Verdict::Bad) {
        all.push(bad("filter", format!("refuses {access}, and none of the programs does so alone; {map}")));
    }
}

/// `the program of /machine.slice/x.scope (sd_devices)`.
fn name_of(program: &Judged) -> String {
    let name = if program.name.is_empty() { format!("unnamed, id {}", program.id) } else { program.name.clone() };
    format!("the program of {} ({name})", program.cgroup)
}

fn node(facts: &Situation<'_>, all: &mut Vec<Finding>) {
    let Subject { path, number, user, .. } = &facts.subject;
    let answer = match &facts.answer {
        Ok(answer) => answer,
        Err(reason) => {
            all.push(bad("container", reason.clone()));
            return;
        }
    };
    let seen = match &answer.found {
        Found::Missing => return all.push(bad("node", format!("{path} is missing inside"))),
        Found::Blocked(reason) => return all.push(bad("node", reason.clone())),
        Found::Other(what) => return all.push(bad("node", format!("{path} is {what} inside"))),
        Found::Node(seen) => seen,
    };
    let text = format!("{path} is {}, {:04o} {}:{}", seen.number, seen.mode, seen.uid, seen.gid);
    if seen.number != *number {
        return all.push(bad("node", format!("{text}, and not {number}")));
    }
    all.push(good("node", text));
    if seen.nodev {
        all.push(bad("mount", format!("{path} is on a mount that is nodev inside")));
    }
    all.push(match answer.user {
        // The filter is asked last, so its refusal means that the permission bits agree.
        Some(0 | 1) => good("mode", format!("{user} of its init may")),
        Some(errno) => bad("mode", user_may_not(user, seen, answer.directory, errno)),
        None => note("mode", format!("not asked for {user}")),
    });
}

/// What a security module may have against it, which nobody can ask from outside.
fn security(label: &str) -> Option<String> {
    // SELinux: user:role:type:level; AppArmor: profile (mode).
    match label.split(':').nth(2) {
        Some("unconfined_t" | "spc_t" | "kernel_t") => None,
        Some(_) => Some(format!("SELinux runs it as {label}, which may refuse too: see `ausearch -m avc`")),
        None if label == "unconfined" || label.ends_with("(unconfined)") => None,
        None => Some(format!("the AppArmor profile {label} may refuse too: see `journalctl -k --grep apparmor`")),
    }
}

#[cfg(test)]
#[path = "explanation_tests.rs"]
mod tests;
