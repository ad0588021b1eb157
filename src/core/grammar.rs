//! Reads selectors and options; their grammar is in [`crate::core::selector`] and [`crate::core::selection`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::core::category::{Categories, Category};
use crate::core::destination;
use crate::core::device::Access;
use crate::core::facts::pci_place;
use crate::core::glob::Glob;
use crate::core::selection::{Group, Options, Selection, duration, number};
use crate::core::selector::{KEYS, Key, Selector, Term, Test};
use crate::core::text::excerpt;

/// The longest text that is read, in bytes.
const LONGEST: usize = 4096;
/// The longest glob, in characters: matching takes its length times the value's.
const LONGEST_GLOB: usize = 256;
/// How many terms there may be, those in `parent=(…)` among them, and links: each event has all of them looked at.
const MOST_TERMS: usize = 32;
const MOST_LINKS: usize = 8;
/// The longest time that a start may wait: engines give hooks a limited time (ours: 70 s, in hooks/qm-hotplug.json).
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What is wrong with a text, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntaxError {
    /// The character at which it is wrong, counted from 1.
    pub column: usize,
    /// In words.
    pub reason: String,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column {}: {}", self.column, excerpt(&self.reason))
    }
}

/// Who wrote a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// Whoever started the container: what has to be enabled on this host has to be.
    Container,
    /// Root of this host.
    Root,
}

/// Reads a selector with its options.
pub fn selection(name: &str, text: &str, categories: &Categories, author: Author) -> Result<Selection, SyntaxError> {
    let mut reader = Reader { text, at: 0, terms: 0, categories, author };
    let mut found = Selection { name: name.to_owned(), trusted: author == Author::Root, ..Selection::default() };
    if text.len() > LONGEST {
        return Err(reader.error(format!("it is longer than {LONGEST} bytes")));
    }
    loop {
        reader.skip_space();
        let start = reader.at;
        if !reader.option(&mut found.options)? {
            reader.at = start;
            found.selector.terms.push(reader.term(true)?);
        }
        reader.skip_space();
        match reader.next() {
            None => break,
            Some(',' | ';') => {}
            Some(other) => return Err(reader.error_before(format!("'{other}' where a ',' or the end is expected"))),
        }
    }
    if !found.selector.terms.iter().any(|term| !term.negated) {
        return Err(
            reader.error_at(0, "it does not say which devices: give a category, or a term such as usb=10c4:ea60")
        );
    }
    let may_have = |category: &Category| category.enabled || author == Author::Root;
    let names = |category: &Category| found.selector.terms.iter().any(|term| term.names(category));
    let withheld = categories.sensitive().into_iter().filter(|category| !may_have(category) || !names(category));
    found.selector.withheld = withheld.collect();
    Ok(found)
}

/// Reads a selector without options, as policies have them.
pub fn selector(text: &str, categories: &Categories) -> Result<Selector, SyntaxError> {
    let found = selection("", text, categories, Author::Root)?;
    match found.options == Options::default() {
        true => Ok(Selector { withheld: Vec::new(), ..found.selector }),
        false => {
            Err(SyntaxError { column: 1, reason: format!("'{}' is for devices, not for policies", found.options) })
        }
    }
}

/// Options with a value.
pub const OPTIONS: [&str; 8] = ["as", "link", "links", "access", "mode", "uid", "gid", "wait"];

/// Options without one.
pub const FLAGS: [&str; 3] = ["required", "exclusive", "children"];

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// How many were begun.
    terms: usize,
    categories: &'a Categories,
    author: Author,
}

