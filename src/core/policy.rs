//! Policies: what the administrator lets annotations ask for.

use std::fmt;
use std::sync::Arc;

use crate::core::container::split_engine;
use crate::core::facts::Facts;
use crate::core::glob::Glob;
use crate::core::selector::{Key, Selector, Term, Test};

/// Where something is written, `FILE:LINE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<str>,
    /// The line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A container, as policies and configured rules know it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subject {
    /// Who runs it, as [`Runtime::engine`](crate::core::container::Runtime::engine) names it.
    pub engine: &'static str,
    /// Its name and its id, as far as they are known.
    pub names: Vec<String>,
    /// Whether it may have a name that is not among these.
    pub is_nameless: bool,
    /// The name of its image, where that is known.
    pub image: Option<String>,
    /// The user who runs it.
    pub owner: u32,
    /// Whether an ordinary user's engine runs it.
    pub is_users: bool,
    /// The path of its cgroup, beginning with `/`.
    pub cgroup: String,
}

/// A pattern for names, for those of one engine where one stands before it, `lxc:web-*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern {
    engine: Option<&'static str>,
    name: Glob,
    /// Whether a user is written in it.
    names_user: bool,
}

impl NamePattern {
    /// Reads it. Errors have the character at which it is wrong, counted from 0, and the reason.
    pub fn parse(text: &str) -> Result<NamePattern, (usize, String)> {
        let (engine, name) = split_engine(text).map_err(|reason| (0, reason))?;
        let before = text.chars().count() - name.chars().count();
        let names_user = name.contains('@');
        let name = Glob::parse(name).map_err(|(column, reason)| (before + column, reason.to_string()))?;
        Ok(NamePattern { engine, name, names_user })
    }

    /// Whether it is for the container.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.is_for_engine(subject) && subject.names.iter().any(|name| self.name.matches(name))
    }

    /// Whether what it gives is for the container: for a user's it is where a user is written, `*@web`, since any other
    /// name he could have taken.
    pub fn gives_to(&self, subject: &Subject) -> bool {
        (self.names_user || !subject.is_users) && self.matches(subject)
    }

    fn is_for_engine(&self, subject: &Subject) -> bool {
        self.engine.is_none_or(|engine| engine == subject.engine)
    }
}

/// Bounds for the containers that all its conditions fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Where it begins.
    pub place: Place,
    /// On a name.
    pub container: Option<NamePattern>,
    /// On the image.
    pub image: Option<Glob>,
    /// The owner.
    pub owner: Option<u32>,
    /// On the cgroup.
    pub cgroup: Option<Glob>,
    /// Only these, if it is given.
    pub allow: Option<Vec<Selector>>,
    /// Not these, each with the place where it is written.
    pub deny: Vec<(Selector, Place)>,
}

impl Subject {
    /// The cgroup and those that it is in: a runtime may make one more level below what it was told.
    fn cgroups(&self) -> Vec<String> {
        let ends = self.cgroup.match_indices('/').map(|(at, _)| at).skip(1).chain([self.cgroup.len()]);
        ends.map(|end| self.cgroup[..end].to_owned()).collect()
    }
}

impl Policy {
    /// Whether it counts for the container; `None` where the container's name or image decides on it and is not known.
    fn is_for(&self, subject: &Subject) -> Option<bool> {
        let fits = |glob: &Option<Glob>, values: &[String], all_known: bool| match glob {
            Some(glob) if values.iter().any(|value| glob.matches(value)) => Some(true),
            Some(_) => all_known.then_some(false),
            None => Some(true),
        };
        let conditions = [
            // A user's container may have none that anybody knows.
            fits(&self.cgroup, &subject.cgroups(), !subject.cgroup.is_empty()),
            Some(self.owner.is_none_or(|owner| owner == subject.owner)),
            match &self.container {
                Some(pattern) if pattern.matches(subject) => Some(true),
                Some(pattern) if pattern.is_for_engine(subject) => (!subject.is_nameless).then_some(false),
                Some(_) => Some(false),
                None => Some(true),
            },
            fits(&self.image, subject.image.as_slice(), subject.image.is_some()),
        ];
        match conditions.contains(&Some(false)) {
            true => Some(false),
            false => conditions.into_iter().collect::<Option<Vec<_>>>().map(|_| true),
        }
    }
}

