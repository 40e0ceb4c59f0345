//! [`EitherParser`]: an answer that is calls, or text of a form, whatever that text looks like.

use super::{AnswerParser, AnswerPart};

#[derive(Debug)]
enum State {
    /// Too little has come.
    Open(String),
    Calls,
    Text,
}

/// Tells by its beginning what an answer is. White space before it counts for nothing.
#[derive(Debug)]
pub(super) struct EitherParser {
    /// What answers of calls begin with.
    beginnings: Vec<String>,
    calls: Box<dyn AnswerParser>,
    state: State,
}

impl EitherParser {
    pub(super) fn new(beginnings: Vec<String>, calls: Box<dyn AnswerParser>) -> Self {
        let beginnings = beginnings.iter().map(|beginning| beginning.trim_start().to_owned()).collect();
        Self { beginnings, calls, state: State::Open(String::new()) }
    }
}

impl AnswerParser for EitherParser {
    fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        match &mut self.state {
            State::Calls => self.calls.push(text),
            State::Text if text.is_empty() => Vec::new(),
            State::Text => vec![AnswerPart::Text(text.to_owned())],
            State::Open(held) => {
                held.push_str(text);
                let (all, begun) = (held.clone(), held.trim_start());
                if self.beginnings.iter().any(|beginning| begun.starts_with(beginning.as_str())) {
                    self.state = State::Calls;
                    self.calls.push(&all)
                } else if self.beginnings.iter().any(|beginning| beginning.starts_with(begun)) {
                    Vec::new()
                } else {
                    self.state = State::Text;
                    vec![AnswerPart::Text(all)]
                }
            }
        }
    }

    fn thinks(&self) -> bool {
        matches!(self.state, State::Calls) && self.calls.thinks()
    }

    fn finish(&mut self) -> Vec<AnswerPart> {
        match &mut self.state {
            State::Calls => self.calls.finish(),
            State::Text => Vec::new(),
            State::Open(held) if held.is_empty() => Vec::new(),
            State::Open(held) => vec![AnswerPart::Text(std::mem::take(held))],
        }
    }
}
