//! OpenBookQA: which of four texts continues a statement. The validation part; lm-eval takes the test part.

use super::{Task, fields};
use crate::eval::{Item, Metric};

pub(super) const TASK: Task =
    Task { name: "openbookqa", file: "openbookqa.validation", metrics: &[Metric::Acc, Metric::AccNorm], parse };

#[derive(serde::Deserialize)]
struct Line {
    question: String,
    choices: Vec<String>,
    label: usize,
}

fn parse(line: &str) -> Result<Item, String> {
    let Line { question, choices, label } = fields(line)?;
    Item::choice(&question, &choices, label)
}
