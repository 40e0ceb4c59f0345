//! WebQuestions: right if any of the accepted answers is greedy.

use super::{Task, fields};
use crate::eval::{Item, Metric, Request};

pub(super) const TASK: Task = Task { name: "webqs", file: "webqs.test", metrics: &[Metric::ExactMatch], parse };

#[derive(serde::Deserialize)]
struct Line {
    question: String,
    answers: Vec<String>,
}

/// An answer that begins with another is left out: it is greedy only if the other is.
fn parse(line: &str) -> Result<Item, String> {
    let Line { question, mut answers } = fields(line)?;
    answers.sort();
    let mut kept: Vec<String> = Vec::new();
    for answer in answers {
        if kept.last().is_none_or(|last| !answer.starts_with(last.as_str())) {
            kept.push(answer);
        }
    }
    if kept.is_empty() {
        return Err("answers is empty; expected at least one accepted answer".into());
    }
    let context = format!("Question: {question}\nAnswer:");
    Ok(Item::AnyGreedy(kept.iter().map(|answer| Request::spaced(context.as_str(), answer)).collect()))
}
