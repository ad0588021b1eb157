//! Any text as an annotation, as a pattern and as a configuration file: each is taken, or refused in one line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qm_hotplug::core::annotation::{DEVICE_PREFIX, rule};
use qm_hotplug::core::category::Categories;
use qm_hotplug::core::config::ConfigFile;
use qm_hotplug::core::pattern::Pattern;
use qm_hotplug::core::text::printable;

fuzz_target!(|text: &str| {
    let categories = Categories::default();
    let (key, value) = text.split_once('=').unwrap_or((text, "true"));
    annotation(key, value, &categories);
    let (text_of_pattern, path) = text.split_once('\n').unwrap_or((text, text));
    pattern(text_of_pattern, path);
    configuration(text, categories);
});

fn annotation(key: &str, value: &str, categories: &Categories) {
    if let Some(Err(ignored)) = rule(key, value, categories) {
        assert_one_line(&ignored.key);
        assert_one_line(&ignored.reason);
    }
}

fn pattern(text: &str, path: &str) {
    let pattern = match Pattern::parse(text) {
        Ok(pattern) => pattern,
        Err(reason) => return assert_one_line(&reason),
    };
    assert_eq!(pattern.to_string(), text);
    let filled = text.replace("/**", "/*").replace('#', "10").replace('*', path);
    for path in [path, &filled, &format!("/dev/{path}"), &format!("{text}/../{path}"), &format!("{filled}/../..")] {
        if pattern.matches(path) {
            assert!(path.starts_with("/dev/"), "{text:?} has {path:?}");
            assert!(!path.split('/').any(|part| part == "." || part == ".."), "{text:?} has {path:?}");
            let (directory, deep) = pattern.place();
            let below = path.strip_prefix(directory).and_then(|rest| rest.strip_prefix('/'));
            let is_found = below.is_some_and(|rest| deep || !rest.contains('/'));
            assert!(is_found, "{text:?} has {path:?}, which is not looked for in {directory:?} (below it: {deep})");
        }
    }
}

fn configuration(text: &str, mut categories: Categories) {
    let file = match ConfigFile::parse(text) {
        Ok(file) => file,
        Err(wrong) => return assert_one_line(&wrong.at_place("/etc/0.toml", text)),
    };
    let names = |categories: &Categories| -> Vec<String> {
        categories.iter().map(|category| format!("{} {}", category.name, category.enabled)).collect()
    };
    let before = names(&categories);
    if let Err(wrong) = categories.apply(&file) {
        assert_one_line(&wrong.at_place("/etc/0.toml", text));
        return assert_eq!(names(&categories), before, "what is refused changes nothing");
    }
    for (name, added) in &file.category {
        let name = name.get_ref();
        let found = rule(&format!("{DEVICE_PREFIX}{name}"), "true", &categories).expect("it is ours");
        assert_eq!(found.map(|rule| rule.to_string()).as_ref(), Ok(name));
        added.nodes.iter().for_each(|text| pattern(text.get_ref(), "0"));
    }
}

/// Fit for a terminal and a log as it is.
#[track_caller]
fn assert_one_line(text: &str) {
    assert_eq!(printable(text), text);
}
