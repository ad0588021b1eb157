//! The pure part: words, formats and decisions. No system call, no clock, no import from the rest of this crate.

mod advice;
pub mod annotation;
pub mod assembler;
pub mod attachment;
pub mod category;
pub mod config;
pub mod container;
pub mod destination;
pub mod device;
pub mod diagnosis;
pub mod event;
pub mod explanation;
pub mod facts;
pub mod figures;
pub mod filter_program;
pub mod flood;
pub mod glob;
pub mod grammar;
pub mod hook_file;
pub mod host;
pub mod id_map;
pub mod info;
pub mod ledger;
pub mod matcher;
pub mod mirror;
pub mod mountinfo;
pub mod naming;
pub mod operator;
pub mod page;
pub mod pattern;
pub mod permission;
pub mod plan;
pub mod policy;
pub mod proof;
pub mod protocol;
pub mod refusal;
pub mod rule;
pub mod seat;
pub mod selection;
pub mod selector;
pub mod settings;
pub mod spec;
pub mod text;
pub mod udev_message;
pub mod uevent;
pub mod waits;
pub mod withdrawal;

#[cfg(test)]
mod tests {
    /// The direction of imports that `lib.rs` promises: the core knows nothing of the rest.
    #[test]
    fn the_core_imports_only_itself() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/src/core");
        for file in std::fs::read_dir(directory).unwrap() {
            let path = file.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
                let ours = line.split("crate::").skip(1).all(|rest| rest.starts_with("core"));
                let systems = ["rustix", "nix::", "libc::", "std::fs", "std::process", "Instant", "SystemTime"];
                let own_lines = path.ends_with("mod.rs");
                let is_pure = own_lines || !systems.iter().any(|name| line.contains(name));
                assert!(ours || own_lines, "{}:{}: {line}", path.display(), number + 1);
                assert!(is_pure, "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}
