//! The pages in src/man/ tell of the program as it is. What the command line's definition gives stands between two comments
//! and is written anew by `QMH_WRITE_MAN=1 cargo test --test man`; the rest is prose, which has to have a place for each
//! word that the program knows. `man` itself looks at the pages in the style tier of scripts/test.sh.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Command, CommandFactory, Parser};
use clap_mangen::Man;
use qm_hotplug::cli::Cli;
use qm_hotplug::core::annotation::{DEVICE_PREFIX, GPU, HOTPLUG_PREFIX, SEAT, UDEV, rules};
use qm_hotplug::core::category::Categories;
use qm_hotplug::core::config::ConfigFile;
use qm_hotplug::core::container::ENGINES;
use qm_hotplug::core::grammar::{FLAGS, OPTIONS};
use qm_hotplug::core::selector::{KEY_PREFIXES, KEYS, SPECIAL_KEYS};
use qm_hotplug::core::settings::Settings;

const WRITE: &str = "QMH_WRITE_MAN";
const CONFIGURATION: &str = "qm-hotplug.toml.5";
const SELECTORS: &str = "qm-hotplug-selectors.7";

/// Commands that a service manager and an engine begin are in the manual's part for administrators.
fn section(command: &str) -> &'static str {
    if matches!(command, "qm-hotplug-agent" | "qm-hotplug-precreate") { "8" } else { "1" }
}

fn path(page: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/man").join(page)
}

fn read(page: &str) -> String {
    std::fs::read_to_string(path(page)).unwrap_or_else(|error| panic!("src/man/{page}: {error}"))
}

/// The commands of the program, itself first, by the names of their pages.
fn commands() -> Vec<(String, Command)> {
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let all = std::iter::once(&program).chain(program.get_subcommands());
    all.map(|command| (command.get_display_name().unwrap_or(command.get_name()).to_owned(), command.clone())).collect()
}

fn page_of(command: &str) -> String {
    format!("{command}.{}", section(command))
}

/// What the definition gives, by the words behind `begin`.
fn generated(name: &str, command: &Command) -> Vec<(&'static str, String)> {
    let man = Man::new(command.clone().subcommand_value_name("command"));
    let write = |render: &dyn Fn(&mut Vec<u8>) -> std::io::Result<()>| {
        let mut text = Vec::new();
        render(&mut text).unwrap();
        // Each part would define a string for the apostrophe, of which there is an escape.
        let text = String::from_utf8(text).unwrap().replace("\\*(Aq", "\\(aq");
        let lines = text.lines().filter(|line| !line.starts_with(".ie") && !line.starts_with(".el"));
        lines.map(|line| format!("{}\n", line.trim_end())).collect::<String>()
    };
    // The definition's own title would leave the empty date out.
    let version = env!("CARGO_PKG_VERSION");
    let title = format!(".TH {name} {} \"\" \"qm-hotplug {version}\" \"Devices for containers\"\n", section(name));
    let head = write(&|text| man.render_name_section(text).and_then(|()| man.render_synopsis_section(text)));
    let options = write(&|text| man.render_options_section(text));
    let mut parts = vec![("head", title + &head), ("options", options)];
    if command.has_subcommands() {
        let of = |command: &Command| {
            let name = command.get_display_name().unwrap();
            let about = command.get_about().unwrap().to_string().replace('-', "\\-");
            format!(".TP\n\\fB{}\\fR({})\n{about}\n", name.replace('-', "\\-"), section(name))
        };
        parts.push(("commands", format!(".SH COMMANDS\n{}", command.get_subcommands().map(of).collect::<String>())));
    }
    parts
}

/// The page with its parts in place.
fn with_parts(page: &str, text: &str, parts: &[(&str, String)]) -> String {
    parts.iter().fold(text.to_owned(), |text, (name, part)| {
        let (begin, end) = (format!(".\\\" begin {name},"), format!(".\\\" end {name}\n"));
        let start = text.find(&begin).unwrap_or_else(|| panic!("src/man/{page} has no '{begin}'"));
        let start = start + text[start..].find('\n').unwrap() + 1;
        let length = text[start..].find(&end).unwrap_or_else(|| panic!("src/man/{page} has no '{end}'"));
        format!("{}{part}{}", &text[..start], &text[start + length..])
    })
}

