//! Hermes' form, which Qwen2, Qwen3 and Granite 4 have too: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

use super::form::{Before, Form};
use super::marked::{MarkedParser, Marks};
use super::{AnswerParser, Family, names_of};
use crate::text::chat::Tool;

const MARKS: Marks =
    Marks { opens: &["<tool_call>"], closes: &["</tool_call>"], punctuation: "", bare: false, after_name: None };

const FORM: Form = Form {
    before: Before::Text(&["<tool_call>"]),
    before_name: "<tool_call>\n{\"name\": \"",
    after_name: "\", \"arguments\": ",
    after_arguments: "}\n</tool_call>",
    between: "\n",
    markers: &["<tool_call>", "</tool_call>"],
    ..Form::JSON
};

pub(super) struct Hermes;

impl Family for Hermes {
    fn names(&self) -> &'static [&'static str] {
        &["hermes"]
    }

    fn wrote(&self, template: &str) -> bool {
        // Qwen3-Coder writes names and arguments in marks of their own between these.
        template.contains("<tool_call>") && !template.contains("<function=")
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        Box::new(MarkedParser::new(&MARKS, names_of(tools)))
    }
}
