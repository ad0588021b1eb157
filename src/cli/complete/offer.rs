//! What a shell offers for a word, given what is there.

use std::collections::BTreeSet;

use crate::core::category::Categories;
use crate::core::container::{Container, Lookup, Reference, find, short_id};
use crate::core::facts::Facts;
use crate::core::selector::{KEY_PREFIXES, KEYS, SPECIAL_KEYS};

/// A word to insert, with a word on it for shells that show one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) text: String,
    pub(super) help: String,
}

impl Offer {
    pub(super) fn new(text: impl Into<String>, help: impl Into<String>) -> Offer {
        Offer { text: text.into(), help: help.into() }
    }
}

/// Whether no shell takes it apart where it is not quoted. Names come from containers and from devices.
pub(super) fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-./:@=,+%".contains(&byte))
}

/// The containers, each by its name or else the beginning of its id, or by that of its forms that was begun. Where several
/// would be meant, the engine is before it.
pub(super) fn containers(all: &[Container], typed: &str) -> Vec<Offer> {
    let offer = |container: &Container| {
        let is_its = |name: &str| matches!(find(all, None, name), Lookup::Found(one) if one.id == container.id);
        let (label, id) = (container.label(), short_id(&container.id));
        let full = container.unmistakable(all);
        let short = if is_its(label) { label } else { &full };
        let with_engine = if typed.contains(':') { &full } else { short };
        let begun = [short, with_engine, id].into_iter().find(|form| form.starts_with(typed))?;
        Some(Offer::new(begun, format!("{} {id}", container.runtime.engine())))
    };
    let mut offers: Vec<Offer> = all.iter().filter_map(offer).collect();
    offers.sort_by(|a, b| a.text.cmp(&b.text));
    offers
}

/// The container that one of the words names.
pub(super) fn container_among<'a>(all: &'a [Container], words: &[String]) -> Option<&'a Container> {
    words.iter().rev().find_map(|word| match Reference::parse(word) {
        Ok(Reference::Name { engine, name }) => match find(all, engine, &name) {
            Lookup::Found(container) => Some(container),
            _ => None,
        },
        _ => None,
    })
}

/// The last item of a selector that was begun: categories and keys, and behind a `=` what the devices have of that key.
pub(super) fn selector(categories: &Categories, devices: &[Facts<'_>], typed: &str) -> Vec<Offer> {
    let (before, item) = typed.split_at(typed.rfind([',', ';', '(']).map_or(0, |at| at + 1));
    let Some((key, _)) = item.split_once('=') else {
        let categories = categories.iter().map(|category| Offer::new(format!("{before}{}", category.name), "category"));
        let keys = KEYS.iter().map(|(key, _)| *key).chain(SPECIAL_KEYS).map(|key| format!("{before}{key}="));
        let prefixes = KEY_PREFIXES.iter().map(|prefix| format!("{before}{prefix}"));
        return categories.chain(keys.chain(prefixes).map(|key| Offer::new(key, "term"))).collect();
    };
    let values: BTreeSet<String> = match key.trim_end_matches('!') {
        "usb" => devices
            .iter()
            .filter_map(|facts| facts.usb())
            .map(|usb| format!("{}:{}", usb.vendor_id, usb.product_id))
            .collect(),
        "category" => categories.iter().map(|category| category.name.clone()).collect(),
        name => {
            let known = KEYS.iter().find(|(key, _)| *key == name);
            known.into_iter().flat_map(|(_, key)| devices.iter().flat_map(|facts| key.values(facts))).collect()
        }
    };
    values.into_iter().map(|value| Offer::new(format!("{before}{key}={value}"), "")).collect()
}

#[cfg(test)]
#[path = "offer_tests.rs"]
mod tests;
