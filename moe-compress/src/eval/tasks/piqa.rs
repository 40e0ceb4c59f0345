//! PIQA: which of two solutions reaches a goal.

use super::{Task, fields};
use crate::eval::{Item, Metric};

pub(super) const TASK: Task =
    Task { name: "piqa", file: "piqa.validation", metrics: &[Metric::Acc, Metric::AccNorm], parse };

#[derive(serde::Deserialize)]
struct Line {
    goal: String,
    sol1: String,
    sol2: String,
    label: usize,
}

fn parse(line: &str) -> Result<Item, String> {
    let Line { goal, sol1, sol2, label } = fields(line)?;
    Item::choice(&format!("Question: {goal}\nAnswer:"), &[sol1, sol2], label)
}
