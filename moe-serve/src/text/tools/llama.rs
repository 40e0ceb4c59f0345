//! The JSON form of Llama 3 and 4: an answer that is `{"name": ..., "parameters": {...}}`, of several with `;` between them.

use super::form::{Before, Form};
use super::marked::{MarkedParser, Marks};
use super::{AnswerParser, Family, names_of};
use crate::text::chat::Tool;

const MARKS: Marks = Marks {
    opens: &["<|python_tag|>", "<|python_start|>"],
    closes: &["<|python_end|>"],
    punctuation: "[],;",
    bare: true,
    after_name: None,
};

const FORM: Form = Form {
    before: Before::Nothing(MARKS.opens),
    before_name: "{\"name\": \"",
    after_name: "\", \"parameters\": ",
    after_arguments: "}",
    between: "; ",
    markers: &["<|python_tag|>", "<|python_start|>", "<|python_end|>"],
    ..Form::JSON
};

pub(super) struct Llama;

impl Family for Llama {
    fn names(&self) -> &'static [&'static str] {
        &["llama3_json", "llama4_json"]
    }

    fn wrote(&self, template: &str) -> bool {
        let header = template.contains("<|start_header_id|>") || template.contains("<|header_start|>");
        header && template.contains("\"parameters\":")
    }

    fn form(&self) -> &'static Form {
        &FORM
    }

    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        Box::new(MarkedParser::new(&MARKS, names_of(tools)))
    }
}
