//! What is measured of a step on each rank, and what becomes of it over steps and ranks.

use crate::counted::{Counted, Traffic};
use crate::phases::{PhaseSeconds, Phases};
use anyhow::{Context, Result};
use moe_models::{Decoder, KvPool};
use moe_parallel::{Collectives, Communicator, Phase, Placement, Site};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Instant;

/// Values of a sample, in the order of messages.
const VALUES: usize = 11;
/// The first of them are times, whose names these are; what is left of the step is `rest_ms`.
const TIMES: [&str; 6] = ["step_ms", "attention_ms", "gate_ms", "layout_ms", "all_to_all_ms", "experts_ms"];
const COUNTS: [&str; 4] = ["intra_node_messages", "intra_node_bytes", "inter_node_messages", "inter_node_bytes"];

/// One step of one form on one rank.
pub(crate) type Sample = [f64; VALUES];

/// What a rank holds.
pub(crate) struct RankRecord {
    parameters: usize,
    active_parameters: usize,
    held: usize,
    planned_bytes: usize,
    resident_bytes: u64,
    layers: usize,
    moe_layers: usize,
}

impl RankRecord {
    /// Of a rank at this place; memory is what its process has of its own, divided by the ranks in it, beside what its weights and
    /// the pages of its sequences take.
    ///
    /// # Errors
    /// If the system does not tell.
    pub(crate) fn new(
        decoder: &Decoder,
        pool: &KvPool,
        placement: &Placement,
        ranks_of_process: usize,
    ) -> Result<Self> {
        let config = decoder.config();
        let count = config.parameter_count();
        let weights: usize = decoder.weights().iter().map(|weight| weight.bytes()).sum();
        Ok(Self {
            parameters: count.total,
            active_parameters: count.active,
            held: config
                .params()
                .specs()
                .iter()
                .map(|spec| placement.local_shape(spec).iter().product::<usize>())
                .sum(),
            planned_bytes: weights + pool.bytes(),
            resident_bytes: resident_bytes()? / ranks_of_process as u64,
            layers: config.layers.len(),
            moe_layers: config.moe_layers().len(),
        })
    }
}

/// Memory of this process that lies in no file.
fn resident_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(1024 * kilobytes.context("/proc/self/status has no RssAnon")?)
}

/// Runs a step, which says how many tokens were dropped.
pub(crate) fn sample(
    phases: &Phases,
    counted: &Counted,
    ranks_of_process: usize,
    step: impl FnOnce() -> Result<u64>,
) -> Result<Sample> {
    let share = 1.0 / ranks_of_process as f64;
    let (before, sent, exchanged) = (phases.total(), counted.traffic(), counted.exchange_time());
    let begun = Instant::now();
    let dropped = step()?;
    let seconds = begun.elapsed().as_secs_f64();
    let (after, all_sent) = (phases.total(), counted.traffic());
    let exchange = (counted.exchange_time() - exchanged).as_secs_f64();
    let spent = |of: fn(PhaseSeconds) -> f64| (of(after) - of(before)) * share;
    let counts = |of: fn(Traffic) -> u64| (of(all_sent) - of(sent)) as f64;
    Ok([
        seconds,
        spent(|phases| phases.attention),
        spent(|phases| phases.gate),
        // Beside a branch, results are handed over before `combine`: that is in the exchange alone.
        (spent(|phases| phases.dispatch_and_combine) - exchange).max(0.0),
        exchange,
        spent(|phases| phases.experts),
        counts(|sent| sent.intra_node_messages),
        counts(|sent| sent.intra_node_bytes),
        counts(|sent| sent.inter_node_messages),
        counts(|sent| sent.inter_node_bytes),
        dropped as f64,
    ])
}

/// The samples of all forms on this rank.
pub(crate) struct Measured(Vec<Vec<Sample>>);

impl Measured {
    pub(crate) fn new(forms: usize) -> Self {
        Self(vec![Vec::new(); forms])
    }

    pub(crate) fn keep(&mut self, form: usize, sample: Sample) {
        self.0[form].push(sample);
    }

