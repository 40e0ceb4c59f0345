//! Cuts documents into pieces of bounded length for the tokenizer, whose work and memory grow faster than the length of
//! what it is handed: one word of 20 MB would keep it busy for hours.
//!
//! Where GPT-2's pre-tokenizer ends a word whatever follows, a cut changes no id. Ordinary text is cut only there.

/// Longest run of one kind of character (letters, digits, white space, others) that is handed over whole. GPT-2's
/// pre-tokenizer makes one word of such a run. The longest of the excerpt has 112 bytes.
pub(crate) const MAX_RUN_BYTES: usize = 1024;
/// A piece ends at the first line break that separates words after this many bytes: for memory, and to spread one long
/// document over threads.
const PIECE_BYTES: usize = 256 << 10;
/// No piece is longer.
const MAX_PIECE_BYTES: usize = 2 * PIECE_BYTES;

/// The pieces of `text`, in order; together they are `text`. A function of the text alone.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, tail) = rest.split_at(first_piece(rest));
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What the characters of a word have in common. Marks count as letters here and as others in GPT-2's pre-tokenizer, so a
/// run may seem longer than it is, hardly ever shorter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Space,
    Letter,
    Digit,
    Other,
}

impl Kind {
    fn of(c: char) -> Self {
        match c {
            _ if c.is_whitespace() => Self::Space,
            _ if c.is_alphabetic() => Self::Letter,
            _ if c.is_numeric() => Self::Digit,
            _ => Self::Other,
        }
    }
}

/// Length of the first piece of `text`.
fn first_piece(text: &str) -> usize {
    let mut run = (Kind::Space, 0);
    let mut before = ['\0'; 2];
    let mut second_best = SecondBest::default();
    for (at, c) in text.char_indices() {
        let kind = Kind::of(c);
        if kind != run.0 {
            run = (kind, at);
        }
        let end = at + c.len_utf8();
        if end - run.1 > MAX_RUN_BYTES {
            return at;
        }
        if at > PIECE_BYTES {
            let [first, second] = before;
            if second == '\n' && first.is_ascii_graphic() && c.is_ascii_graphic() {
                return at;
            }
            second_best.look(at, before, c);
            if end > MAX_PIECE_BYTES {
                return second_best.place().unwrap_or(at);
            }
        }
        before = [before[1], c];
    }
    text.len()
}

/// The first place of each kind at which a piece without a plain line break can be cut, best first.
#[derive(Default)]
struct SecondBest {
    /// After a line break between any two visible characters.
    line: Option<usize>,
    /// Before a space between two visible characters: it belongs to the word that follows.
    space: Option<usize>,
    /// Between characters of different kinds. Apostrophes are left out, as they join what follows.
    word: Option<usize>,
}

impl SecondBest {
    /// Notes what can be cut around the character `c` at `at`, which comes after `before`.
    fn look(&mut self, at: usize, before: [char; 2], c: char) {
        let visible = |c: char| !c.is_whitespace() && !c.is_control();
        let [first, second] = before;
        if second == '\n' && visible(first) && visible(c) {
            self.line.get_or_insert(at);
        }
        if second == ' ' && visible(first) && visible(c) {
            self.space.get_or_insert(at - 1);
        }
        let plain = |c: char| c.is_ascii_graphic() && c != '\'';
        if plain(second) && plain(c) && Kind::of(second) != Kind::of(c) {
            self.word.get_or_insert(at);
        }
    }

    fn place(&self) -> Option<usize> {
        self.line.or(self.space).or(self.word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lengths of the pieces, which must join to the text again.
    #[track_caller]
    fn lengths(text: &str) -> Vec<usize> {
        assert!(pieces(text).eq(pieces(text)));
        assert!(pieces(text).collect::<String>() == text);
        pieces(text).map(str::len).collect()
    }

    #[test]
    fn short_text_stays_whole() {
        assert_eq!(lengths(""), [0; 0]);
        for text in ["a", "two words\n", &"=".repeat(MAX_RUN_BYTES), &" x".repeat(PIECE_BYTES / 2)] {
            assert_eq!(lengths(text), [text.len()]);
        }
    }

    #[test]
    fn runs_are_bounded_at_characters() {
        assert_eq!(lengths(&"a".repeat(20 << 20)), vec![MAX_RUN_BYTES; (20 << 20) / MAX_RUN_BYTES]);
        // 341 characters of three bytes.
        assert_eq!(lengths(&"日".repeat(1000)), [1023, 1023, 954]);
        assert_eq!(lengths(&format!("word{}1", " ".repeat(1500))), [4 + MAX_RUN_BYTES, 1500 - MAX_RUN_BYTES + 1]);
    }

    #[test]
    fn a_long_document_is_cut_between_words() {
        for (unit, end, start) in
            [("the cat\n", "cat\n", "the"), ("日本\n", "本\n", "日"), ("café ", "é", " caf"), ("it's=12;", "", "")]
        {
            let text = unit.repeat(3 * MAX_PIECE_BYTES / unit.len());
            let all: Vec<&str> = pieces(&text).collect();
            assert!(all.len() > 2, "{unit}");
            for pair in all.windows(2) {
                assert!((PIECE_BYTES..=MAX_PIECE_BYTES).contains(&pair[0].len()), "{unit}: {}", pair[0].len());
                assert!(pair[0].ends_with(end) && pair[1].starts_with(start), "{unit}");
                let (before, after) = (pair[0].chars().next_back().unwrap(), pair[1].chars().next().unwrap());
                assert!(Kind::of(before) != Kind::of(after) && before != '\'' && after != '\'', "{before}|{after}");
            }
        }
    }

    #[test]
    fn no_text_makes_a_longer_piece() {
        // Nowhere two plain characters, a space or a line break.
        let hard = "\u{1}é".repeat(MAX_PIECE_BYTES);
        assert!(lengths(&hard).iter().all(|&length| length <= MAX_PIECE_BYTES));
    }
}
