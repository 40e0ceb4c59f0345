//! [`Record`]: what a run leaves behind.

use super::experiment::Job;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) experiment: String,
    pub(super) run: String,
    pub(super) seed: u64,
    /// Of the sources.
    pub(super) commit: String,
    pub(super) machine: String,
    /// What the program was told, without folders.
    pub(super) flags: Vec<String>,
    /// What it was trained and validated on, as [`super::runner::Text::described`] has it.
    pub(super) data: Vec<String>,
    /// Processor time.
    pub(super) minutes: f64,
    pub(super) train_tokens: u64,
    pub(super) total_parameters: u64,
    pub(super) active_parameters: u64,
    pub(super) flops_per_token: u64,
    /// Validation over all sources: training tokens, bits per byte.
    pub(super) curve: Vec<(u64, f64)>,
    /// The last, of each source.
    pub(super) by_source: BTreeMap<String, f64>,
}

/// What `moe-train` and `moe-distill` write about their model.
#[derive(Deserialize)]
struct ModelSummary {
    total_parameters: u64,
    active_parameters: u64,
    flops_per_token: u64,
}

const TAG: &str = "valid/bits_per_byte";

impl Record {
    /// Of the run in `folder`.
    pub(super) fn of_run(job: &Job, folder: &Path, data: &[String], minutes: f64) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let summary: ModelSummary = serde_json::from_str(&read("model_summary.json")?)?;
        let (mut curve, mut by_source) = (Vec::new(), BTreeMap::new());
        for line in read("metrics.jsonl")?.lines() {
            let values: BTreeMap<String, serde_json::Value> = serde_json::from_str(line)?;
            let number = |tag: &str| values.get(tag).and_then(serde_json::Value::as_f64);
            if let (Some(tokens), Some(bits)) = (number("tokens"), number(TAG)) {
                curve.push((tokens as u64, bits));
                let sources = values.iter().filter_map(|(tag, value)| {
                    Some((tag.strip_prefix(TAG)?.strip_prefix('/')?.to_owned(), value.as_f64()?))
                });
                by_source = sources.collect();
            }
        }
        let last = curve.last().map_or(0, |(tokens, _)| *tokens);
        ensure!(last >= job.train_tokens, "the run in {} ended after {last} tokens", folder.display());
        Ok(Self {
            experiment: job.experiment.clone(),
            run: job.run.clone(),
            seed: job.seed,
            commit: crate::shell::commit()?,
            machine: crate::shell::machine(),
            flags: job.flags.clone(),
            data: data.to_vec(),
            minutes,
            train_tokens: job.train_tokens,
            total_parameters: summary.total_parameters,
            active_parameters: summary.active_parameters,
            flops_per_token: summary.flops_per_token,
            curve,
            by_source,
        })
    }

    /// Names it for readers.
    pub(super) fn name(&self) -> String {
        format!("{}/{} of seed {}", self.experiment, self.run, self.seed)
    }

    /// Where the record of a run lies.
    pub(super) fn path(records: &Path, experiment: &str, name: &str) -> PathBuf {
        records.join(experiment).join(format!("{name}.json"))
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let unfinished = path.with_extension("unfinished");
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        std::fs::write(&unfinished, serde_json::to_string(self)? + "\n")?;
        Ok(std::fs::rename(unfinished, path)?)
    }

    /// What it was trained on: whole steps, so that it may be a little more than was asked for.
    pub(super) fn tokens(&self) -> u64 {
        self.curve.last().map_or(0, |(tokens, _)| *tokens)
    }

    /// Bits per byte at the end.
    pub(super) fn last(&self) -> f64 {
        self.curve.last().map_or(f64::NAN, |(_, bits)| *bits)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One that is all alike but for its curve.
    pub(in crate::repro::quality) fn record(curve: &[(u64, f64)]) -> Record {
        Record {
            experiment: "x".into(),
            run: "r".into(),
            seed: 1,
            commit: "c".into(),
            machine: "m".into(),
            flags: Vec::new(),
            data: Vec::new(),
            minutes: 1.0,
            train_tokens: curve.last().map_or(0, |point| point.0),
            total_parameters: 2,
            active_parameters: 1,
            flops_per_token: 1,
            curve: curve.to_vec(),
            by_source: BTreeMap::new(),
        }
    }
}
