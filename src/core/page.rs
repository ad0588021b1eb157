//! A page of the ledger, the file of one container: its name, and what may be in it.
//!
//! Whoever can write there is root, but a file may be cut short, damaged, or of another version; what contradicts itself
//! is not carried out.

use std::collections::HashSet;

use crate::core::destination;
use crate::core::ledger::{Grant, Holder, Page, Placement, VERSION};

/// The name of a container's page. Ids are file names, but for `pid:N` and whatever a runtime may allow one day: other
/// bytes are written as `%XX`.
pub fn file_name(id: &str) -> String {
    format!("c-{}.json", escaped(id))
}

/// A text as a part of a file's name.
pub fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// The id of the container whose page has that name, whatever its extension.
pub fn id_of(name: &str) -> Option<String> {
    let (escaped, _) = name.strip_prefix("c-")?.rsplit_once('.')?;
    let (mut bytes, mut rest) = (Vec::new(), escaped.as_bytes());
    while let [first, after @ ..] = rest {
        rest = after;
        bytes.push(match first {
            b'%' => {
                let digits = std::str::from_utf8(after.get(..2)?).ok()?;
                rest = &after[2..];
                u8::from_str_radix(digits, 16).ok()?
            }
            plain => *plain,
        });
    }
    String::from_utf8(bytes).ok().filter(|id| !id.is_empty())
}

