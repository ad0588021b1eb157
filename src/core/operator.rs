//! Operators: who beside root may attach and detach, what, and where.

use crate::core::facts::Facts;
use crate::core::policy::{NamePattern, Subject};
use crate::core::selector::Selector;

/// A user or a group, as it is written: a name or a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// A user.
    User(Id),
    /// All who are in a group.
    Group(Id),
}

/// A name or a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Id {
    /// A number.
    Number(u32),
    /// A name.
    Name(String),
}

impl Id {
    fn is(&self, number: u32, name: Option<&str>) -> bool {
        match self {
            Id::Number(its) => *its == number,
            Id::Name(its) => name == Some(its),
        }
    }
}

/// Who calls, and is not root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// The user's number.
    pub uid: u32,
    /// The user's name, where the number has one.
    pub name: Option<String>,
    /// Numbers and names of the user's groups.
    pub groups: Vec<(u32, Option<String>)>,
}

/// One table `[[operator]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// Who is one.
    pub who: Who,
    /// For which containers; all that root runs, where there is none.
    pub container: Option<NamePattern>,
    /// Which devices.
    pub allow: Vec<Selector>,
}

impl Operator {
    /// Whether the caller is meant.
    pub fn is(&self, caller: &Caller) -> bool {
        match &self.who {
            Who::User(id) => id.is(caller.uid, caller.name.as_deref()),
            Who::Group(id) => caller.groups.iter().any(|(gid, name)| id.is(*gid, name.as_deref())),
        }
    }

    /// Whether he may give the container the device, or take it back. One that is not there any more may be taken back by
    /// whoever may change the container.
    pub fn may(&self, container: &Subject, device: Option<&Facts<'_>>) -> bool {
        let is_device_allowed = |facts: &Facts<'_>| self.allow.iter().any(|selector| selector.matches(facts));
        self.container.as_ref().map_or(!container.is_users, |pattern| pattern.gives_to(container))
            && device.is_none_or(is_device_allowed)
    }
}