#[test]
fn pages_are_those_of_the_commands() {
    for (name, command) in commands() {
        let page = page_of(&name);
        let (before, parts) = (read(&page), generated(&name, &command));
        let after = with_parts(&page, &before, &parts);
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(path(&page), &after).unwrap();
        } else {
            assert!(
                after == before,
                "src/man/{page} is not of this command line: run `{WRITE}=1 cargo test --test man`"
            );
        }
    }
}

fn pages() -> BTreeSet<String> {
    let names = std::fs::read_dir(path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn every_page_has_its_subject_and_leads_to_others() {
    let of_commands = commands().into_iter().map(|(name, _)| page_of(&name));
    let expected: BTreeSet<String> = of_commands.chain([CONFIGURATION.to_owned(), SELECTORS.to_owned()]).collect();
    assert_eq!(pages(), expected);
    for page in pages() {
        let text = plain(&read(&page));
        for (at, _) in text.match_indices("qm-hotplug") {
            let word: String = text[at..].chars().take_while(|one| !one.is_whitespace() && *one != ')').collect();
            if let Some((name, number)) = word.split_once('(') {
                assert!(expected.contains(&format!("{name}.{number}")), "{page} leads to {word}), which is not there");
            }
        }
    }
}

/// A page's text without roff, each line of it as one.
fn plain(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with(".\\\"")).map(|line| {
        let line = match line.strip_prefix('.') {
            Some(request) => request.split_once(' ').map_or("", |(_, rest)| rest).replace('"', ""),
            None => line.to_owned(),
        };
        let mut plain = String::new();
        let mut rest = line.as_str();
        while let Some(at) = rest.find('\\') {
            plain += &rest[..at];
            let escape = &rest[at + 1..];
            let (length, text) = match escape.as_bytes() {
                [b'f', ..] => (2, ""),
                [b'-', ..] => (1, "-"),
                [b'e', ..] => (1, "\\"),
                [b'&', ..] => (1, ""),
                [b' ', ..] => (1, " "),
                [b'(', b'a', b'q', ..] => (3, "'"),
                [b'(', b'd', b'q', ..] => (3, "\""),
                [b'(', b'g', b'a', ..] => (3, "`"),
                [b'(', b'-', b'>', ..] => (3, "→"),
                _ => panic!("an escape that this test does not know: \\{escape}"),
            };
            plain += text;
            rest = &escape[length..];
        }
        plain + rest
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What is explained in a page, without roff: the lines after `.TP` and `.TQ`.
fn tags(page: &str) -> Vec<String> {
    let text = read(page);
    let lines: Vec<&str> = text.lines().collect();
    let tags = lines.windows(2).filter(|pair| matches!(pair[0], ".TP" | ".TQ")).map(|pair| plain(pair[1]));
    tags.collect()
}

#[track_caller]
fn assert_has_tag(page: &str, what: &str, fits: impl Fn(&str) -> bool) {
    let tags = tags(page);
    assert!(tags.iter().any(|tag| tag.split([' ', ',']).any(&fits)), "src/man/{page} explains no {what}: {tags:?}");
}

#[test]
fn exit_codes_are_told() {
    let program = Cli::command();
    let help = program.get_after_help().unwrap().to_string();
    let codes = help.lines().find_map(|line| line.strip_prefix("Exit codes: ")).unwrap().trim_end_matches('.');
    let (text, mut count) = (plain(&read("qm-hotplug.1")), 0);
    for (code, meaning) in codes.split(", ").map(|code| code.split_once(' ').unwrap()) {
        assert!(text.contains(&format!("\n{code}\n{meaning}")), "qm-hotplug.1 has no exit status {code}: {meaning}");
        count += 1;
    }
    assert_eq!(count, 7);
    for engine in ENGINES {
        assert!(text.contains(&format!("{engine}:NAME")), "qm-hotplug.1 has no {engine}:NAME");
    }
}

#[test]
fn selectors_and_annotations_are_explained() {
    let keys = KEYS.iter().map(|(key, _)| *key).chain(SPECIAL_KEYS);
    for key in keys.chain(OPTIONS) {
        assert_has_tag(SELECTORS, key, |word| word.split_once('=').is_some_and(|(its, _)| its == key));
    }
    for prefix in KEY_PREFIXES {
        assert_has_tag(SELECTORS, prefix, |word| word.starts_with(prefix));
    }
    for flag in FLAGS {
        assert_has_tag(SELECTORS, flag, |word| word == flag);
    }
    for category in Categories::default().iter() {
        assert_has_tag(SELECTORS, &category.name, |word| word == category.name);
    }
    for annotation in [DEVICE_PREFIX, HOTPLUG_PREFIX, SEAT, GPU, UDEV] {
        assert_has_tag(SELECTORS, annotation, |word| word.starts_with(annotation));
    }
}

/// The keys that the program would take where it found an unknown one, in its own words.
fn keys_of(file: &str) -> Vec<String> {
    let reason = ConfigFile::parse(file).unwrap_err().reason;
    let known = reason.strip_prefix("unknown field `unknown`, expected ").unwrap_or_else(|| panic!("{file}: {reason}"));
    assert!(!known.ends_with('…'), "{reason}");
    known.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn keys_of_the_configuration_are_explained() {
    let mut count = 0;
    for key in keys_of("unknown = 1") {
        // A table or an array of tables, if it is one.
        let headers = [format!("[{key}.x]"), format!("[[{key}]]")];
        let is_table = |header: &&String| {
            ConfigFile::parse(&format!("{header}\nunknown = 1")).is_err_and(|wrong| wrong.reason.contains("`unknown`"))
        };
        let header = headers.iter().find(is_table);
        assert_has_tag(CONFIGURATION, &key, |word| {
            word == key || header.is_some_and(|_| word.trim_matches(['[', ']']).split('.').next() == Some(&key))
        });
        for inner in header.map(|header| keys_of(&format!("{header}\nunknown = 1"))).unwrap_or_default() {
            assert_has_tag(CONFIGURATION, &inner, |word| word == inner);
            count += 1;
        }
        count += 1;
    }
    assert!(count > 10, "{count}");
}

/// The string literals of a source file, up to its tests.
fn literals(source: &str) -> Vec<String> {
    let source = source.split("#[cfg(test)]").next().unwrap();
    let code: String =
        source.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect();
    let (mut all, mut literal) = (Vec::new(), None::<String>);
    let mut characters = code.chars().peekable();
    while let Some(one) = characters.next() {
        match (one, &mut literal) {
            ('"', None) => literal = Some(String::new()),
            ('"', Some(_)) => all.extend(literal.take()),
            // Of a character, a quote would begin a literal.
            ('\'', None) if characters.peek() == Some(&'"') => drop(characters.next()),
            ('\\', Some(literal)) => literal.extend(characters.next().filter(|next| *next != '\n')),
            (_, Some(literal)) => literal.push(one),
            _ => {}
        }
    }
    all
}

/// The text of a function in a source file.
fn function<'a>(source: &'a str, name: &str) -> &'a str {
    let at = source.find(&format!("fn {name}(")).unwrap_or_else(|| panic!("there is no function {name}"));
    let line = source[..at].rfind('\n').unwrap() + 1;
    let indent: String = source[line..].chars().take_while(|one| *one == ' ').collect();
    &source[line..line + source[line..].find(&format!("\n{indent}}}\n")).unwrap()]
}

/// What is always the same in a literal, where that is at least so many words.
fn fixed_parts(literal: &str, words: usize) -> Vec<String> {
    let parts = literal.split(['{', '}']).step_by(2).map(|part| part.trim_matches(|one: char| !one.is_alphanumeric()));
    parts.filter(|part| part.split(' ').count() >= words).map(str::to_owned).collect()
}

#[test]
fn every_finding_and_advice_of_explain_is_in_its_page() {
    let one_line = |page: &str| plain(&read(page)).split_whitespace().collect::<Vec<_>>().join(" ");
    let (explain, verify) = (one_line("qm-hotplug-explain.1"), one_line("qm-hotplug-verify.1"));
    let explanation = include_str!("../src/core/explanation.rs");
    let proof = include_str!("../src/core/proof.rs");
    let mut count = 0;
    for (page, text, source, words) in [
        ("explain", &explain, explanation, 2),
        ("explain", &explain, include_str!("../src/core/advice.rs"), 2),
        // Reasons that stand behind a finding.
        ("explain", &explain, include_str!("../src/core/policy.rs"), 2),
        ("explain", &explain, function(include_str!("../src/core/selector.rs"), "failing"), 2),
        ("explain", &explain, function(proof, "user_may_not"), 2),
        ("explain", &explain, include_str!("../src/sys/permission.rs"), 2),
        ("explain", &explain, include_str!("../src/sys/ownership.rs"), 2),
        ("explain", &explain, include_str!("../src/sys/block.rs"), 2),
        ("explain", &explain, function(include_str!("../src/ops/explain.rs"), "taken"), 2),
        ("explain", &explain, function(include_str!("../src/ops/inspect.rs"), "frozen"), 2),
        // Its shorter ones are parts of what could not be done.
        ("explain", &explain, function(include_str!("../src/ops/live.rs"), "hold"), 4),
        ("verify", &verify, proof, 2),
    ] {
        for part in literals(source).iter().flat_map(|literal| fixed_parts(literal, words)) {
            assert!(text.contains(&part), "qm-hotplug-{page}.1 says nothing of: {part}");
            count += 1;
        }
    }
    assert!(count > 90, "{count}");
    // A topic is the first argument of what makes a finding.
    let made = ["good(\"", "bad(\"", "note(\""].map(|begin| explanation.split(begin).skip(1));
    let topics: BTreeSet<&str> = made.into_iter().flatten().filter_map(|rest| rest.split('"').next()).collect();
    assert!(topics.len() > 7, "{topics:?}");
    let page = read("qm-hotplug-explain.1");
    for topic in topics {
        assert!(page.contains(&format!("\n.SS {topic}\n")), "qm-hotplug-explain.1 has no part on {topic}");
    }
}

/// The examples of a page, each as it is written.
fn examples(page: &str) -> Vec<String> {
    let text = read(page);
    let blocks = text.split(".EX\n").skip(1).map(|rest| plain(rest.split(".EE").next().unwrap()));
    blocks.collect()
}

/// A command line's words, as a shell takes them apart where nothing but `'` is used.
fn words(line: &str) -> Vec<String> {
    let parts = line.split('\'').enumerate();
    let quoted = parts.map(|(at, part)| if at % 2 == 1 { part.replace(' ', "\u{0}") } else { part.to_owned() });
    quoted.collect::<String>().split_whitespace().map(|word| word.replace('\u{0}', " ")).collect()
}

#[test]
fn examples_are_right() {
    let (mut commands, mut annotations, mut files) = (0, 0, Vec::new());
    for page in pages() {
        for example in examples(&page) {
            if page == CONFIGURATION && !example.starts_with("# ") {
                files.push((format!("{page}, example {}", files.len() + 1), Ok(example)));
                continue;
            }
            for line in example.lines() {
                let words = words(line.trim_start_matches("# "));
                if words[0] == "qm-hotplug" {
                    Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{page}: {line}: {error}"));
                    commands += 1;
                }
                let asked = words.iter().filter(|word| word.starts_with("org.containers.qm."));
                for (key, value) in asked.filter_map(|word| word.split_once('=')) {
                    let (_, ignored) = rules([(key, value)], &Categories::default());
                    assert_eq!(ignored, [], "{page}: {line}");
                    annotations += 1;
                }
            }
        }
    }
    let (_, problems) = Settings::read(&files);
    assert_eq!(problems, [""; 0]);
    assert!(commands > 15 && annotations > 3 && files.len() > 3, "{commands} {annotations} {}", files.len());
}
