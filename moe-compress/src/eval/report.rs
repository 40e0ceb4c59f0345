//! What an evaluation found, as values; written as JSON. Prints nothing.

use super::metrics::{Estimate, Metric};
use super::text::SourceText;
use crate::{Error, Result};
use moe_models::hf::write_atomically;
use serde::{Serialize, Serializer};
use std::path::Path;

/// The outcome of one evaluation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The model's folder, as it was given.
    pub model: String,
    /// What its matrix products read: `bf16` or `f32`.
    pub precision: String,
    /// Tokens of a window of text, and most tokens read of a request.
    pub max_length: usize,
    /// Of text, if any was given.
    pub text: Option<TextReport>,
    /// Of tasks, in the order they were given.
    pub tasks: Vec<TaskReport>,
}

/// Losses on text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextReport {
    /// How much of each source is counted, for a person.
    pub counted: String,
    /// Each source, then all together.
    #[serde(serialize_with = "sources")]
    pub sources: Vec<SourceText>,
}

/// The scores of one task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskReport {
    /// Its name.
    pub task: String,
    /// Its file, without the ending.
    pub file: String,
    /// Items that were scored.
    pub items: usize,
    /// Its metrics, in lm-eval's order.
    pub metrics: Vec<MetricReport>,
}

/// One metric of a task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MetricReport {
    /// Which one.
    pub metric: Metric,
    /// Its value and standard error.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// What guessing would score, where that is a number.
    pub chance: Option<f64>,
}

impl Report {
    /// Writes it as JSON, under another name first.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::Argument(format!("the report: {e}")))?;
        Ok(write_atomically(path, |out| writeln!(out, "{json}"))?)
    }
}

/// Counts beside what follows from them.
fn sources<S: Serializer>(sources: &[SourceText], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Row<'a> {
        source: &'a str,
        tokens: u64,
        bytes: u64,
        words: u64,
        nats: f64,
        bits_per_byte: f64,
        token_perplexity: f64,
        word_perplexity: f64,
    }
    serializer.collect_seq(sources.iter().map(|source| Row {
        source: &source.loss.name,
        tokens: source.loss.tokens,
        bytes: source.loss.bytes,
        words: source.words,
        nats: source.loss.nats,
        bits_per_byte: source.loss.bits_per_byte(),
        token_perplexity: source.token_perplexity(),
        word_perplexity: source.word_perplexity(),
    }))
}
