//! The zero-shot tasks: one small file each, which says where its items are and how a line becomes an [`Item`]; and
//! [`Task::evaluate`], which is the same for all.
//!
//! A new task adds its file and a line of [`TASKS`].

mod arc;
mod boolq;
mod hellaswag;
mod lambada;
mod openbookqa;
mod piqa;
mod triviaqa;
mod webqs;
mod winogrande;

use super::generate::Generator;
use super::items::{Item, TaskFile};
use super::metrics::Metric;
use super::report::{MetricReport, TaskReport};
use super::request::{RequestEncoder, TokenRequest};
use super::scorer::Scorer;
use crate::{Error, Result};
use moe_models::CausalLm;
use std::path::Path;

/// Every task, in the order they are listed in.
pub const TASKS: &[Task] = &[
    lambada::TASK,
    piqa::TASK,
    hellaswag::TASK,
    boolq::TASK,
    arc::EASY,
    arc::CHALLENGE,
    openbookqa::TASK,
    winogrande::TASK,
    triviaqa::TASK,
    webqs::TASK,
];

/// Where a generated answer ends.
const STOPS: &[&str] = &["\n", ".", ","];
/// Tokens of a generated answer; lm-eval's default.
const MAX_GENERATED: usize = 256;

/// One task.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    /// What it is called here.
    pub name: &'static str,
    /// Its file without the ending: lm-eval's data set and the part of it that is evaluated.
    pub file: &'static str,
    /// Those that lm-eval reports.
    pub metrics: &'static [Metric],
    /// Reads a line of the file.
    parse: fn(&str) -> std::result::Result<Item, String>,
}

/// A model that tasks are put to.
pub struct TaskModel<'a> {
    /// The model.
    pub lm: &'a dyn CausalLm,
    /// Its tokenizer.
    pub encoder: &'a RequestEncoder,
}

impl Task {
    /// The task of this name.
    ///
    /// # Errors
    /// [`Error::Argument`] with the names there are.
    pub fn named(name: &str) -> Result<&'static Self> {
        TASKS.iter().find(|task| task.name == name).ok_or_else(|| {
            let names: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
            Error::Argument(format!("there is no task {name:?}; choose from {}", names.join(", ")))
        })
    }

    /// Reads its first `limit` items, or all, from `dir`.
    ///
    /// # Errors
    /// As [`TaskFile::find`] and [`TaskFile::read`].
    pub fn items(&self, dir: &Path, limit: Option<usize>) -> Result<Vec<Item>> {
        TaskFile::find(dir, self.file)?.read(limit, self.parse)
    }

    /// Puts `items` to the model. `progress` hears how many requests of how many are done.
    ///
    /// # Errors
    /// If a request cannot be tokenised, with the number of its item; what the model returns.
    pub fn evaluate(
        &self,
        items: &[Item],
        model: &TaskModel<'_>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<TaskReport> {
        let requests = self.encode(items, model.encoder)?;
        let prompts: Vec<&str> = items.iter().filter_map(Item::prompt).collect();
        let total = requests.len() + prompts.len();
        let scorer = Scorer::new(model.lm, model.encoder.num_tokens());
        let scores = scorer.log_likelihoods(&requests, &mut |done| progress(done, total))?;
        let generator = Generator { lm: model.lm, encoder: model.encoder, stops: STOPS, max_tokens: MAX_GENERATED };
        let answers = match prompts.is_empty() {
            true => Vec::new(),
            false => generator.generate(&prompts, &mut |done| progress(requests.len() + done, total))?,
        };
        let (mut scores, mut answers) = (&scores[..], answers.into_iter());
        let values = items.iter().flat_map(|item| {
            let (own, rest) = scores.split_at(item.requests().len());
            scores = rest;
            let answer = item.prompt().and_then(|_| answers.next()).unwrap_or_default();
            item.values(own, &answer)
        });
        Ok(self.report(items, &values.collect::<Vec<_>>()))
    }

    /// The requests of `items` as token ids, in their order.
    ///
    /// # Errors
    /// If one cannot be tokenised or is longer than the model reads, with the number of its item.
    pub fn encode(&self, items: &[Item], encoder: &RequestEncoder) -> Result<Vec<TokenRequest>> {
        let numbered = items.iter().enumerate().flat_map(|(at, item)| item.requests().iter().map(move |one| (at, one)));
        numbered.map(|(at, request)| encoder.encode(request).map_err(|e| self.at(at, &e))).collect()
    }

    fn report(&self, items: &[Item], values: &[(Metric, f64)]) -> TaskReport {
        let chances: Option<Vec<f64>> = items.iter().map(Item::chance).collect();
        let chance = chances.map(|chances| chances.iter().sum::<f64>() / chances.len() as f64);
        let report = |&metric: &Metric| {
            let own: Vec<f64> = values.iter().filter(|(of, _)| *of == metric).map(|(_, value)| *value).collect();
            MetricReport { metric, estimate: metric.estimate(&own), chance }
        };
        let metrics = self.metrics.iter().map(report).collect();
        TaskReport { task: self.name.to_owned(), file: self.file.to_owned(), items: items.len(), metrics }
    }

    fn at(&self, number: usize, error: &Error) -> Error {
        Error::Argument(format!("{}, item {}: {error}", self.file, number + 1))
    }
}

/// A line of JSON.
fn fields<T: serde::de::DeserializeOwned>(line: &str) -> std::result::Result<T, String> {
    serde_json::from_str(line).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests;