impl Reader<'_> {
    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn take(&mut self, expected: &str) -> bool {
        let is_there = self.text[self.at..].starts_with(expected);
        self.at += if is_there { expected.len() } else { 0 };
        is_there
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn word(&mut self) -> &str {
        let is_of_word = |one: &char| one.is_alphanumeric() || "._-/:@#".contains(*one);
        let length = self.text[self.at..].chars().take_while(is_of_word).map(char::len_utf8).sum::<usize>();
        let start = self.at;
        self.at += length;
        &self.text[start..self.at]
    }

    fn error(&self, reason: impl Into<String>) -> SyntaxError {
        self.error_at(self.at, reason)
    }

    /// At the character that was just taken.
    fn error_before(&self, reason: impl Into<String>) -> SyntaxError {
        let before = self.text[..self.at].char_indices().next_back().map_or(0, |(at, _)| at);
        self.error_at(before, reason)
    }

    fn error_at(&self, at: usize, reason: impl Into<String>) -> SyntaxError {
        SyntaxError { column: self.text[..at].chars().count() + 1, reason: reason.into() }
    }

    /// A value up to the next `,`, `;` or `)`, or in quotes; and where it begins.
    fn value(&mut self) -> Result<(usize, String), SyntaxError> {
        self.skip_space();
        let (start, mut value) = (self.at, String::new());
        if self.take("\"") {
            loop {
                match self.next() {
                    None => return Err(self.error_at(start, "a '\"' without the second one")),
                    Some('"') => return Ok((start + 1, value)),
                    Some('\\') => value.extend(['\\'].into_iter().chain(self.next())),
                    Some(other) => value.push(other),
                }
            }
        }
        while let Some(next) = self.peek().filter(|next| !matches!(next, ',' | ';' | ')')) {
            self.next();
            match next {
                '\\' => value.extend(['\\'].into_iter().chain(self.next())),
                '"' | '(' => return Err(self.error_before(format!("'{next}' in a value: put the value in quotes"))),
                other => value.push(other),
            }
        }
        let length = value.trim_end().len();
        value.truncate(length);
        if value.is_empty() {
            return Err(self.error_at(start, "a value is expected"));
        }
        Ok((start, value))
    }

    fn glob(&mut self) -> Result<Glob, SyntaxError> {
        let (start, value) = self.value()?;
        self.to_glob(start, &value)
    }

    fn to_glob(&self, start: usize, text: &str) -> Result<Glob, SyntaxError> {
        if text.chars().count() > LONGEST_GLOB {
            return Err(self.error_at(start, format!("the value is longer than {LONGEST_GLOB} characters")));
        }
        Glob::parse(text).map_err(|(at, reason)| {
            let offset = text.char_indices().nth(at).map_or(0, |(at, _)| at);
            self.error_at(start + offset, reason)
        })
    }

    /// Takes an option, if there is one.
    fn option(&mut self, options: &mut Options) -> Result<bool, SyntaxError> {
        let start = self.at;
        let name = self.word().to_owned();
        if !self.take("=") {
            let flag = match name.as_str() {
                "required" => &mut options.required,
                "exclusive" => &mut options.exclusive,
                "children" => &mut options.children,
                _ => return Ok(false),
            };
            *flag = true;
            return Ok(true);
        }
        if !OPTIONS.contains(&name.as_str()) {
            return Ok(false);
        }
        let (at, value) = self.value()?;
        let is_given = match name.as_str() {
            "as" => options.path.replace(self.path(at, &value)?).is_some(),
            "link" if options.links.len() == MOST_LINKS => {
                return Err(self.error_at(start, format!("there are more than {MOST_LINKS} links")));
            }
            "link" => {
                options.links.push(self.path(at, &value)?);
                false
            }
            "links" if value == "udev" => std::mem::replace(&mut options.udev_links, true),
            "links" => return Err(self.error_at(at, format!("'{value}' where 'udev' is expected"))),
            "access" => {
                let access = value.parse::<Access>().map_err(|reason| self.error_at(at, reason))?;
                options.access.replace(access).is_some()
            }
            "mode" => match u32::from_str_radix(&value, 8) {
                Ok(mode) if mode <= 0o777 => options.mode.replace(mode).is_some(),
                _ => return Err(self.error_at(at, "permission bits in octal are expected, such as 0660")),
            },
            "uid" => {
                let uid = number(&value).ok_or_else(|| self.error_at(at, format!("'{value}' is no user's number")))?;
                options.uid.replace(uid).is_some()
            }
            "gid" => options.gid.replace(self.group(at, &value)?).is_some(),
            _ => options.wait.replace(self.duration(at, &value)?).is_some(),
        };
        match is_given {
            true => Err(self.error_at(start, format!("'{name}' is given twice"))),
            false => Ok(true),
        }
    }

    fn path(&self, at: usize, value: &str) -> Result<String, SyntaxError> {
        let path = destination::check(value).map_err(|reason| self.error_at(at, format!("'{value}' {reason}")))?;
        match path.starts_with("/dev/") && !path.contains(|one: char| one.is_control() || one == '\\' || one == '"') {
            true => Ok(path),
            false => Err(self.error_at(at, format!("'{value}' is no plain path below /dev"))),
        }
    }

    fn group(&self, at: usize, value: &str) -> Result<Group, SyntaxError> {
        let is_name = |value: &str| value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        match number(value) {
            Some(number) => Ok(Group::Number(number)),
            // `groupadd` takes none that begins with a digit.
            None if is_name(value) && value.starts_with(|first: char| !first.is_ascii_digit()) => {
                Ok(Group::Name(value.to_owned()))
            }
            None => Err(self.error_at(at, format!("'{value}' is neither a group's number nor a name"))),
        }
    }

    fn duration(&self, at: usize, value: &str) -> Result<Duration, SyntaxError> {
        duration(value).filter(|wait| *wait <= LONGEST_WAIT).ok_or_else(|| {
            self.error_at(at, format!("'{value}' is no time up to {}s, such as 5s", LONGEST_WAIT.as_secs()))
        })
    }

    /// One term. Within `parent=(…)` there is no other `parent`.
    fn term(&mut self, with_parent: bool) -> Result<Term, SyntaxError> {
        let start = self.at;
        self.terms += 1;
        if self.terms > MOST_TERMS {
            return Err(self.error(format!("there are more than {MOST_TERMS} terms")));
        }
        let key = self.word().to_owned();
        let negated = self.take("!=");
        if !negated && !self.take("=") {
            let category = self.category(start, &key)?;
            return Ok(Term { negated: false, test: Test::Category(category) });
        }
        let named = |prefix: &str| key.strip_prefix(prefix).map(str::to_owned);
        let test = match key.as_str() {
            "usb" => Test::Usb(self.usb()?),
            "pci" => {
                let (at, value) = self.value()?;
                let as_written = self.to_glob(at, &value)?;
                Test::Value(Key::Pci, Glob::parse(&pci_place(&value)).unwrap_or(as_written))
            }
            "category" => {
                let (at, name) = self.value()?;
                Test::Category(self.category(at, &name)?)
            }
            "parent" if with_parent => Test::Parent(self.parent()?),
            "parent" => return Err(self.error_at(start, "a hub's selector has no parent of its own")),
            _ => {
                let fixed = KEYS.iter().find(|(name, _)| *name == key).map(|(_, key)| key.clone());
                let key = match (fixed, named("env."), named("attr."), named("attrs.")) {
                    (Some(key), ..) => key,
                    (_, Some(name), ..) => Key::Env(self.property(start + 4, name)?),
                    (_, _, Some(name), _) => Key::Attr(self.attribute(start + 5, name)?),
                    (.., Some(name)) => Key::Attrs(self.attribute(start + 6, name)?),
                    _ => return Err(self.error_at(start, format!("there is no key '{key}'"))),
                };
                Test::Value(key, self.glob()?)
            }
        };
        Ok(Term { negated, test })
    }

    fn category(&self, at: usize, name: &str) -> Result<Arc<Category>, SyntaxError> {
        let missing = || match name.is_empty() {
            true => "a category or a term such as usb=10c4:ea60 is expected".to_owned(),
            false => format!("there is no category '{name}'"),
        };
        let category = self.categories.named(name).ok_or_else(|| self.error_at(at, missing()))?;
        if !category.enabled && self.author == Author::Container {
            let advice = "a file in /etc/qm-hotplug/config.d has to enable it, with the line";
            return Err(self.error_at(at, format!("category '{name}': {advice} enable = [\"{name}\"]")));
        }
        Ok(category.clone())
    }

    /// `VID:PID[:SERIAL[:INTERFACE]]`.
    fn usb(&mut self) -> Result<Vec<Glob>, SyntaxError> {
        let (start, value) = self.value()?;
        let mut parts: Vec<&str> = value.splitn(3, ':').collect();
        // A serial number may have colons of its own.
        if let Some((serial, interface)) = parts.get(2).and_then(|rest| rest.rsplit_once(':'))
            && interface.len() <= 2
            && interface.bytes().all(|byte| byte.is_ascii_hexdigit() || b"*?".contains(&byte))
        {
            parts.splice(2.., [serial, interface]);
        }
        let (mut globs, mut at) = (Vec::new(), start);
        for (index, part) in parts.iter().enumerate() {
            let is_id = part.len() == 4 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            if index < 2 && !is_id && !part.contains(['*', '?', '[']) {
                return Err(self.error_at(at, format!("'{part}' is no USB id of four hexadecimal digits")));
            }
            let is_short = part.len() == 1 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            globs.push(match index {
                2 => self.to_glob(at, part)?,
                3 if is_short => self.to_glob(at, &format!("0{part}").to_ascii_lowercase())?,
                _ => self.to_glob(at, &part.to_ascii_lowercase())?,
            });
            at += part.len() + 1;
        }
        match globs.len() {
            1 => Err(self.error_at(start, "usb needs VID:PID, such as 10c4:ea60")),
            _ => Ok(globs),
        }
    }

    fn parent(&mut self) -> Result<Vec<Term>, SyntaxError> {
        self.skip_space();
        let start = self.at;
        if !self.take("(") {
            return Ok(vec![self.term(false)?]);
        }
        let mut terms = Vec::new();
        loop {
            self.skip_space();
            terms.push(self.term(false)?);
            self.skip_space();
            match self.next() {
                Some(',' | ';') => {}
                Some(')') => return Ok(terms),
                Some(other) => return Err(self.error_before(format!("'{other}' where a ',' or a ')' is expected"))),
                None => return Err(self.error_at(start, "a '(' without its ')'")),
            }
        }
    }

    fn property(&self, at: usize, name: String) -> Result<String, SyntaxError> {
        let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if is_name { Ok(name) } else { Err(self.error_at(at, format!("'{name}' is no name of a udev property"))) }
    }

    /// A file in the device's directory or below it.
    fn attribute(&self, at: usize, name: String) -> Result<String, SyntaxError> {
        let is_plain = |part: &str| !matches!(part, "" | "." | "..");
        let is_name = name.split('/').all(is_plain);
        if is_name { Ok(name) } else { Err(self.error_at(at, format!("'{name}' is no name of a sysfs attribute"))) }
    }
}

#[cfg(test)]
#[path = "grammar_tests.rs"]
mod tests;