/// The policies of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policies {
    /// Where `require-policy = true` is written, if it is.
    pub required: Option<Place>,
    /// In the order of files and lines.
    pub all: Vec<Arc<Policy>>,
    /// What is wrong with a file that may have held a policy. Until that is mended, nothing is allowed.
    pub unreadable: Option<String>,
}

impl Policies {
    /// Whether any of them looks at images.
    pub fn look_at_images(&self) -> bool {
        self.all.iter().any(|policy| policy.image.is_some())
    }

    /// What bounds this container.
    pub fn bounds(&self, subject: &Subject) -> Bounds {
        let unclear = self.all.iter().find(|policy| policy.is_for(subject).is_none());
        let unclear = unclear.map(|policy| format!("{}: the container's name or image is not known", policy.place));
        Bounds {
            required: self.required.clone(),
            policies: self.all.iter().filter(|policy| policy.is_for(subject) == Some(true)).cloned().collect(),
            unclear: self.unreadable.clone().or(unclear),
        }
    }
}

/// What bounds one container. Without any policy it is not bounded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bounds {
    required: Option<Place>,
    policies: Vec<Arc<Policy>>,
    /// Why it is not known what bounds it.
    unclear: Option<String>,
}

impl Bounds {
    /// Whether it may have whatever it asks for.
    pub fn is_open(&self) -> bool {
        self.required.is_none() && self.policies.is_empty() && self.unclear.is_none()
    }

    /// Whether other devices decide on what it may have of one.
    pub fn looks_around(&self) -> bool {
        let denied = self.policies.iter().flat_map(|policy| policy.deny.iter().map(|(selector, _)| selector));
        let allowed = self.policies.iter().flat_map(|policy| policy.allow.iter().flatten());
        denied.chain(allowed).any(Selector::looks_around)
    }

    /// Whether a policy for this user by his number allows the device.
    pub fn gives(&self, user: u32, facts: &Facts<'_>) -> bool {
        let his = self.policies.iter().filter(|policy| policy.owner == Some(user));
        his.flat_map(|policy| policy.allow.iter().flatten()).any(|selector| selector.matches(facts))
    }

    /// Why the container may not ask for the device, in words, with file and line.
    pub fn refusal(&self, facts: &Facts<'_>) -> Option<String> {
        if let Some(problem) = &self.unclear {
            return Some(format!("what the policy says is not known, so nothing is allowed: {problem}"));
        }
        // Its driver is not loaded, and nobody knows more than its node's name.
        let by_name = |term: &Term| matches!(term.test, Test::Category(_) | Test::Value(Key::Devname, _));
        let is_clear = |policy: &&Arc<Policy>| policy.deny.iter().all(|(its, _)| its.terms.iter().all(by_name));
        if facts.device.identity.devpath.is_empty()
            && let Some(policy) = self.policies.iter().find(|policy| !is_clear(policy))
        {
            return Some(format!(
                "its driver is not loaded, so what the policy denies cannot be told: {}",
                policy.place
            ));
        }
        let denies = |policy: &Arc<Policy>| policy.deny.iter().find(|(selector, _)| selector.matches(facts)).cloned();
        if let Some((selector, place)) = self.policies.iter().find_map(denies) {
            return Some(format!("the policy denies it: {place}: deny = \"{selector}\""));
        }
        let lists = || self.policies.iter().filter_map(|policy| Some((policy.allow.as_ref()?, &policy.place)));
        if lists().flat_map(|(allow, _)| allow).any(|selector| selector.matches(facts)) {
            return None;
        }
        match (lists().next(), &self.required) {
            (Some((_, place)), _) => {
                Some(format!("the policy does not allow it: {place}: allow has nothing that matches"))
            }
            (None, Some(place)) => Some(format!("no policy allows it: {place}: require-policy = true")),
            (None, None) => None,
        }
    }
}
