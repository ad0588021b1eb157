//! Policies: what the administrator lets annotations ask for.

use std::fmt;
use std::sync::Arc;

use crate::core::facts::Facts;
use crate::core::glob::Glob;
use crate::core::selector::Selector;

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
    /// Its name and its id, as far as they are known.
    pub names: Vec<String>,
    /// The name of its image.
    pub image: Option<String>,
    /// The user who runs it.
    pub owner: u32,
    /// The path of its cgroup.
    pub cgroup: String,
}

/// Bounds for the containers that all its conditions fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Where it begins.
    pub place: Place,
    /// On a name.
    pub container: Option<Glob>,
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

impl Policy {
    fn is_for(&self, subject: &Subject) -> bool {
        let fits = |glob: &Option<Glob>, values: &[String]| {
            glob.as_ref().is_none_or(|glob| values.iter().any(|value| glob.matches(value)))
        };
        fits(&self.container, &subject.names)
            && fits(&self.image, subject.image.as_slice())
            && fits(&self.cgroup, std::slice::from_ref(&subject.cgroup))
            && self.owner.is_none_or(|owner| owner == subject.owner)
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
        Bounds {
            required: self.required.clone(),
            policies: self.all.iter().filter(|policy| policy.is_for(subject)).cloned().collect(),
            unreadable: self.unreadable.clone(),
        }
    }
}

/// What bounds one container. Without any policy it is not bounded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bounds {
    required: Option<Place>,
    policies: Vec<Arc<Policy>>,
    unreadable: Option<String>,
}

impl Bounds {
    /// Why the container may not ask for the device, in words, with file and line.
    pub fn refusal(&self, facts: &Facts<'_>) -> Option<String> {
        if let Some(problem) = &self.unreadable {
            return Some(format!("the policy cannot be read, so nothing is allowed: {problem}"));
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
