//! The annotations of a container that ask for devices.

use std::sync::Arc;

use crate::core::category::{Categories, render_nodes};
use crate::core::grammar::{Author, OPTIONS, selection};
use crate::core::rule::Rule;
use crate::core::seat::{self, Seat};
use crate::core::selection::Selection;
use crate::core::selector::{KEY_PREFIXES, KEYS, SPECIAL_KEYS};
use crate::core::text::excerpt;

/// What precedes all of ours and of containers/qm's.
pub const PREFIX: &str = "org.containers.qm.";
/// What precedes a category's name; the same as containers/qm's device manager reads.
pub const DEVICE_PREFIX: &str = "org.containers.qm.device.";
/// What precedes the name of a rule whose value is a selector with options.
pub const HOTPLUG_PREFIX: &str = "org.containers.qm.hotplug.";
/// Written by the hook into the specification: the paths of the nodes that it added for selectors, as a JSON array.
pub const AT_START: &str = "org.containers.qm.nodes-at-start";
/// Whether libudev inside is shown what udev knows of granted devices: `false` for not at all, `true` also where the
/// container runs systemd or a udevd of its own.
pub const UDEV: &str = "org.containers.qm.udev";
/// Asks for what belongs to the seat that is its value.
pub const SEAT: &str = "org.containers.qm.wayland.seat";
/// Asks for render nodes.
pub const GPU: &str = "org.containers.qm.wayland-client.gpu";

/// An annotation of ours that grants nothing, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// The annotation's key, printable.
    pub key: String,
    /// In words, to follow `annotation KEY ignored: `.
    pub reason: String,
    /// Whether the container must not start without it.
    pub required: bool,
}

/// What an annotation's value switches on, where it is in order; else why not, in words. `None` for annotations that
/// are not ours.
pub fn rule(key: &str, value: &str, categories: &Categories) -> Option<Result<Rule, Ignored>> {
    let name = key.strip_prefix(PREFIX).filter(|_| key != AT_START)?;
    if key == UDEV {
        let is_clear = matches!(value, "true" | "1" | "yes" | "false" | "0" | "no");
        let reason = excerpt(&format!("'{value}' is neither true nor false"));
        return (!is_clear).then(|| Err(Ignored { key: excerpt(key), reason, required: false }));
    }
    if let Some(name) = key.strip_prefix(HOTPLUG_PREFIX) {
        // A selector that cannot be read may have been one without which the container must not start.
        let required = value.split([',', ';']).any(|item| item.trim() == "required");
        let rule = hotplug(name, value, categories).map(|selection| Rule::Selection(Arc::new(selection)));
        return Some(rule.map_err(|reason| Ignored { key: excerpt(key), reason, required }));
    }
    let is_on = matches!(value, "true" | "1" | "yes");
    let is_not_on = || Err(format!("'{value}' is none of true, 1 and yes"));
    let rule = match (key.strip_prefix(DEVICE_PREFIX), key) {
        (Some(name), _) => match categories.named(name) {
            None => Err(format!("there is no category '{name}'")),
            Some(_) if !is_on => is_not_on(),
            Some(category) if !category.enabled => {
                Err(format!("a file in /etc/qm-hotplug/config.d has to enable it, with the line enable = [\"{name}\"]"))
            }
            Some(category) => Ok(Rule::Category(category.clone())),
        },
        (None, SEAT) if seat::is_valid_name(value) => {
            Ok(Rule::Seat(Seat { name: value.to_owned(), withheld: categories.sensitive() }))
        }
        (None, SEAT) => Err(format!("'{value}' is no name of a seat, such as seat0")),
        (None, GPU) if ["true", "1", "yes"].iter().any(|on| value.eq_ignore_ascii_case(on)) => {
            Ok(Rule::Category(Arc::new(render_nodes())))
        }
        (None, GPU) => is_not_on(),
        _ => Err(format!("there is no annotation '{name}'")),
    };
    Some(rule.map_err(|reason| Ignored { key: excerpt(key), reason: excerpt(&reason), required: false }))
}

/// Why no selector of a container counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle<'a> {
    /// There is an annotation that is the rest of one: podman 4.3 cuts the value of `--annotation` at each comma.
    Cut(&'a str),
    /// There are too many of them.
    TooMany,
}

/// How many selectors a container may ask with, and how long they may be together, in bytes: each event has all of them
/// looked at.
const MOST_SELECTORS: usize = 64;
const MOST_BYTES: usize = 16 << 10;
/// How many attributes: each is looked for in `/sys`, at every device and at all above it.
const MOST_ATTRIBUTES: usize = 32;

