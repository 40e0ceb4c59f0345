//! Cuts documents into pieces of bounded length for the tokenizer, whose work and memory grow faster than the length of
//! what it is handed: one word of 20 MB would keep it busy for hours.
//!
//! Where GPT-2's pre-tokenizer ends a word whatever follows, a cut changes no id. Ordinary text is cut only there.

use std::collections::VecDeque;

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

/// A part of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece<S> {
    pub(crate) text: S,
    /// Whether it is the document's last.
    pub(crate) ends_document: bool,
}

/// The pieces of a whole document; an empty one has one empty piece.
pub(crate) fn document_pieces(text: &str) -> impl Iterator<Item = Piece<&str>> {
    let mut left = text.len();
    let empty = text.is_empty().then_some(Piece { text, ends_document: true });
    let marked = pieces(text).map(move |piece| {
        left -= piece.len();
        Piece { text: piece, ends_document: left == 0 }
    });
    marked.chain(empty)
}

/// A document that comes in parts and is cut as it comes, into the pieces of the whole. Holds one piece and one part, and
/// the white space a document begins with: one of nothing else is left out.
#[derive(Debug, Default)]
pub(crate) struct GrowingDocument {
    /// What has come and is not cut off yet.
    rest: String,
    /// Whether anything but white space has come.
    has_text: bool,
}

impl GrowingDocument {
    /// Appends `part` and moves the pieces that are certain by now to `ready`.
    pub(crate) fn push(&mut self, part: &str, ready: &mut VecDeque<Piece<String>>) {
        self.has_text = self.has_text || !part.trim().is_empty();
        self.rest.push_str(part);
        let mut cut = 0;
        // Nothing that follows so many bytes has a say in where the first piece ends.
        while self.has_text && self.rest.len() - cut > MAX_PIECE_BYTES {
            let text = &self.rest[cut..][..first_piece(&self.rest[cut..])];
            cut += text.len();
            ready.push_back(Piece { text: text.to_owned(), ends_document: false });
        }
        self.rest.drain(..cut);
    }

    /// Ends the document, moves the rest of its pieces to `ready` and begins the next one.
    pub(crate) fn end(&mut self, ready: &mut VecDeque<Piece<String>>) {
        if self.has_text {
            ready.extend(document_pieces(&self.rest).map(Piece::into_owned));
        }
        self.rest.clear();
        // A document that began with much white space must not cost its memory until the end.
        self.rest.shrink_to(2 * MAX_PIECE_BYTES);
        self.has_text = false;
    }
}

impl Piece<&str> {
    pub(crate) fn into_owned(self) -> Piece<String> {
        Piece { text: self.text.to_owned(), ends_document: self.ends_document }
    }
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

    /// However a document comes, its pieces are those of the whole, and no more of it is held than needed.
    #[track_caller]
    fn check_growing(text: &str) {
        let want: Vec<_> = document_pieces(text).map(Piece::into_owned).collect();
        for part_bytes in [1000, 64 << 10, 300_001, usize::MAX] {
            let (mut document, mut ready, mut got) = (GrowingDocument::default(), VecDeque::new(), Vec::new());
            let mut rest = text;
            while !rest.is_empty() {
                let (part, tail) = rest.split_at(rest.floor_char_boundary(part_bytes));
                document.push(part, &mut ready);
                assert!(document.rest.len() <= MAX_PIECE_BYTES);
                got.extend(ready.drain(..));
                rest = tail;
            }
            document.end(&mut ready);
            got.extend(ready);
            assert!(got == want, "parts of {part_bytes}: {} pieces, not {}", got.len(), want.len());
        }
    }

    #[test]
    fn a_growing_document_has_the_pieces_of_the_whole() {
        for unit in ["the cat\n", "日本\n", "café ", "it's=12;", "\u{1}é", "a", "a\n\n  \n"] {
            for length in [3, MAX_PIECE_BYTES - 1, MAX_PIECE_BYTES, MAX_PIECE_BYTES + 1, 3 * MAX_PIECE_BYTES + 17] {
                let mut text = unit.repeat(length / unit.len() + 1);
                text.truncate(text.floor_char_boundary(length));
                check_growing(&text);
            }
        }
    }

    #[test]
    fn a_document_of_white_space_only_is_left_out() {
        let (mut document, mut ready) = (GrowingDocument::default(), VecDeque::new());
        (0..3000).for_each(|_| document.push(&" \n".repeat(1000), &mut ready));
        document.end(&mut ready);
        assert!(ready.is_empty() && document.rest.capacity() <= 4 * MAX_PIECE_BYTES);
        // White space counts where text follows.
        let text = format!("{}x", " ".repeat(3000));
        document.push(&text[..2500], &mut ready);
        document.push(&text[2500..], &mut ready);
        document.end(&mut ready);
        assert!(ready.into_iter().eq(document_pieces(&text).map(Piece::into_owned)));
    }

    #[test]
    fn no_text_makes_a_longer_piece() {
        // Nowhere two plain characters, a space or a line break.
        let hard = "\u{1}é".repeat(MAX_PIECE_BYTES);
        assert!(lengths(&hard).iter().all(|&length| length <= MAX_PIECE_BYTES));
    }
}
