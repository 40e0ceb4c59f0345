//! GLM-4.5's form: `<tool_call>NAME`, then `<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>` for each argument. Values are JSON, but for
//! strings, which stand as they are.

use super::form::{Arguments, Before, Form};
use super::pending::{Pending, TextOut};
use super::{AnswerParser, AnswerPart, Family, Stepwise};
use crate::text::chat::Tool;
use serde_json::Value;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const KEY: (&str, &str) = ("<arg_key>", "</arg_key>");
const VALUE: (&str, &str) = ("<arg_value>", "</arg_value>");

const FORM: Form = Form {
    before: Before::Text(&[OPEN]),
    before_name: "<tool_call>",
    after_name: "\n",
    after_arguments: "</tool_call>",
    between: "\n",
    arguments: Arguments::Tagged,
    markers: &[OPEN, CLOSE, KEY.0, KEY.1, VALUE.0, VALUE.1],
    ..Form::JSON
};

pub(super) struct Glm;

impl Family for Glm {
    fn names(&self) -> &'static [&'static str] {
        &["glm45", "glm47"]
    }

    fn wrote(&self, template: &str) -> bool {
        template.contains(KEY.0)
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        Box::new(Parser { tools: tools.to_vec(), ..Parser::default() })
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    Name,
    Arguments,
}

#[derive(Debug, Default)]
struct Parser {
    tools: Vec<Tool>,
    pending: Pending,
    state: State,
    text: TextOut,
    name: String,
    key: Option<String>,
    arguments: usize,
}

impl Parser {
    fn step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        match self.state {
            State::Text => match self.pending.take_through(&[OPEN]) {
                Some((before, _)) => {
                    self.text.push(&before, out);
                    self.state = State::Name;
                    true
                }
                None => {
                    let certain = if last { self.pending.take() } else { self.pending.take_certain(&[OPEN]) };
                    self.text.push(&certain, out);
                    false
                }
            },
            State::Name => self.name_step(last, out),
            State::Arguments => self.argument_step(out),
        }
    }

    /// The name ends where a line, the first key or the call does.
    fn name_step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        self.pending.skip(char::is_whitespace);
        let ends = ["\n", KEY.0, CLOSE].iter().filter_map(|end| self.pending.0.find(end)).min();
        let Some(end) = ends.filter(|&end| end > 0) else {
            let is_broken = last || ends.is_some();
            if is_broken {
                // A call of nothing is text, and so is what follows, unless that is a call.
                self.text.push(OPEN, out);
                self.state = State::Text;
            }
            return is_broken;
        };
        self.name = self.pending.take_front(end).trim().to_owned();
        self.text.call();
        out.push(AnswerPart::Call(self.name.clone()));
        (self.state, self.arguments, self.key) = (State::Arguments, 0, None);
        true
    }

    fn argument_step(&mut self, out: &mut Vec<AnswerPart>) -> bool {
        let Some(key) = self.key.clone() else {
            match self.pending.take_through(&[KEY.1, CLOSE]) {
                Some((_, CLOSE)) => {
                    let closing = if self.arguments == 0 { "{}" } else { "}" };
                    out.push(AnswerPart::Arguments(closing.to_owned()));
                    self.state = State::Text;
                }
                Some((before, _)) => {
                    self.key = Some(before.split_once(KEY.0).map_or(before.trim(), |(_, key)| key).to_owned());
                }
                None => return false,
            }
            return true;
        };
        let Some((before, _)) = self.pending.take_through(&[VALUE.1]) else { return false };
        let text = before.split_once(VALUE.0).map_or(before.trim(), |(_, value)| value);
        let begin = if self.arguments == 0 { "{" } else { ", " };
        let value = self.value(&key, text);
        out.push(AnswerPart::Arguments(format!("{begin}{}: {value}", Value::from(key))));
        (self.key, self.arguments) = (None, self.arguments + 1);
        true
    }

    /// The value as JSON: what the schema calls a string is one, whatever it looks like.
    fn value(&self, key: &str, text: &str) -> Value {
        let tool = self.tools.iter().find(|tool| tool.name == self.name);
        let is_string =
            tool.is_some_and(|tool| tool.parameters.get("properties").is_some_and(|p| p[key]["type"] == "string"));
        let json = if is_string { None } else { serde_json::from_str(text).ok() };
        json.unwrap_or_else(|| text.into())
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
