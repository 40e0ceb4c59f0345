//! BoolQ: whether a question about a passage is answered with yes.

use super::{Task, fields};
use crate::eval::{Item, Metric};

pub(super) const TASK: Task = Task { name: "boolq", file: "boolq.validation", metrics: &[Metric::Acc], parse };

#[derive(serde::Deserialize)]
struct Line {
    question: String,
    passage: String,
    answer: bool,
}

fn parse(line: &str) -> Result<Item, String> {
    let Line { question, passage, answer } = fields(line)?;
    let choices = ["no".to_owned(), "yes".to_owned()];
    Item::choice(&format!("{passage}\nQuestion: {question}?\nAnswer:"), &choices, usize::from(answer))
}
