//! Rules: what a container asks for.

use std::fmt;
use std::sync::Arc;

use crate::core::category::Category;
use crate::core::device::{Access, Device, Kind, Number};
use crate::core::facts::Facts;
use crate::core::ledger::{Node, Origin};
use crate::core::seat::{self, Seat};
use crate::core::selection::{Group, Matched, Selection};

/// What a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// All devices of a category.
    Category(Arc<Category>),
    /// All devices of a seat.
    Seat(Seat),
    /// Those that a selector means.
    Selection(Arc<Selection>),
}

impl Rule {
    /// Whether it asks for the device, and how.
    pub fn matches(&self, facts: &Facts<'_>) -> Option<Matched> {
        match self {
            Rule::Category(category) => category.contains(facts.device).then_some(Matched::Itself),
            Rule::Seat(seat) => seat.has(facts.device).then_some(Matched::Itself),
            Rule::Selection(selection) => selection.matches(facts),
        }
    }

    /// Whether a node at that path, with a number whose device is gone, may have been granted by it.
    pub fn may_stand_for(&self, number: Number, path: &str) -> bool {
        match self {
            Rule::Category(category) => category.kind == number.kind && category.contains_node(path),
            Rule::Seat(_) => number.kind == Kind::Char && seat::may_have(path),
            Rule::Selection(selection) => selection.may_have_made(path),
        }
    }

    /// The nodes that the container gets for a device that it asks for: the device's own first, then links to it.
    pub fn nodes(&self, device: &Device, how: Matched, gid: Option<u32>) -> Vec<Node> {
        match self {
            Rule::Selection(selection) => selection.nodes(device, how, gid),
            _ => vec![Node::of(device)],
        }
    }

    /// The rights on it.
    pub fn access(&self) -> Access {
        self.selection().and_then(|selection| selection.options.access).unwrap_or(Access::ALL)
    }

    /// The name of the group inside that its nodes are to have, where it is given by name.
    pub fn group(&self) -> Option<&Group> {
        self.selection()?.options.gid.as_ref()
    }

    /// Whether one container at a time may have the device.
    pub fn is_exclusive(&self) -> bool {
        self.selection().is_some_and(|selection| selection.options.exclusive)
    }

    /// Whether a policy of the administrator bounds it.
    pub fn is_bounded(&self) -> bool {
        !self.selection().is_some_and(|selection| selection.trusted)
    }

    /// Whether it can only be told whom it means once udev has spoken: what udev adds could make a device another one.
    pub fn needs_udev(&self) -> bool {
        match self {
            Rule::Category(_) => false,
            Rule::Seat(_) => true,
            Rule::Selection(selection) => {
                let options = &selection.options;
                options.udev_links || options.children || options.exclusive || selection.selector.needs_udev()
            }
        }
    }

    /// Why its grants are there.
    pub fn origin(&self) -> Origin {
        match self.selection() {
            Some(selection) if selection.persist => Origin::Persist,
            _ => Origin::Rule(self.to_string()),
        }
    }

    /// The selector with its options, if it is one.
    pub fn selection(&self) -> Option<&Selection> {
        match self {
            Rule::Selection(selection) => Some(selection),
            _ => None,
        }
    }
}

/// The name of the category, the seat or the selector.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::Category(category) => &category.name,
            Rule::Seat(seat) => &seat.name,
            Rule::Selection(selection) => &selection.name,
        })
    }
}