/// What stands in the way of a container's selectors, by the keys and values of its annotations.
pub fn obstacle<'a>(annotations: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Option<Obstacle<'a>> {
    let values = annotations.clone().filter(|(key, _)| key.starts_with(HOTPLUG_PREFIX)).map(|(_, value)| value);
    let attributes: usize = values.map(|value| value.matches("attr").count()).sum();
    let lengths = annotations.clone().filter(|(key, _)| key.starts_with(HOTPLUG_PREFIX)).map(|(_, value)| value.len());
    let too_many =
        attributes > MOST_ATTRIBUTES || lengths.clone().count() > MOST_SELECTORS || lengths.sum::<usize>() > MOST_BYTES;
    let cut = || annotations.map(|(key, _)| key).find(|key| is_key(key)).map(Obstacle::Cut);
    too_many.then_some(Obstacle::TooMany).or_else(cut)
}

/// Whether that is what a term or an option has before its `=`.
fn is_key(word: &str) -> bool {
    let word = word.trim().trim_end_matches('!');
    KEYS.iter().any(|(name, _)| *name == word)
        || OPTIONS.contains(&word)
        || SPECIAL_KEYS.contains(&word)
        || KEY_PREFIXES.iter().any(|prefix| word.starts_with(prefix))
}

/// The rule, unless it is a selector that something stands in the way of. One that was cut would stand for more devices
/// than it was to.
pub fn whole(rule: Rule, key: &str, value: &str, obstacle: Option<Obstacle<'_>>) -> Result<Rule, Ignored> {
    // What has a separator left was not cut at one.
    let counts = |obstacle: &Obstacle<'_>| match obstacle {
        Obstacle::Cut(_) => rule.selection().is_some() && !value.contains([',', ';']),
        Obstacle::TooMany => rule.selection().is_some(),
    };
    let Some(obstacle) = obstacle.filter(counts) else { return Ok(rule) };
    let reason = match obstacle {
        Obstacle::Cut(cut) => format!(
            "there is an annotation '{cut}', as if podman had cut a selector at its commas: write ';' in their place, {key}={value};{cut}=…, or give '{cut}' another name"
        ),
        Obstacle::TooMany => format!(
            "the container has more than {MOST_SELECTORS} annotations {HOTPLUG_PREFIX}NAME, or more than {MOST_BYTES} bytes or {MOST_ATTRIBUTES} attributes in them"
        ),
    };
    let required = rule.selection().is_some_and(|selection| selection.options.required);
    Err(Ignored { key: excerpt(key), reason: excerpt(&reason), required })
}

fn hotplug(name: &str, value: &str, categories: &Categories) -> Result<Selection, String> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(is_name) {
        return Err("its name must have 1 to 64 letters, digits, '.', '_' and '-' behind 'hotplug.'".into());
    }
    selection(name, value, categories, Author::Container).map_err(|error| error.to_string())
}

