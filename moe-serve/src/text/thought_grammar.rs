//! [`AfterThought`]: an answer that is held to a form, of a model that thinks before it answers.

use super::thoughts;
use super::tokenizer::TextTokenizer;
use crate::Result;
use crate::engine::{Grammar, GrammarState};
use std::sync::Arc;

/// Tokens of white space between a thought and its answer at most; before the thought it is one.
const MOST_GAPS: usize = 2;

/// A form that answers are held to once their thought is over. In the thought everything may be said but the end of the text.
#[derive(Debug)]
pub(crate) struct AfterThought {
    form: Arc<dyn Grammar>,
    tokens: Arc<ThoughtTokens>,
    /// Whether the prompt has begun the thought.
    is_open: bool,
}

/// What a tokenizer has for thoughts.
#[derive(Debug)]
pub(crate) struct ThoughtTokens {
    tokenizer: Arc<TextTokenizer>,
    /// The token that begins a thought, if one does.
    open: Option<u32>,
    /// Those of line breaks alone.
    gaps: Vec<u32>,
    /// All but those that end a text, a bit for each, as a [`GrammarState`]'s.
    free: Vec<u32>,
    /// Those that may end a mark and say more, with how much of the mark comes before them.
    spilling: Vec<(u32, &'static [u8])>,
}

fn set(words: &mut [u32], id: u32, value: bool) {
    if let Some(word) = words.get_mut(id as usize / 32) {
        *word = *word & !(1 << (id % 32)) | u32::from(value) << (id % 32);
    }
}

fn is_set(words: &[u32], id: u32) -> bool {
    words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
}

impl ThoughtTokens {
    /// Those of a tokenizer whose texts end with any of `eos_token_ids`.
    pub(crate) fn new(tokenizer: Arc<TextTokenizer>, eos_token_ids: &[u32]) -> Self {
        let num_tokens = tokenizer.num_tokens() as u32;
        let mut free = vec![0; num_tokens.div_ceil(32) as usize];
        (0..num_tokens).for_each(|id| set(&mut free, id, true));
        eos_token_ids.iter().for_each(|&id| set(&mut free, id, false));
        let is_gap = |id: &u32| matches!(tokenizer.bytes(*id), b"\n" | b"\n\n");
        let gaps = (0..num_tokens).filter(is_gap).collect();
        let spills = |id: u32| Some((id, before_the_rest(tokenizer.shown_bytes(id))?));
        let (open, spilling) = (tokenizer.id_of(thoughts::OPEN), (0..num_tokens).filter_map(spills).collect());
        Self { tokenizer, open, gaps, free, spilling }
    }

    /// What may be said in a thought whose text ends so: nothing that ends both it and more.
    fn in_thought(&self, end: &[u8]) -> Vec<u32> {
        let mut allowed = self.free.clone();
        for (id, before) in &self.spilling {
            if end.ends_with(before) {
                set(&mut allowed, *id, false);
            }
        }
        allowed
    }
}

/// How much of the closing mark has to come before a token for it to hold the rest, and more than white space after that.
fn before_the_rest(bytes: &[u8]) -> Option<&'static [u8]> {
    let mark = thoughts::CLOSE.as_bytes();
    let says_more = |rest: &[u8]| !rest.trim_ascii().is_empty();
    if let Some(at) = bytes.windows(mark.len()).position(|window| window == mark) {
        return says_more(&bytes[at + mark.len()..]).then_some(&[]);
    }
    let split = (1..mark.len()).find(|&split| bytes.strip_prefix(&mark[split..]).is_some_and(says_more))?;
    Some(&mark[..split])
}

impl AfterThought {
    /// `form` after a thought, which the prompt has begun if `is_open`; else the model begins one, or none.
    pub(crate) fn new(form: Arc<dyn Grammar>, tokens: Arc<ThoughtTokens>, is_open: bool) -> Self {
        Self { form, tokens, is_open }
    }
}

impl Grammar for AfterThought {
    fn start(&self) -> Box<dyn GrammarState> {
        let place = match (self.is_open, self.tokens.open) {
            (true, _) => Place::Thought { end: Vec::new() },
            (false, Some(open)) => Place::Before { open, has_gap: false },
            (false, None) => Place::Answer,
        };
        Box::new(Thinking { form: self.form.start(), tokens: Arc::clone(&self.tokens), place })
    }
}

#[derive(Debug)]
enum Place {
    /// Before a thought that `open` would begin, if there is one: white space is before a thought only.
    Before {
        open: u32,
        has_gap: bool,
    },
    /// In it; `end` is as much of its text as a mark may still begin in.
    Thought {
        end: Vec<u8>,
    },
    /// After it, and so many tokens of white space.
    After {
        gaps: usize,
    },
    Answer,
}