/// Reads a JSON text of this version, which its field `version` tells. Errors are in words.
pub(crate) fn of_version<T: serde::de::DeserializeOwned>(text: &[u8], expected: u32) -> Result<T, String> {
    // First of all: of another version, nothing else need be as here.
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if version != expected {
        return Err(format!("it has version {version}, this program reads version {expected}"));
    }
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

/// Reads the page with that name. Errors are in words.
pub fn parse(name: &str, text: &[u8]) -> Result<Page, String> {
    let page: Page = of_version(text, VERSION)?;
    let holders = page.entries.iter().map(|entry| &entry.grant.holder);
    for holder in holders.chain(page.withdrawn.iter().map(|withdrawal| &withdrawal.holder)) {
        check_holder(name, holder)?;
    }
    let mut places = HashSet::new();
    for entry in &page.entries {
        let Grant { holder, node, .. } = &entry.grant;
        check_grant(&entry.grant)?;
        if let Placement::Ours(directories) | Placement::Making(directories) = &entry.placement
            && let Some(other) = directories.iter().find(|path| !is_above(path, &node.path))
        {
            return Err(format!("{other:?} is no directory of {:?}", node.path));
        }
        // What is left over stands in nobody's way.
        if entry.left_over.is_none() && !places.insert((holder.pid, holder.start_time, &node.path)) {
            return Err(format!("{:?} is in it twice", node.path));
        }
    }
    let numbers: HashSet<_> = page.withdrawn.iter().map(|it| (it.holder.whose(), it.number)).collect();
    if numbers.len() < page.withdrawn.len() {
        return Err("a device is withdrawn twice".into());
    }
    Ok(page)
}

fn check_holder(name: &str, holder: &Holder) -> Result<(), String> {
    let Holder { id, pid, cgroup, cgroup_id, user, .. } = holder;
    if file_name(id) != name {
        return Err(format!("it tells of container {id:?}"));
    }
    let is_one = || *cgroup_id > 1 && is_plain(cgroup) && !cgroup.split('/').any(|part| part == "..");
    // 1 is the root's, and with it every process's. Without any there is no right, only a node.
    let has_none = *user != 0 && *cgroup_id == 0 && cgroup.is_empty();
    if !has_none && !is_one() {
        return Err(format!("{cgroup:?} with the id {cgroup_id} is no container's cgroup"));
    }
    if *pid < 2 || i32::try_from(*pid).is_err() {
        return Err(format!("{pid} is no container's process"));
    }
    Ok(())
}

fn check_grant(grant: &Grant) -> Result<(), String> {
    let node = &grant.node;
    for path in [&node.path].into_iter().chain(&node.link_to) {
        if destination::check(path).as_ref() != Ok(path) {
            return Err(format!("{path:?} is no path of a node"));
        }
    }
    if node.mode > 0o777 {
        return Err(format!("{:o} is no node's mode", node.mode));
    }
    for path in [&grant.device.node, &grant.device.identity.devpath] {
        if !is_plain(path) {
            return Err(format!("{path:?} is no device's path"));
        }
    }
    Ok(())
}

/// An absolute path without control characters.
fn is_plain(path: &str) -> bool {
    path.starts_with('/') && !path.chars().any(char::is_control)
}

/// Whether the first is a directory above the second, which was checked already.
fn is_above(directory: &str, path: &str) -> bool {
    directory.len() > 1 && path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::core::ledger::{Entry, Withdrawal};
    use crate::core::plan::tests::grant;

    fn page() -> Value {
        let mut first = Entry::pending(grant(7, 0, 0, 7));
        first.grant.node.path = "/dev/a/b".into();
        first.placement = Placement::Ours(vec!["/dev/a".into()]);
        let second = Entry::pending(grant(7, 1, 1, 3));
        let withdrawn = Withdrawal { holder: second.grant.holder.clone(), number: second.grant.device.number };
        let page = Page { version: VERSION, entries: vec![first, second], withdrawn: vec![withdrawn] };
        serde_json::to_value(&page).unwrap()
    }

    fn reason(page: &Value) -> String {
        parse("c-c7.json", page.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn what_contradicts_itself_is_not_taken() {
        let good = page();
        assert_eq!(serde_json::to_value(parse("c-c7.json", good.to_string().as_bytes()).unwrap()).unwrap(), good);
        let mut users = good.clone();
        for holder in ["/entries/0/grant/holder", "/entries/1/grant/holder", "/withdrawn/0/holder"] {
            let holder = users.pointer_mut(holder).unwrap();
            (holder["cgroup"], holder["cgroup_id"], holder["user"]) = (json!(""), json!(0), json!(1000));
        }
        assert_eq!(serde_json::to_value(parse("c-c7.json", users.to_string().as_bytes()).unwrap()).unwrap(), users);
        assert!(parse("c-c8.json", good.to_string().as_bytes()).unwrap_err().contains("container \"c7\""));
        for (at, value, said) in [
            ("/version", json!(2), "version 2"),
            ("/entries/1/grant/holder/id", json!("c8"), "container \"c8\""),
            ("/withdrawn/0/holder/id", json!("../c7"), "container"),
            ("/entries/0/grant/holder/cgroup_id", json!(0), "no container's cgroup"),
            ("/entries/0/grant/holder/cgroup_id", json!(1), "no container's cgroup"),
            ("/entries/0/grant/holder/cgroup", json!("/a/../../b"), "no container's cgroup"),
            ("/entries/0/grant/holder/cgroup", json!("a"), "no container's cgroup"),
            ("/entries/0/grant/holder/pid", json!(1), "no container's process"),
            ("/entries/0/grant/node/path", json!("dev/x"), "no path of a node"),
            ("/entries/0/grant/node/path", json!("/dev/../etc/x"), "no path of a node"),
            ("/entries/0/grant/node/path", json!("/dev/a\u{1b}[2J/b"), "no path of a node"),
            ("/entries/0/grant/node/path", json!("/dev//a/b"), "no path of a node"),
            ("/entries/0/grant/node/mode", json!(0o4755), "no node's mode"),
            ("/entries/0/grant/device/node", json!("/dev/a\nb"), "no device's path"),
            ("/entries/0/grant/device/identity/devpath", json!("devices"), "no device's path"),
            ("/entries/0/placement/ours/0", json!("/etc"), "no directory of"),
            ("/entries/0/placement/ours/0", json!("/"), "no directory of"),
            ("/entries/1/grant/node/path", json!("/dev/a/b"), "twice"),
        ] {
            let mut page = good.clone();
            *page.pointer_mut(at).unwrap_or_else(|| panic!("{at}")) = value;
            assert!(reason(&page).contains(said), "{at}: {}", reason(&page));
        }
        let mut page = good.clone();
        let again = page["withdrawn"][0].clone();
        page["withdrawn"].as_array_mut().unwrap().push(again);
        assert!(reason(&page).contains("withdrawn twice"));
    }

    #[test]
    fn a_newer_version_is_told_whatever_else_is_in_it() {
        let said = parse("c-x.json", br#"{"version":99,"pages":[]}"#).unwrap_err();
        assert_eq!(said, "it has version 99, this program reads version 1");
    }

    proptest! {
        #[test]
        fn names_lead_back_to_their_ids(id in "\\PC{1,40}") {
            prop_assert_eq!(id_of(&file_name(&id)), Some(id));
        }

        #[test]
        fn no_name_panics(name in any::<String>()) {
            let _ = (id_of(&name), id_of(&format!("c-{name}.bad")));
        }

        #[test]
        fn damaged_pages_are_errors_or_pages(at in 0usize..4000, bytes in proptest::collection::vec(any::<u8>(), 0..6), cut in any::<bool>()) {
            let mut text = page().to_string().into_bytes();
            let at = at % text.len();
            let end = if cut { text.len() } else { (at + bytes.len()).min(text.len()) };
            text.splice(at..end, bytes);
            if let Ok(page) = parse("c-c7.json", &text) {
                prop_assert!(page.entries.iter().all(|entry| entry.grant.holder.id == "c7"));
            }
        }

        #[test]
        fn no_bytes_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse("c-c7.json", &text);
        }
    }
}