/// The rules of a container, selectors first: what they say of a node counts before what a category says. What asks for
/// nothing is returned beside them, to be logged.
pub fn rules<'a>(
    annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    categories: &Categories,
) -> (Vec<Rule>, Vec<Ignored>) {
    let (mut rules, mut ignored) = (Vec::new(), Vec::new());
    let annotations: Vec<(&str, &str)> = annotations.into_iter().collect();
    let obstacle = obstacle(annotations.iter().copied());
    for (key, value) in annotations {
        let Some(found) = rule(key, value, categories) else { continue };
        match found.and_then(|rule| whole(rule, key, value, obstacle)) {
            Ok(rule) => rules.push(rule),
            Err(one) => ignored.push(one),
        }
    }
    rules.sort_by_key(|rule: &Rule| rule.selection().is_none());
    (rules, ignored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(key: &str, value: &str) -> Result<String, String> {
        let rule = rule(key, value, &Categories::default()).expect("it is ours");
        rule.map(|rule| rule.to_string()).map_err(|ignored| ignored.reason)
    }

    #[test]
    fn only_true_1_and_yes_switch_a_category_on() {
        for value in ["true", "1", "yes"] {
            assert_eq!(of("org.containers.qm.device.ttyUSB", value), Ok("ttyUSB".into()));
        }
        for value in ["", "True", "false", "true ", "true\norg.containers.qm.device.audio=true"] {
            let reason = of("org.containers.qm.device.ttyUSB", value).unwrap_err();
            assert!(reason.ends_with("is none of true, 1 and yes") && !reason.contains('\n'), "{reason}");
        }
    }

    #[test]
    fn the_gpu_is_switched_on_in_any_case() {
        for value in ["true", "1", "yes", "True", "YES", "yEs"] {
            assert_eq!(of(GPU, value), Ok("wayland-client.gpu".into()));
        }
        for value in ["", "2", "on", "true false", "TRUE;true", "null"] {
            assert!(of(GPU, value).is_err(), "{value}");
        }
    }

    #[test]
    fn a_seat_is_named_by_loginds_rule() {
        assert_eq!(of(SEAT, "seat1"), Ok("seat1".into()));
        for value in ["", "true", "--host=evil", "../x", "seat0\norg.containers.qm.device.audio=true"] {
            assert!(of(SEAT, value).unwrap_err().contains("no name of a seat"), "{value}");
        }
    }

    #[test]
    fn what_is_unknown_or_withheld_is_named_and_foreign_keys_are_passed_over() {
        assert_eq!(of("org.containers.qm.device.tape", "true"), Err("there is no category 'tape'".into()));
        assert_eq!(of("org.containers.qm.device.", "true"), Err("there is no category ''".into()));
        assert_eq!(
            of("org.containers.qm.wayland.seat.0", "seat0"),
            Err("there is no annotation 'wayland.seat.0'".into())
        );
        let reason = of("org.containers.qm.device.usb", "true").unwrap_err();
        assert!(reason.contains("enable = [\"usb\"]"), "{reason}");
        let foreign = [("io.podman.annotations.label", "x"), ("org.containers.qmx", "true")];
        assert_eq!(rules(foreign, &Categories::default()), (vec![], vec![]));
    }

    #[test]
    fn a_selector_that_was_cut_at_its_comma_stands_for_nothing() {
        let asked = [("as", "/dev/zigbee"), ("org.containers.qm.hotplug.zigbee", "tty"), ("foo", "bar")];
        let (found, ignored) = rules(asked, &Categories::default());
        assert_eq!(found, []);
        assert!(ignored[0].reason.contains("there is an annotation 'as'"), "{ignored:?}");
        let (found, _) = rules(asked[1..].iter().copied(), &Categories::default());
        assert_eq!(found.len(), 1);
        let (found, _) = rules([asked[0], ("org.containers.qm.device.video", "true")], &Categories::default());
        assert_eq!(found.len(), 1, "categories have no commas");
    }

    #[test]
    fn of_too_many_selectors_none_counts() {
        let keys: Vec<String> = (0..65).map(|at| format!("{HOTPLUG_PREFIX}{at}")).collect();
        let asked = |count: usize| keys[..count].iter().map(|key| (key.as_str(), "tty"));
        assert_eq!(rules(asked(64), &Categories::default()).0.len(), 64);
        let video = [("org.containers.qm.device.video", "true")];
        let (found, ignored) = rules(asked(65).chain(video), &Categories::default());
        assert_eq!((found.len(), ignored.len()), (1, 65));
        assert!(ignored[0].reason.contains("more than 64"), "{ignored:?}");
        let long = format!("serial={}{}", "x".repeat(250), ",tty".repeat(30));
        let asked = keys[..48].iter().map(|key| (key.as_str(), long.as_str()));
        assert!(long.len() * 48 > 16 << 10 && rules(asked, &Categories::default()).0.is_empty());
    }

    #[test]
    fn a_selector_that_cannot_be_read_is_required_if_it_says_so() {
        for (value, required) in [
            ("tape,required", true),
            ("tape;required", true),
            ("tape, required ;x", true),
            ("tape", false),
            ("tape,serial=required", false),
        ] {
            let ignored = rule("org.containers.qm.hotplug.x", value, &Categories::default()).unwrap().unwrap_err();
            assert_eq!(ignored.required, required, "{value}");
        }
    }

    #[test]
    fn what_is_said_of_a_long_annotation_is_short() {
        let long = "x".repeat(5_000_000);
        for (key, value) in [(format!("{DEVICE_PREFIX}{long}"), "true"), (SEAT.to_owned(), long.as_str())] {
            let ignored = rule(&key, value, &Categories::default()).unwrap().unwrap_err();
            assert!(ignored.key.len() + ignored.reason.len() < 1000, "{}", ignored.reason);
        }
    }

    proptest! {
        #[test]
        fn any_annotation_is_read_and_what_is_said_of_it_is_one_line(key in "(org\\.containers\\.qm\\.)?(device\\.|wayland\\.seat)?.{0,8}", value in any::<String>()) {
            if let Some(Err(ignored)) = rule(&key, &value, &Categories::default()) {
                prop_assert!(!ignored.key.contains('\n') && !ignored.reason.chars().any(char::is_control));
            }
        }
    }
}
