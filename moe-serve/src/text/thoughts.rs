//! [`ThoughtParser`]: what a model thinks, `<think>...</think>`, told from the answer after it.

use super::tools::{AnswerParser, AnswerPart};

pub(super) const OPEN: &str = "<think>";
pub(super) const CLOSE: &str = "</think>";
/// Where they are special tokens of a tokenizer, a text does not show them unasked.
pub(super) const MARKERS: [&str; 2] = [OPEN, CLOSE];

/// Whether a chat template's model marks its thoughts so.
pub(super) fn are_of_template(template: &str) -> bool {
    template.contains(CLOSE)
}

/// Whether an answer to this prompt begins inside a thought.
pub(super) fn is_open_after(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

/// Whether a text ends with the end of a thought, but for white space.
pub(super) fn is_closed_after(text: &[u8]) -> bool {
    text.trim_ascii_end().ends_with(CLOSE.as_bytes())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space has come.
    Beginning,
    /// At a thought's white space in front.
    Opened,
    Thought,
    /// At the white space after a thought.
    Closed,
    Answer,
}

/// Reads one answer, which may begin with a thought. White space around a thought belongs to the form and is dropped; a mark further
/// on is text.
#[derive(Debug)]
pub(crate) struct ThoughtParser {
    state: State,
    pending: String,
    /// White space that belongs to the thought if that goes on.
    held: String,
    /// Reads what follows; as text, without it.
    answer: Option<Box<dyn AnswerParser>>,
}

impl ThoughtParser {
    /// `is_open` where the prompt has begun the thought already.
    pub(crate) fn new(is_open: bool, answer: Option<Box<dyn AnswerParser>>) -> Self {
        let state = if is_open { State::Opened } else { State::Beginning };
        Self { state, pending: String::new(), held: String::new(), answer }
    }

    /// One step; false if more text is needed, of which none comes if `last`.
    fn step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        let begun = self.pending.trim_start();
        match self.state {
            State::Beginning => {
                if let Some(rest) = begun.strip_prefix(OPEN) {
                    (self.state, self.pending) = (State::Opened, rest.to_owned());
                    return true;
                }
                let is_open = OPEN.starts_with(begun) && !last;
                if !is_open {
                    self.state = State::Answer;
                }
                !is_open
            }
            State::Opened | State::Closed => {
                let next = if self.state == State::Opened { State::Thought } else { State::Answer };
                self.pending = begun.to_owned();
                if self.pending.is_empty() {
                    return false;
                }
                self.state = next;
                true
            }
            State::Thought => {
                let end = self.pending.find(CLOSE);
                let certain = end.unwrap_or_else(|| if last { self.pending.len() } else { certain(&self.pending) });
                self.held.extend(self.pending.drain(..certain));
                // What is held back now may turn out to be the thought's end.
                let said = self.held.trim_end().len();
                let white = self.held.split_off(said);
                let thought = std::mem::replace(&mut self.held, white);
                if !thought.is_empty() {
                    out.push(AnswerPart::Reasoning(thought));
                }
                if end.is_some() {
                    self.held.clear();
                    self.pending.drain(..CLOSE.len());
                    self.state = State::Closed;
                }
                end.is_some()
            }
            State::Answer => {
                let text = std::mem::take(&mut self.pending);
                match &mut self.answer {
                    Some(answer) => out.extend(answer.push(&text)),
                    None if text.is_empty() => {}
                    None => out.push(AnswerPart::Text(text)),
                }
                false
            }
        }
    }
}

/// How many bytes of a thought cannot be part of its closing mark.
fn certain(text: &str) -> usize {
    let begins = |at: &usize| CLOSE.starts_with(&text[*at..]);
    text.char_indices().map(|(at, _)| at).find(begins).unwrap_or(text.len())
}

