//! gpt-oss' form, harmony: an answer is messages, each with a channel. `final` is for the reader, `analysis` is thought, and one whose
//! head says `to=functions.NAME` is a call.

use super::form::{Before, Form};
use super::pending::Pending;
use super::{AnswerParser, AnswerPart, Family, Stepwise};
use crate::text::chat::Tool;

const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const START: &str = "<|start|>";
const ENDS: [&str; 4] = ["<|end|>", "<|call|>", "<|return|>", START];
const RECIPIENT: &str = "to=functions.";

const FORM: Form = Form {
    before: Before::Messages,
    before_name: "<|channel|>commentary to=functions.",
    after_name: " <|constrain|>json<|message|>",
    after_arguments: "",
    markers: &[CHANNEL, MESSAGE, START, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"],
    parallel: false,
    always_reads: true,
    ..Form::JSON
};

pub(super) struct Harmony;

impl Family for Harmony {
    fn names(&self) -> &'static [&'static str] {
        &["openai"]
    }

    fn wrote(&self, template: &str) -> bool {
        template.contains(CHANNEL) && template.contains(MESSAGE)
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, _: &[Tool]) -> Box<dyn AnswerParser> {
        Box::<Parser>::default()
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first message, whose head the prompt began; an answer held to a form of its own has none.
    #[default]
    Beginning,
    Head,
    Text,
    Reasoning,
    Call,
}

#[derive(Debug, Default)]
struct Parser {
    pending: Pending,
    state: State,
}

impl Parser {
    fn step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        match self.state {
            State::Beginning => {
                let heads = [CHANNEL, " to=", START];
                if !last && (self.pending.0.is_empty() || self.pending.may_begin(&heads)) {
                    return false;
                }
                let has_head = heads.iter().any(|head| self.pending.0.starts_with(head));
                self.state = if has_head { State::Head } else { State::Text };
                !self.pending.0.is_empty()
            }
            State::Head => match self.pending.take_through(&[MESSAGE]) {
                Some((head, _)) => {
                    self.state = message_of(&head, out);
                    true
                }
                None => {
                    if last {
                        // A head alone says nothing.
                        self.pending.take();
                    }
                    false
                }
            },
            State::Text | State::Reasoning | State::Call => self.body(last, out),
        }
    }

    fn body(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        let found = self.pending.take_through(&ENDS);
        let ended = found.is_some();
        let text = match found {
            Some((text, _)) => text,
            None if last => self.pending.take(),
            None => self.pending.take_certain(&ENDS),
        };
        if !text.is_empty() {
            out.push(match self.state {
                State::Reasoning => AnswerPart::Reasoning(text),
                State::Call => AnswerPart::Arguments(text),
                State::Text | State::Head | State::Beginning => AnswerPart::Text(text),
            });
        }
        if ended {
            self.state = State::Head;
        }
        ended
    }
}

/// What the message of this head is.
fn message_of(head: &str, out: &mut Vec<AnswerPart>) -> State {
    let word = |text: &str| text.split(['<', ' ', '\n']).next().unwrap_or_default().to_owned();
    if let Some((_, rest)) = head.split_once(RECIPIENT) {
        out.push(AnswerPart::Call(word(rest)));
        return State::Call;
    }
    let channel = head.split_once(CHANNEL).map(|(_, rest)| word(rest));
    if channel.as_deref() == Some("analysis") { State::Reasoning } else { State::Text }
}

impl Stepwise for Parser {
    fn pending(&mut self) -> &mut Pending {
        &mut self.pending
    }

    fn advance(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        self.step(last, out)
    }

    fn in_thought(&self) -> bool {
        self.state == State::Reasoning
    }
}
