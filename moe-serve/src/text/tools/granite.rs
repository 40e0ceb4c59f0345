//! Granite 3's form: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]`.

use super::form::{Before, Form};
use super::marked::{MarkedParser, Marks};
use super::{AnswerParser, Family, names_of};
use crate::text::chat::Tool;

const MARKS: Marks =
    Marks { opens: &["<|tool_call|>"], closes: &[], punctuation: "[],", bare: false, after_name: None };

const FORM: Form = Form {
    before: Before::Text(&["<|tool_call|>"]),
    begin: "<|tool_call|>[",
    before_name: "{\"name\": \"",
    after_name: "\", \"arguments\": ",
    after_arguments: "}",
    between: ", ",
    end: "]",
    markers: &["<|tool_call|>"],
    ..Form::JSON
};

pub(super) struct Granite;

impl Family for Granite {
    fn names(&self) -> &'static [&'static str] {
        &["granite"]
    }

    fn wrote(&self, template: &str) -> bool {
        template.contains("<|tool_call|>")
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        Box::new(MarkedParser::new(&MARKS, names_of(tools)))
    }
}
