//! [`Detokenizer`]: bytes in as tokens bring them, whole characters out.

/// Collects bytes and releases the text that is complete.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    /// The beginning of a character whose other bytes have not come yet: at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Adds bytes and returns the characters they complete. Bytes that can never be UTF-8 become U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + invalid);
                }
            }
        }
    }

    /// What is left when no more bytes come: U+FFFD for an unfinished character.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pieces: &[&[u8]], want: &[&str]) {
        let mut detokenizer = Detokenizer::default();
        let mut got: Vec<String> = pieces.iter().map(|piece| detokenizer.push(piece)).collect();
        got.push(detokenizer.finish());
        assert_eq!(got, want);
    }

    #[test]
    fn a_character_split_over_three_tokens_comes_once_whole() {
        check(&[b"a\xe2", b"\x82", b"\xacb"], &["a", "", "\u{20ac}b", ""]);
    }

    #[test]
    fn bytes_that_are_never_text_do_not_hold_back_the_rest() {
        check(&[b"\xff", b"ok\xe2", b"x"], &["\u{fffd}", "ok", "\u{fffd}x", ""]);
    }

    #[test]
    fn an_unfinished_character_shows_at_the_end() {
        check(&[b"a\xf0\x9f"], &["a", "\u{fffd}"]);
    }

    #[test]
    fn every_split_of_a_text_gives_the_text() {
        let text = "né 漢字 🦀!";
        for cut in 0..=text.len() {
            let mut detokenizer = Detokenizer::default();
            let (a, b) = text.as_bytes().split_at(cut);
            assert_eq!(detokenizer.push(a) + &detokenizer.push(b) + &detokenizer.finish(), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_any_pieces_read_as_the_whole(pieces: Vec<Vec<u8>>) {
            let mut detokenizer = Detokenizer::default();
            let mut got: String = pieces.iter().map(|piece| detokenizer.push(piece)).collect();
            got += &detokenizer.finish();
            assert_eq!(got, String::from_utf8_lossy(&pieces.concat()));
        }
    }
}