/// One answer's way through its thought and form.
#[derive(Debug)]
struct Thinking {
    /// Before its first token until the answer begins.
    form: Box<dyn GrammarState>,
    tokens: Arc<ThoughtTokens>,
    place: Place,
}

impl GrammarState for Thinking {
    fn allowed(&self) -> Result<Vec<u32>> {
        let white = self.tokens.gaps.as_slice();
        let (mut allowed, open, white) = match &self.place {
            Place::Thought { end } => return Ok(self.tokens.in_thought(end)),
            Place::Before { open, has_gap: true } => (vec![0; self.tokens.free.len()], Some(open), &[][..]),
            Place::Before { open, has_gap: false } => (self.form.allowed()?, Some(open), white),
            Place::After { gaps } if *gaps < MOST_GAPS => (self.form.allowed()?, None, white),
            Place::After { .. } | Place::Answer => return self.form.allowed(),
        };
        open.into_iter().chain(white).for_each(|&id| set(&mut allowed, id, true));
        Ok(allowed)
    }

    fn push(&mut self, token_id: u32) -> Result<()> {
        match &mut self.place {
            Place::Before { open, .. } if *open == token_id => self.place = Place::Thought { end: Vec::new() },
            Place::Thought { end } => {
                end.extend(self.tokens.tokenizer.shown_bytes(token_id));
                if thoughts::is_closed_after(end) {
                    self.place = Place::After { gaps: 0 };
                } else {
                    end.drain(..end.len().saturating_sub(thoughts::CLOSE.len()));
                }
            }
            // What the form may begin with belongs to it; all else that was allowed is white space.
            Place::Before { has_gap, .. } if !is_set(&self.form.allowed()?, token_id) => *has_gap = true,
            Place::After { gaps } if !is_set(&self.form.allowed()?, token_id) => *gaps += 1,
            Place::Before { .. } | Place::After { .. } | Place::Answer => {
                self.place = Place::Answer;
                self.form.push(token_id)?;
            }
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        matches!(self.place, Place::Answer) && self.form.is_complete()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::tokenizer;
    use crate::text::{GrammarSource, Grammars};

    /// How much of a text an answer may say, and whether it is then whole.
    fn said(marks: &[&str], is_open: bool, text: &str) -> (usize, bool) {
        let tokenizer = Arc::new(tokenizer(marks));
        let form = Grammars::new(&tokenizer, &[0]).expect("works").compile(&GrammarSource::Choice(vec!["no".into()]));
        let tokens = Arc::new(ThoughtTokens::new(Arc::clone(&tokenizer), &[0]));
        let grammar = AfterThought::new(form.expect("compiles"), tokens, is_open);
        let (mut state, mut bytes) = (grammar.start(), 0);
        let may = |state: &dyn GrammarState, id: u32| is_set(&state.allowed().expect("goes on"), id);
        for id in tokenizer.encode(text).expect("encodes") {
            if !may(&*state, id) {
                break;
            }
            assert!(!state.is_complete());
            state.push(id).expect("was allowed");
            bytes += tokenizer.shown_bytes(id).len();
        }
        assert_eq!(may(&*state, 0), state.is_complete(), "an end is an end of the form");
        (bytes, state.is_complete())
    }

    #[test]
    fn answers_are_held_to_their_form_after_a_thought() {
        let both = ["<think>", "</think>"];
        for (marks, is_open, text, want) in [
            // Without a thought; with one, and white space of two tokens after it; a third is too much.
            (both.as_slice(), false, "no", (2, true)),
            (&both, false, "<think>Is it? </thin k></think>\n\nno", (35, true)),
            (&both, false, "<think></think>\n\n\nno", (17, false)),
            (&both, false, "yes", (0, false)),
            (&both, false, "<think>yes</think>yes", (18, false)),
            // One after the other, neither a second thought.
            (&both, false, "<think>x</think><think>", (16, false)),
            (&both, true, "Hm.</think>no", (13, true)),
            // Marks of several tokens: a prompt's thought ends, but none begins.
            (&[], true, "Hm.</think>\nno", (14, true)),
            (&[], false, "<think>", (0, false)),
            // A line break before a thought, and none before an answer.
            (&both, false, "\n<think></think>no", (18, true)),
            (&both, false, "\nno", (1, false)),
            (&[], false, "\nno", (0, false)),
            // Tokens that would end a mark and say more: of another text they may be part.
            (&[">x"], true, "Hm. </think>xno", (11, false)),
            (&[">x"], true, "Hm. <b>x</think>no", (18, true)),
            (&["</think>x", "</think>"], true, "Hm. </think>xno", (4, false)),
        ] {
            assert_eq!(said(marks, is_open, text), want, "{marks:?} {text}");
        }
    }
}
