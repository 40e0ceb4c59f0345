//! LAMBADA in OpenAI's form: the last word of a passage. lm-eval's `lambada_openai`.

use super::{Task, fields};
use crate::eval::{Item, Metric, Request};

pub(super) const TASK: Task =
    Task { name: "lambada", file: "lambada_openai.test", metrics: &[Metric::Perplexity, Metric::Acc], parse };

#[derive(serde::Deserialize)]
struct Line {
    text: String,
}

/// Words are what single spaces separate.
fn parse(line: &str) -> Result<Item, String> {
    let Line { text } = fields(line)?;
    let (context, word) = text.rsplit_once(' ').unwrap_or(("", &text));
    Ok(Item::Cloze(Request::spaced(context, word)))
}