    /// A line of JSON for each form on rank 0.
    ///
    /// # Errors
    /// If a rank fails.
    pub(crate) fn lines(
        &self,
        world: &dyn Communicator,
        head: &Value,
        names: &[&str],
        record: &RankRecord,
    ) -> Result<String> {
        const SITE: Site = Site::new(Phase::Serve);
        let own = [record.held as f64, record.resident_bytes as f64, record.planned_bytes as f64];
        let of_ranks = world.all_gather(SITE, &own)?;
        let most = |value: usize| of_ranks.iter().skip(value).step_by(own.len()).copied().fold(0.0, f64::max);
        let mut text = String::new();
        for (name, samples) in names.iter().zip(&self.0) {
            let all = world.all_gather(SITE, samples.as_flattened())?;
            if world.rank() > 0 {
                continue;
            }
            let ranks: Vec<&[Sample]> = all.as_chunks::<VALUES>().0.chunks_exact(samples.len()).collect();
            let mut row = head.clone();
            row["form"] = json!(name);
            row["tokens"] = json!(head["sequences"].as_u64().unwrap_or(0) * head["dp"].as_u64().unwrap_or(0));
            summarise(&ranks, &mut row);
            row["parameters"] = json!(record.parameters);
            row["active_parameters"] = json!(record.active_parameters);
            row["held_parameters"] = json!(most(0));
            row["resident_bytes"] = json!(most(1));
            row["planned_bytes"] = json!(most(2));
            row["layers"] = json!(record.layers);
            row["moe_layers"] = json!(record.moe_layers);
            // Writing to a string cannot fail.
            let _ = writeln!(text, "json {row}");
        }
        Ok(text)
    }
}

/// Puts the means over ranks of the faster half of the steps into `row`, so that parts add up to the step; and the most that a rank
/// sends. The slower half is that in which others have had the cores.
fn summarise(ranks: &[&[Sample]], row: &mut Value) {
    let steps = ranks.first().map_or(0, |samples| samples.len());
    let over_ranks =
        |step: usize, value: usize| ranks.iter().map(|samples| samples[step][value]).sum::<f64>() / ranks.len() as f64;
    let mut order: Vec<usize> = (0..steps).collect();
    order.sort_by(|&a, &b| over_ranks(a, 0).total_cmp(&over_ranks(b, 0)));
    let faster = &order[..steps.div_ceil(2)];
    let mean = |value: usize| faster.iter().map(|&step| over_ranks(step, value)).sum::<f64>() / faster.len() as f64;
    let mut rest = mean(0);
    for (index, name) in TIMES.iter().enumerate() {
        row[*name] = json!(1e3 * mean(index));
        if index > 0 {
            rest -= mean(index);
        }
    }
    row["rest_ms"] = json!(1e3 * rest);
    row["least_step_ms"] = json!(1e3 * order.first().map_or(0.0, |&step| over_ranks(step, 0)));
    row["steps"] = json!(steps);
    let every = |value: usize| (0..steps).map(|step| over_ranks(step, value)).sum::<f64>() / steps.max(1) as f64;
    for (index, name) in COUNTS.iter().enumerate() {
        row[*name] = json!(every(TIMES.len() + index));
    }
    row["dropped"] = json!(every(TIMES.len() + COUNTS.len()));
    let messages = |sample: &Sample| sample[TIMES.len()] + sample[TIMES.len() + 2];
    let most = ranks.iter().flat_map(|samples| samples.iter()).map(messages).fold(0.0, f64::max);
    row["most_messages"] = json!(most);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_the_rest_are_the_step() {
        let sample = |step: f64, gate: f64, messages: f64| -> Sample {
            let mut all = [0.0; VALUES];
            (all[0], all[2], all[6], all[10]) = (step, gate, messages, 1.0);
            all
        };
        // One step in four is long for a reason of its own.
        let first =
            [sample(0.002, 0.001, 2.0), sample(0.002, 0.001, 2.0), sample(0.5, 0.001, 2.0), sample(0.001, 0.0, 2.0)];
        let second = first.map(|mut of| {
            of[6] = 4.0;
            of
        });
        let mut row = json!({});
        summarise(&[&first, &second], &mut row);
        let near = |key: &str, want: f64| assert!((row[key].as_f64().unwrap() - want).abs() < 1e-9, "{key}: {row}");
        near("step_ms", 1.5);
        near("gate_ms", 0.5);
        near("rest_ms", 1.0);
        near("least_step_ms", 1.0);
        near("intra_node_messages", 3.0);
        near("most_messages", 4.0);
        near("dropped", 1.0);
    }
}
