//! Globs in selectors: `*` for any characters, `?` for one, `[a-z]` and `[!a-z]` for one of a set, `\` before a
//! character that stands for itself.

use std::fmt;

/// A glob, matched against a whole value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob {
    text: String,
    /// What it matches one by one.
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    One(char),
    Any,
    AnyOne,
    Set { negated: bool, ranges: Vec<(char, char)> },
}

impl Glob {
    /// Reads one. The error says in words what is wrong, and at which character.
    pub fn parse(text: &str) -> Result<Glob, (usize, &'static str)> {
        let (chars, mut parts, mut at) = (text.chars().collect::<Vec<_>>(), Vec::new(), 0);
        while at < chars.len() {
            let start = at;
            at += 1;
            parts.push(match chars[start] {
                '*' if parts.last() == Some(&Part::Any) => continue,
                '*' => Part::Any,
                '?' => Part::AnyOne,
                '\\' => {
                    at += 1;
                    Part::One(*chars.get(start + 1).ok_or((start, "a '\\' with nothing behind it"))?)
                }
                '[' => {
                    let (part, end) = set(&chars, at).ok_or((start, "a '[' without its ']'"))?;
                    at = end;
                    part
                }
                other => Part::One(other),
            });
        }
        Ok(Glob { text: text.to_owned(), parts })
    }

    /// Whether the whole value fits. Takes at most the product of both lengths.
    pub fn matches(&self, value: &str) -> bool {
        let (mut part, mut rest) = (0, value);
        // Where the last `*` was, and what is left of the value if it takes one character more.
        let mut star: Option<(usize, &str)> = None;
        loop {
            let first = rest.chars().next();
            match (self.parts.get(part), first) {
                (Some(Part::Any), _) => {
                    star = Some((part, rest));
                    part += 1;
                    continue;
                }
                (Some(its), Some(first)) if its.fits(first) => {
                    part += 1;
                    rest = &rest[first.len_utf8()..];
                    continue;
                }
                (None, None) => return true,
                _ => {}
            }
            let Some((at, left)) = star else { return false };
            let Some(first) = left.chars().next() else { return false };
            rest = &left[first.len_utf8()..];
            (part, star) = (at + 1, Some((at, rest)));
        }
    }

    /// What it matches, where that is one value alone.
    pub fn literal(&self) -> Option<String> {
        self.parts.iter().map(|part| if let Part::One(one) = part { Some(*one) } else { None }).collect()
    }

    /// A glob that matches this value alone.
    pub fn exactly(value: &str) -> Glob {
        let escaped = value.chars().flat_map(|one| {
            let special = matches!(one, '*' | '?' | '[' | '\\' | '"');
            special.then_some('\\').into_iter().chain([one])
        });
        Glob { text: escaped.collect(), parts: value.chars().map(Part::One).collect() }
    }
}

impl Part {
    fn fits(&self, value: char) -> bool {
        match self {
            Part::One(one) => *one == value,
            Part::Any | Part::AnyOne => true,
            Part::Set { negated, ranges } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&value)) != *negated
            }
        }
    }
}

/// The set that begins behind a `[`, and where the text goes on behind it.
fn set(chars: &[char], mut at: usize) -> Option<(Part, usize)> {
    let negated = chars.get(at) == Some(&'!');
    at += usize::from(negated);
    let mut ranges = Vec::new();
    let one = |at: &mut usize| {
        *at += usize::from(chars.get(*at) == Some(&'\\'));
        *at += 1;
        chars.get(*at - 1).copied()
    };
    // A `]` in first place stands for itself.
    while ranges.is_empty() || chars.get(at) != Some(&']') {
        let low = one(&mut at)?;
        let is_range = chars.get(at) == Some(&'-') && chars.get(at + 1).is_some_and(|next| *next != ']');
        let high = if is_range {
            at += 1;
            one(&mut at)?
        } else {
            low
        };
        ranges.push((low, high));
    }
    Some((Part::Set { negated, ranges }, at + 1))
}

/// As it was written.
impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_fits_and_what_does_not() {
        for (glob, fits, does_not) in [
            ("cp210x", &["cp210x"][..], &["cp210", "cp210xx", "CP210X", ""][..]),
            ("", &[""], &["x"]),
            ("*", &["", "anything at all/with all"], &[]),
            ("1-1.*", &["1-1.", "1-1.2.3"], &["1-1", "11-1.2"]),
            ("*-if00-*", &["usb-x-if00-port0"], &["usb-x-if01-port0"]),
            ("ttyUSB?", &["ttyUSB1", "ttyUSBé"], &["ttyUSB10", "ttyUSB"]),
            ("v[0-3a]", &["v0", "va"], &["v4", "v", "v00"]),
            ("[!0-9]x", &["ax"], &["1x"]),
            ("[]a]", &["]", "a"], &["b"]),
            ("[a-]", &["a", "-"], &["b"]),
            ("\\*\\[x", &["*[x"], &["ab[x"]),
            ("a*b*c", &["abc", "aXbXbXc"], &["acb", "ab"]),
        ] {
            let parsed = Glob::parse(glob).unwrap();
            fits.iter().for_each(|value| assert!(parsed.matches(value), "{glob} {value}"));
            does_not.iter().for_each(|value| assert!(!parsed.matches(value), "{glob} {value}"));
        }
        assert_eq!(Glob::parse("ab\\"), Err((2, "a '\\' with nothing behind it")));
        assert_eq!(Glob::parse("a[b").map_err(|(at, _)| at), Err(1));
        assert_eq!(Glob::parse("a\\*b").unwrap().literal().as_deref(), Some("a*b"));
        assert_eq!(Glob::parse("a*b").unwrap().literal(), None);
    }

    #[test]
    fn many_stars_take_no_time() {
        let glob = Glob::parse(&"*a".repeat(500)).unwrap();
        assert!(!glob.matches(&"a".repeat(499)));
        assert!(!glob.matches(&format!("{}b", "a".repeat(20_000))));
    }

    proptest! {
        #[test]
        fn exactly_matches_that_value_alone(value in ".{0,8}", other in ".{0,8}") {
            let glob = Glob::exactly(&value);
            prop_assert!(glob.matches(&value));
            prop_assert_eq!(glob.matches(&other), value == other);
            prop_assert_eq!(Glob::parse(&glob.to_string()).unwrap(), glob);
        }

        #[test]
        fn no_glob_panics(text in "[a-c*?\\[\\]!\\\\-]{0,12}", value in "[a-c\\]-]{0,12}") {
            if let Ok(glob) = Glob::parse(&text) {
                let _ = glob.matches(&value);
            }
        }
    }
}
