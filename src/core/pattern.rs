//! Patterns on the paths of device nodes.

use std::fmt;

use crate::core::text::excerpt;

/// A pattern on a path below `/dev`: `#` stands for a number, `*` for anything but `/`, `[a-b]` for one character of
/// that range, and `/**` at the end for everything below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Reads one. Errors say in words what is wrong.
    pub fn parse(text: &str) -> Result<Pattern, String> {
        Pattern::check(text).map(|()| Pattern(text.to_owned())).map_err(|reason| excerpt(&reason))
    }

    fn check(text: &str) -> Result<(), String> {
        let stem = text.strip_suffix("/**").unwrap_or(text);
        if !stem.starts_with("/dev/") {
            return Err(format!("'{text}' does not begin with /dev/"));
        }
        if stem[1..].split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(format!("'{text}' has an empty part, '.' or '..' in it"));
        }
        if stem.contains("**") {
            return Err(format!("'{text}' has '**' elsewhere than in a '/**' at its end"));
        }
        if stem.matches('*').count() > 3 {
            return Err(format!("'{text}' has more than three '*' in it"));
        }
        let ranges = stem.split('[').skip(1).all(|rest| matches!(rest.as_bytes(), [_, b'-', _, b']', ..]));
        if !ranges || stem.matches('[').count() != stem.matches(']').count() {
            return Err(format!("'{text}' has a '[' that is no range such as [0-7]"));
        }
        Ok(())
    }

    /// Whether the path fits. A number is matched whole: `/dev/ttyUSB1` is not in `/dev/ttyUSB10`.
    pub fn matches(&self, path: &str) -> bool {
        if path.split('/').any(|part| matches!(part, "." | "..")) {
            return false;
        }
        let Some(directory) = self.0.strip_suffix("/**") else { return fits(self.0.as_bytes(), path.as_bytes()) };
        // What is below is at least one name longer.
        path.match_indices('/').any(|(at, _)| at + 1 < path.len() && fits(directory.as_bytes(), &path.as_bytes()[..at]))
    }

    /// The directory that holds every node that can fit, and whether to look below it too.
    pub fn place(&self) -> (&str, bool) {
        let wild = self.0.find(['#', '*', '[']).unwrap_or(self.0.len());
        let directory = &self.0[..self.0[..wild].rfind('/').unwrap_or(0)];
        (directory, self.0[wild..].contains('/') || self.0.ends_with("/**"))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn fits(pattern: &[u8], path: &[u8]) -> bool {
    match pattern {
        [] => path.is_empty(),
        [b'#', rest @ ..] => {
            let digits = path.iter().take_while(|byte| byte.is_ascii_digit()).count();
            digits > 0 && fits(rest, &path[digits..])
        }
        [b'*', rest @ ..] => {
            let name = path.iter().take_while(|byte| **byte != b'/').count();
            (0..=name).any(|length| fits(rest, &path[length..]))
        }
        [b'[', low, b'-', high, b']', rest @ ..] => {
            path.first().is_some_and(|byte| (low..=high).contains(&byte)) && fits(rest, &path[1..])
        }
        [byte, rest @ ..] => path.first() == Some(byte) && fits(rest, &path[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    #[test]
    fn what_fits_and_what_does_not() {
        for (text, fits, does_not) in [
            ("/dev/kvm", &["/dev/kvm"][..], &["/dev/kvm2", "/dev/kv", "dev/kvm", "/dev/kvm/"][..]),
            ("/dev/i2c-#", &["/dev/i2c-0", "/dev/i2c-10"], &["/dev/i2c-", "/dev/i2c-1x", "/dev/i2c-x"]),
            (
                "/dev/spidev#.#",
                &["/dev/spidev0.0", "/dev/spidev10.2"],
                &["/dev/spidev0", "/dev/spidev0.", "/dev/spidev.0"],
            ),
            ("/dev/tty[0-7]", &["/dev/tty0", "/dev/tty7"], &["/dev/tty", "/dev/tty8", "/dev/tty10"]),
            ("/dev/dri/render*", &["/dev/dri/renderD128", "/dev/dri/render"], &["/dev/dri/card0", "/dev/dri/render/x"]),
            (
                "/dev/snd/**",
                &["/dev/snd/a", "/dev/snd/b/c"],
                &["/dev/snd", "/dev/snd/", "/dev/sndx/a", "/dev/snd/../mem"],
            ),
            ("/dev/dvb/adapter#/**", &["/dev/dvb/adapter0/frontend0"], &["/dev/dvb/adapter/x", "/dev/dvb/adapter0"]),
        ] {
            for path in fits {
                assert!(pattern(text).matches(path), "{text} {path}");
            }
            for path in does_not.iter().chain(&["", "/", "/dev/mem"]) {
                assert!(!pattern(text).matches(path), "{text} {path}");
            }
        }
    }

    #[test]
    fn what_is_no_pattern_is_said_in_words() {
        for (text, reason) in [
            ("", "/dev/"),
            ("/devx", "/dev/"),
            ("/dev/**/x", "'**'"),
            ("/dev/../etc", "'..'"),
            ("/dev//x", "empty"),
            ("/dev/**", "/dev/"),
            ("/dev/****", "'**'"),
            ("/dev/a*b*c*d*", "three"),
            ("/dev/x[0-", "range"),
            ("/dev/x]", "range"),
            ("/dev/x[ab]", "range"),
        ] {
            let error = Pattern::parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn places_cover_what_fits() {
        for (text, place) in [
            ("/dev/kvm", ("/dev", false)),
            ("/dev/video#", ("/dev", false)),
            ("/dev/snd/**", ("/dev/snd", true)),
            ("/dev/dri/render*", ("/dev/dri", false)),
            ("/dev/dvb/adapter#/**", ("/dev/dvb", true)),
            ("/dev/a*/b", ("/dev", true)),
        ] {
            assert_eq!(pattern(text).place(), place, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_and_matched_without_panic(text in "(/dev/)?[#*\\[\\]a-c0-9/.-]{0,12}", path in "(/dev/)?[a-c0-9/.]{0,12}") {
            if let Ok(pattern) = Pattern::parse(&text) && pattern.matches(&path) {
                let (directory, deep) = pattern.place();
                let rest = path.strip_prefix(directory).unwrap().strip_prefix('/').unwrap();
                prop_assert!(path.starts_with("/dev/") && (deep || !rest.contains('/')));
            }
        }
    }
}
