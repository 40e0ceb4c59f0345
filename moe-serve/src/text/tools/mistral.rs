//! Mistral's form: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{...}` of its later models.

use super::form::{Before, CallIds, Form};
use super::marked::{MarkedParser, Marks};
use super::{AnswerParser, Family, names_of};
use crate::text::chat::Tool;

const MARKS: Marks =
    Marks { opens: &["[TOOL_CALLS]"], closes: &[], punctuation: "[],", bare: false, after_name: Some("[ARGS]") };

const FORM: Form = Form {
    before: Before::Text(&["[TOOL_CALLS]"]),
    begin: "[TOOL_CALLS][",
    before_name: "{\"name\": \"",
    after_name: "\", \"arguments\": ",
    after_arguments: "}",
    between: ", ",
    end: "]",
    markers: &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    // Its templates refuse others.
    call_ids: CallIds::Nine,
    ..Form::JSON
};

pub(super) struct Mistral;

impl Family for Mistral {
    fn names(&self) -> &'static [&'static str] {
        &["mistral"]
    }

    fn wrote(&self, template: &str) -> bool {
        template.contains("[TOOL_CALLS]")
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        Box::new(MarkedParser::new(&MARKS, names_of(tools)))
    }
}
