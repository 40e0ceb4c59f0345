//! TriviaQA without passages: an answer is generated and compared with all names of the right one.

use super::{Task, fields};
use crate::eval::{Item, Metric};

pub(super) const TASK: Task =
    Task { name: "triviaqa", file: "triviaqa_wikipedia_nocontext.validation", metrics: &[Metric::ExactMatch], parse };

#[derive(serde::Deserialize)]
struct Line {
    question: String,
    aliases: Vec<String>,
}

/// The question brings a question mark of its own, as lm-eval has it.
fn parse(line: &str) -> Result<Item, String> {
    let Line { question, aliases } = fields(line)?;
    if aliases.is_empty() {
        return Err("aliases is empty; expected at least one accepted answer".into());
    }
    Ok(Item::Answer { prompt: format!("Question: {question}?\nAnswer:"), accepted: aliases })
}
