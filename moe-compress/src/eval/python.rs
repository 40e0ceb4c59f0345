//! What Python's string methods do, which the protocol is written in, where Rust's do something else.

/// `str.isspace` of one character: Unicode's white space and the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.strip`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.rstrip`.
pub(super) fn strip_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `str.capitalize`: the first character large and all others small, also those of names.
pub(super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.collect::<String>() + &chars.as_str().to_lowercase()
}

/// `len` of a `str`: characters, not bytes.
pub(super) fn len(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_of_both_languages() {
        assert_eq!(strip(" \t\u{a0}a b\u{1f}\n"), "a b");
        assert_eq!(strip_end(" a\u{3000} \n"), " a");
        assert_eq!(strip_end("a\u{200b}"), "a\u{200b}");
    }

    #[test]
    fn capitals_inside_become_small() {
        assert_eq!(capitalize("the Eiffel Tower, PARIS"), "The eiffel tower, paris");
        assert_eq!(capitalize("élan"), "Élan");
        assert_eq!(capitalize(""), "");
    }
}
