//! Text that comes from containers, made fit for a terminal and a log.

/// Whether a character is fit for a terminal and a log: no control character, and none that turns the order of others
/// around or ends a line.
pub fn is_printable(one: char) -> bool {
    let turns = matches!(one, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !one.is_control() && !turns && !matches!(one, '\u{2028}' | '\u{2029}')
}

/// Replaces control characters (a container chooses its name, its paths and its annotations) by their escapes.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let (plain, escape) = if is_printable(c) { (Some(c), None) } else { (None, Some(c.escape_default())) };
            plain.into_iter().chain(escape.into_iter().flatten())
        })
        .collect()
}

/// At most 200 characters of a text, printable.
pub fn excerpt(text: &str) -> String {
    match text.char_indices().nth(200) {
        Some((end, _)) => printable(&text[..end]) + "…",
        None => printable(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_and_bidi_overrides_are_spelt_out() {
        assert_eq!(printable("a\x1b[2Jb\n\u{202e}\u{2028}ü"), "a\\u{1b}[2Jb\\n\\u{202e}\\u{2028}ü");
    }
}
