//! WinoGrande: which of two names fills a gap. The names are part of the context; what follows the gap is scored after each.

use super::{Task, fields};
use crate::eval::{Item, Metric, Request, python};

pub(super) const TASK: Task =
    Task { name: "winogrande", file: "winogrande_xl.validation", metrics: &[Metric::Acc], parse };

#[derive(serde::Deserialize)]
struct Line {
    sentence: String,
    option1: String,
    option2: String,
    label: usize,
}

fn parse(line: &str) -> Result<Item, String> {
    let Line { sentence, option1, option2, label } = fields(line)?;
    let (before, after) = sentence.split_once('_').ok_or("the sentence has no gap, written _")?;
    let choices = [format!("{before}{option1}"), format!("{before}{option2}")];
    let requests = choices.iter().map(|context| Request::spaced(context, python::strip(after))).collect();
    Item::choice_of(requests, &choices, label)
}
