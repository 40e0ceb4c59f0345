//! The form of the dialogues that the models trained here know: a line `@NAME {...}`.

use super::call_reader::ValueReader;
use super::form::{Before, Form};
use super::pending::{Pending, TextOut};
use super::{AnswerParser, AnswerPart, Family, Stepwise, names_of};
use crate::text::chat::Tool;

const FORM: Form = Form {
    before: Before::Lines,
    begin: " ",
    before_name: "@",
    after_name: " ",
    after_arguments: "",
    between: "\n",
    ..Form::JSON
};

pub(super) struct Dialogue;

impl Family for Dialogue {
    fn names(&self) -> &'static [&'static str] {
        &["dialogue"]
    }

    /// It has no template in a file.
    fn wrote(&self, _: &str) -> bool {
        false
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        let openings = names_of(tools).into_iter().map(|name| format!("@{name} {{")).collect();
        Box::new(Parser { openings, ..Parser::default() })
    }
}

#[derive(Debug, Default)]
enum State {
    #[default]
    LineStart,
    Line,
    Arguments(ValueReader),
}

/// Only calls of known tools are calls: anybody may begin a line with `@`.
#[derive(Debug, Default)]
struct Parser {
    openings: Vec<String>,
    pending: Pending,
    state: State,
    text: TextOut,
}

impl Parser {
    fn step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        match &mut self.state {
            State::LineStart => {
                let line = self.pending.0.trim_start();
                let white = self.pending.0.len() - line.len();
                if let Some(opening) = self.openings.iter().find(|opening| line.starts_with(opening.as_str())) {
                    // All but the brace.
                    self.pending.take_front(white + opening.len() - 1);
                    self.text.call();
                    out.push(AnswerPart::Call(opening[1..opening.len() - 2].to_owned()));
                    self.state = State::Arguments(ValueReader::default());
                    return true;
                }
                if !last && self.openings.iter().any(|opening| opening.starts_with(line)) {
                    return false;
                }
                self.state = State::Line;
                !self.pending.0.is_empty()
            }
            State::Line => {
                let end = self.pending.0.find('\n').map(|at| at + 1);
                let line = self.pending.take_front(end.unwrap_or(self.pending.0.len()));
                self.text.push(&line, out);
                if end.is_some() {
                    self.state = State::LineStart;
                }
                end.is_some()
            }
            State::Arguments(reader) => {
                let (bytes, ended) = reader.read(&self.pending.0);
                if bytes > 0 {
                    out.push(AnswerPart::Arguments(self.pending.take_front(bytes)));
                }
                if ended {
                    self.state = State::LineStart;
                }
                ended
            }
        }
    }
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
