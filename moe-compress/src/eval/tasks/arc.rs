//! ARC: questions of school science, easy and challenging.

use super::{Task, fields};
use crate::eval::{Item, Metric};

pub(super) const EASY: Task = Task { name: "arc_easy", file: "arc_easy.test", metrics: METRICS, parse };
pub(super) const CHALLENGE: Task = Task { name: "arc_challenge", file: "arc_challenge.test", metrics: METRICS, parse };

const METRICS: &[Metric] = &[Metric::Acc, Metric::AccNorm];

#[derive(serde::Deserialize)]
struct Line {
    question: String,
    choices: Vec<String>,
    label: usize,
}

fn parse(line: &str) -> Result<Item, String> {
    let Line { question, choices, label } = fields(line)?;
    Item::choice(&format!("Question: {question}\nAnswer:"), &choices, label)
}
