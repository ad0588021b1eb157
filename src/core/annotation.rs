//! The annotations of a container that ask for devices.

use std::collections::BTreeMap;

use crate::core::category::Category;
use crate::core::text::printable;

/// What precedes the category's name; the same as containers/qm's device manager reads.
pub const DEVICE_PREFIX: &str = "org.containers.qm.device.";

/// What a container asks for: all devices of a category.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The category.
    pub category: &'static Category,
}

/// An annotation of ours that grants nothing, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// The annotation's key, printable.
    pub key: String,
    /// In words, to follow `annotation KEY ignored: `.
    pub reason: String,
}

/// The rules of a container. Unknown categories and values that do not switch on are returned beside them, to be logged.
pub fn rules<'a>(annotations: impl IntoIterator<Item = (&'a str, &'a str)>) -> (Vec<Rule>, Vec<Ignored>) {
    let (mut rules, mut ignored) = (Vec::new(), Vec::new());
    for (key, value) in annotations {
        let Some(name) = key.strip_prefix(DEVICE_PREFIX) else { continue };
        let reason = match (Category::named(name), value) {
            (None, _) => format!("there is no category '{name}'"),
            (Some(category), "true" | "1" | "yes") => {
                rules.push(Rule { category });
                continue;
            }
            (Some(_), other) => format!("'{other}' is none of true, 1 and yes"),
        };
        ignored.push(Ignored { key: printable(key), reason: printable(&reason) });
    }
    (rules, ignored)
}

/// [`rules`] of a map, without what was ignored.
pub fn rules_of(annotations: &BTreeMap<String, String>) -> Vec<Rule> {
    rules(annotations.iter().map(|(key, value)| (key.as_str(), value.as_str()))).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_true_1_and_yes_switch_a_category_on() {
        for value in ["true", "1", "yes"] {
            let (rules, ignored) = rules([("org.containers.qm.device.ttyUSB", value)]);
            assert_eq!((rules[0].category.name, ignored.len()), ("ttyUSB", 0));
        }
        for value in ["", "True", "false", "true ", "true\norg.containers.qm.device.audio=true"] {
            let (rules, ignored) = rules([("org.containers.qm.device.ttyUSB", value)]);
            assert_eq!((rules.len(), ignored.len()), (0, 1), "{value:?}");
        }
    }

    #[test]
    fn unknown_categories_are_named_and_foreign_keys_passed_over() {
        let (rules, ignored) = rules([("org.containers.qm.device.tape", "true"), ("io.podman.annotations.label", "x")]);
        assert!(rules.is_empty());
        assert_eq!(ignored[0].reason, "there is no category 'tape'");
    }
}