impl AnswerParser for ThoughtParser {
    fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        let mut out = Vec::new();
        self.pending.push_str(text);
        while self.step(false, &mut out) {}
        out
    }

    fn finish(&mut self) -> Vec<AnswerPart> {
        let mut out = Vec::new();
        while self.step(true, &mut out) {}
        if let Some(answer) = &mut self.answer {
            out.extend(answer.finish());
        }
        out
    }

    fn thinks(&self) -> bool {
        match self.state {
            State::Opened | State::Thought => true,
            State::Beginning | State::Closed => false,
            State::Answer => self.answer.as_ref().is_some_and(|answer| answer.thinks()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::ToolFormat;

    /// `(thought)answer`, and calls as `|name{...}`.
    fn told(parts: &[AnswerPart]) -> String {
        let of = |part: &AnswerPart| match part {
            AnswerPart::Text(text) | AnswerPart::Arguments(text) => text.clone(),
            AnswerPart::Reasoning(text) => format!("({text})"),
            AnswerPart::Call(name) => format!("|{name}"),
        };
        parts.iter().map(of).collect::<String>().replace(")(", "")
    }

    fn read(is_open: bool, format: Option<ToolFormat>, pieces: &[String]) -> String {
        let mut parser = ThoughtParser::new(is_open, format.map(|format| format.parser(&[])));
        let mut parts: Vec<AnswerPart> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
        parts.extend(parser.finish());
        told(&parts)
    }

    #[test]
    fn thoughts_are_told_however_the_text_is_cut() {
        let hermes = ToolFormat::named("hermes");
        for (is_open, format, answer, want) in [
            (false, None, "<think>\nWell, 2 < 3.\nYes.\n</think>\n\nIt is.\n", "(Well, 2 < 3.\nYes.)It is.\n"),
            (false, None, "\n<think></think>\n\nIt is.", "It is."),
            (true, None, "Hm </thin </think> Yes <think>no</think>", "(Hm </thin)Yes <think>no</think>"),
            (true, None, "It goes on \n", "(It goes on)"),
            (false, None, "  No thought.", "  No thought."),
            (false, None, "<thin", "<thin"),
            (false, None, " ", " "),
            (true, None, "", ""),
            (
                false,
                hermes,
                "<think>a <tool_call> b</think><tool_call>{\"name\": \"now\"}</tool_call>",
                "(a <tool_call> b)|now{}",
            ),
            (false, hermes, "See: <tool_call>{\"name\": \"now\"}</tool_call>", "See:|now{}"),
        ] {
            let chars: Vec<char> = answer.chars().collect();
            for size in [usize::MAX, 1, 2, 3, 7] {
                let pieces: Vec<String> = chars.chunks(size).map(|piece| piece.iter().collect()).collect();
                assert_eq!(read(is_open, format, &pieces), want, "in pieces of {size}: {answer:?}");
            }
        }
    }

    #[test]
    fn a_token_of_a_thought_is_known() {
        let mut parser = ThoughtParser::new(false, None);
        let thinks = ["<think>", "\n", "Hm", " </", "think>", "\n\n", "Yes"].map(|token| {
            parser.push(token);
            parser.thinks()
        });
        assert_eq!(thinks, [true, true, true, true, false, false, false]);
    }

    #[test]
    fn templates_and_prompts_tell() {
        assert!(are_of_template("{{ m.content.split('</think>')[-1] }}") && !are_of_template("{{ m.content }}"));
        assert!(is_open_after("<|assistant|>\n<think>\n") && is_open_after("<think>"));
        assert!(!is_open_after("<think>\n\n</think>\n\n") && !is_open_after("<|assistant|>"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_the_same_however_it_is_cut(
            text in "(<think>|</think>|<|thin|\n| |a|</){0,12}", is_open in proptest::bool::ANY,
        ) {
            let whole = read(is_open, None, std::slice::from_ref(&text));
            let chars: Vec<String> = text.chars().map(String::from).collect();
            assert_eq!(read(is_open, None, &chars), whole, "{text:?}");
        }
    }
}
