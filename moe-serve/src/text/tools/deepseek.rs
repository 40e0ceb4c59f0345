//! The forms of DeepSeek-V3 (a word, the name, the arguments in a fenced block) and V3.1 (the name, the arguments), between marks of
//! the same names.

use super::call_reader::ValueReader;
use super::form::{Before, Form};
use super::pending::{Pending, TextOut};
use super::{AnswerParser, AnswerPart, Family, Stepwise};
use crate::text::chat::Tool;

const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
const MARKERS: [&str; 5] = [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR];

const V3: Form = Form {
    before: Before::Text(&[CALLS_BEGIN, CALL_BEGIN]),
    begin: CALLS_BEGIN,
    before_name: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    after_name: "\n```json\n",
    after_arguments: "\n```<｜tool▁call▁end｜>",
    between: "\n",
    end: CALLS_END,
    markers: &MARKERS,
    ..Form::JSON
};

const V31: Form = Form { before_name: CALL_BEGIN, after_name: SEPARATOR, after_arguments: CALL_END, between: "", ..V3 };

pub(super) struct DeepSeekV3;

impl Family for DeepSeekV3 {
    fn names(&self) -> &'static [&'static str] {
        &["deepseek_v3"]
    }

    fn wrote(&self, template: &str) -> bool {
        template.contains(CALLS_BEGIN) && template.contains("```json")
    }

    fn form(&self) -> &'static Form {
        &V3
    }

    fn parser(&self, _: &[Tool]) -> Box<dyn AnswerParser> {
        Box::<Parser>::default()
    }
}

pub(super) struct DeepSeekV31;

impl Family for DeepSeekV31 {
    fn names(&self) -> &'static [&'static str] {
        &["deepseek_v31"]
    }

    fn wrote(&self, template: &str) -> bool {
        template.contains(CALLS_BEGIN)
    }

    fn form(&self) -> &'static Form {
        &V31
    }

    fn parser(&self, _: &[Tool]) -> Box<dyn AnswerParser> {
        Box::<Parser>::default()
    }
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// From a call's begin to its arguments.
    Head,
    Arguments(ValueReader),
    /// Before a call; after another one's arguments, if there was one.
    Between {
        after_arguments: bool,
    },
}

/// Reads both forms: in the later one the arguments follow the separator at once.
#[derive(Debug, Default)]
struct Parser {
    pending: Pending,
    state: State,
    text: TextOut,
}

impl Parser {
    fn step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        match &mut self.state {
            State::Text => match self.pending.take_through(&[CALLS_BEGIN, CALL_BEGIN]) {
                Some((before, mark)) => {
                    self.text.push(&before, out);
                    self.state =
                        if mark == CALL_BEGIN { State::Head } else { State::Between { after_arguments: false } };
                    true
                }
                None => {
                    let certain = if last { self.pending.take() } else { self.pending.take_certain(&MARKERS) };
                    self.text.push(&certain, out);
                    false
                }
            },
            State::Head => self.head(last, out),
            State::Arguments(reader) => {
                let (bytes, ended) = reader.read(&self.pending.0);
                let arguments = self.pending.take_front(bytes);
                if !arguments.is_empty() {
                    out.push(AnswerPart::Arguments(arguments));
                }
                if ended {
                    self.state = State::Between { after_arguments: true };
                }
                ended
            }
            &mut State::Between { after_arguments } => {
                let found = self.pending.take_through(&[CALL_BEGIN, CALLS_END]);
                let (between, mark) = match found {
                    Some((between, mark)) => (between, Some(mark)),
                    None if last => (self.pending.take(), None),
                    None => return false,
                };
                self.text.push(beside_calls(&between, after_arguments), out);
                self.state = if mark == Some(CALL_BEGIN) { State::Head } else { State::Text };
                mark.is_some()
            }
        }
    }

    /// `NAME<sep>{`, or `function<sep>NAME`, a line's end, and a fence before `{`.
    fn head(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        let head = self.pending.0.split_once(SEPARATOR).and_then(|(word, rest)| {
            let brace = word.len() + SEPARATOR.len() + rest.find('{')?;
            let between = rest[..rest.find('{')?].trim();
            let name = if between.is_empty() { word } else { between.lines().next().unwrap_or_default() };
            Some((brace, name.trim().to_owned()))
        });
        match head {
            Some((brace, name)) => {
                self.pending.take_front(brace);
                self.text.call();
                out.push(AnswerPart::Call(name));
                self.state = State::Arguments(ValueReader::default());
                true
            }
            None if last => {
                let broken = CALL_BEGIN.to_owned() + &self.pending.take();
                self.text.push(&broken, out);
                false
            }
            None => false,
        }
    }
}

/// What stands between calls and belongs to none. What closes a call does, also where the answer breaks off in it.
fn beside_calls(between: &str, after_arguments: bool) -> &str {
    const FENCE: &str = "```";
    let rest = match between.split_once(CALL_END) {
        Some((_, rest)) => rest,
        None if after_arguments => {
            let closing = between.trim_start();
            if FENCE.starts_with(closing) { "" } else { closing.strip_prefix(FENCE).unwrap_or(closing) }
        }
        None => between,
    };
    let begins_mark = |at: usize| MARKERS.iter().any(|mark| mark.starts_with(&rest[at..]));
    let end = rest.char_indices().map(|(at, _)| at).find(|&at| begins_mark(at)).unwrap_or(rest.len());
    rest[..end].trim()
}

impl Stepwise for Parser {
    fn pending(&mut self) -> &mut Pending {
        &mut self.pending
    }

    fn advance(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        self.step(last, out)
    }

    fn end(&mut self, out: &mut Vec<AnswerPart>) {
        self.text.finish(out);
    }
}
