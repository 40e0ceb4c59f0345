//! Everything that was measured, as it is kept: the report is made of it alone.

use super::claims::Span;
use super::models::Model;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What one run of `cargo xtask repro inference` has measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Data {
    pub(super) commit: String,
    pub(super) machine: String,
    /// Of the machine, which all ranks share.
    pub(super) cores: usize,
    pub(super) compiler: String,
    pub(super) command: String,
    pub(super) minutes: f64,
    /// Programs that wanted a core in the minutes before the first run and before the last: this one's too, and of whoever else
    /// uses the machine.
    pub(super) load: [f64; 2],
    /// Of the programs that were measured, as `nice` counts it: those below 0 have a core before others.
    pub(super) nice: i64,
    /// How many times narrower than the paper's the models are.
    pub(super) narrow: usize,
    /// Sizes at which figures say nothing.
    pub(super) smoke: bool,
    pub(super) delay_us: u64,
    /// Token steps, in the order in which they were measured.
    pub(super) steps: Vec<Step>,
    pub(super) training: Vec<Training>,
}

impl Data {
    /// # Errors
    /// If the file is missing or damaged.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// The steps of one part of the report: of what was measured more than once, the time when least came in between.
    pub(super) fn of(&self, part: Part) -> impl Iterator<Item = &Step> {
        let mut best: Vec<&Step> = Vec::new();
        for step in self.steps.iter().filter(|step| step.part == part) {
            match best.iter_mut().find(|other| other.is_as(step)) {
                Some(other) if other.step_ms <= step.step_ms => {}
                Some(other) => *other = step,
                None => best.push(step),
            }
        }
        best.into_iter()
    }

    /// A value of what `step` was measured of: that of `step`, and the smallest and the largest of all measurements.
    pub(super) fn span(&self, step: &Step, value: impl Fn(&Step) -> f64) -> Span {
        let all = || self.steps.iter().filter(|other| other.is_as(step)).map(&value);
        Span {
            value: value(step),
            low: all().fold(f64::INFINITY, f64::min),
            high: all().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// A value of one over that of another.
    pub(super) fn ratio(&self, [first, second]: [&Step; 2], value: impl Fn(&Step) -> f64) -> Span {
        let (first, second) = (self.span(first, &value), self.span(second, &value));
        Span { value: first.value / second.value, low: first.low / second.high, high: first.high / second.low }
    }

    /// How ranks were laid out in a part, from few to many.
    pub(super) fn ranks_of(&self, part: Part) -> Vec<usize> {
        let mut ranks: Vec<usize> = self.of(part).map(|step| step.ranks).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

/// Which part of the report a step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    Formulation,
    Kinds,
    Routes,
}

/// The token step of a model in one form, as `moe-models/examples/inference` measures it: means over ranks of the faster half
/// of the steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Step {
    pub(super) part: Part,
    pub(super) model: String,
    pub(super) hosts: usize,
    pub(super) gbits: f64,
    pub(super) form: String,
    pub(super) ranks: usize,
    pub(super) ranks_per_node: usize,
    pub(super) dp: usize,
    pub(super) tp: usize,
    pub(super) route: String,
    pub(super) coordination: String,
    pub(super) context: usize,
    /// Of all replicas in a step.
    pub(super) tokens: f64,
    /// Steps that count.
    pub(super) steps: usize,
    pub(super) step_ms: f64,
    pub(super) least_step_ms: f64,
    pub(super) attention_ms: f64,
    pub(super) gate_ms: f64,
    pub(super) layout_ms: f64,
    pub(super) all_to_all_ms: f64,
    pub(super) experts_ms: f64,
    pub(super) rest_ms: f64,
    /// Of a rank in a step.
    pub(super) intra_node_messages: f64,
    pub(super) intra_node_bytes: f64,
    pub(super) inter_node_messages: f64,
    pub(super) inter_node_bytes: f64,
    /// Of the rank and step with the most.
    pub(super) most_messages: f64,
    /// Choices of a rank in a step that found their expert full.
    pub(super) dropped: f64,
    pub(super) parameters: f64,
    /// Of a token.
    pub(super) active_parameters: f64,
    /// Of the rank that holds the most.
    pub(super) held_parameters: f64,
    /// Memory of the rank that has the most, without files.
    pub(super) resident_bytes: f64,
    /// Weights and pages of the rank that has the most.
    pub(super) planned_bytes: f64,
    pub(super) layers: usize,
    pub(super) moe_layers: usize,
}

impl Step {
    /// Whether both were measured of the same thing.
    fn is_as(&self, other: &Self) -> bool {
        let what = |step: &Self| (step.part, step.hosts, step.ranks, step.tp, step.gbits.to_bits());
        let names = |step: &Self| [&step.model, &step.form, &step.route, &step.coordination].map(String::clone);
        what(self) == what(other) && names(self) == names(other)
    }

    pub(super) fn is(&self, model: &Model, form: &str, ranks: usize) -> bool {
        self.model == model.name && self.form == form && self.ranks == ranks
    }

    /// Tokens/s of all ranks.
    pub(super) fn rate(&self) -> f64 {
        1e3 * self.tokens / self.step_ms
    }

    /// What the gate's masks or tables cost.
    pub(super) fn gate_and_layout_ms(&self) -> f64 {
        self.gate_ms + self.layout_ms
    }

    /// One MoE layer, of those of a step.
    pub(super) fn layer_ms(&self) -> f64 {
        (self.gate_and_layout_ms() + self.all_to_all_ms + self.experts_ms) / self.moe_layers.max(1) as f64
    }

    pub(super) fn messages(&self) -> f64 {
        self.intra_node_messages + self.inter_node_messages
    }

    pub(super) fn bytes(&self) -> f64 {
        self.intra_node_bytes + self.inter_node_bytes
    }
}

/// Some steps of training.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Training {
    pub(super) model: String,
    pub(super) experts: Option<usize>,
    pub(super) parameters: f64,
    pub(super) active_parameters: f64,
    /// Sequences of a step, and their length.
    pub(super) sequences: usize,
    pub(super) seq_length: usize,
    /// Steps that count.
    pub(super) steps: usize,
    pub(super) tokens_per_second: f64,
}

impl Training {
    /// Sequences a second.
    pub(super) fn samples(&self) -> f64 {
        self.tokens_per_second / self.seq_length as f64
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::models::MOE;
    use super::*;

    /// A step of a millisecond in which nothing else is remarkable.
    pub(in crate::repro::inference) fn step(part: Part, form: &str, ranks: usize) -> Step {
        Step {
            part,
            model: MOE.name.into(),
            hosts: ranks.div_ceil(2),
            gbits: 10.0,
            form: form.into(),
            ranks,
            ranks_per_node: 2.min(ranks),
            dp: ranks,
            tp: 1,
            route: "flat".into(),
            coordination: "None".into(),
            context: 128,
            tokens: 8.0 * ranks as f64,
            steps: 100,
            step_ms: 1.0,
            least_step_ms: 0.9,
            attention_ms: 0.1,
            gate_ms: 0.1,
            layout_ms: 0.1,
            all_to_all_ms: 0.2,
            experts_ms: 0.4,
            rest_ms: 0.1,
            intra_node_messages: 12.0,
            intra_node_bytes: 1000.0,
            inter_node_messages: 24.0,
            inter_node_bytes: 2000.0,
            most_messages: 36.0,
            dropped: 0.0,
            parameters: 200e6,
            active_parameters: 5e6,
            held_parameters: 200e6 / ranks as f64,
            resident_bytes: 1e8,
            planned_bytes: 9e7,
            layers: 24,
            moe_layers: 12,
        }
    }

    pub(in crate::repro::inference) fn data(steps: Vec<Step>) -> Data {
        Data {
            commit: "abc".into(),
            machine: "m".into(),
            cores: 2,
            compiler: "r".into(),
            command: "c".into(),
            minutes: 1.0,
            load: [0.5, 2.0],
            nice: 0,
            narrow: 16,
            smoke: false,
            delay_us: 50,
            steps,
            training: Vec::new(),
        }
    }

    #[test]
    fn what_is_kept_is_what_is_read() {
        let path = std::env::temp_dir().join(format!("repro-inference-{}.json", std::process::id()));
        let all = data(vec![step(Part::Kinds, "ours", 4), step(Part::Routes, "ours", 2)]);
        std::fs::write(&path, serde_json::to_string(&all).unwrap()).unwrap();
        let read = Data::read(&path).unwrap();
        assert_eq!(read.of(Part::Kinds).map(|step| step.ranks).collect::<Vec<_>>(), [4]);
        assert_eq!(read.ranks_of(Part::Routes), [2]);
        std::fs::write(&path, "{").unwrap();
        assert!(Data::read(&path).unwrap_err().to_string().contains("is damaged"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_better_of_two_measurements_counts() {
        let of = |ms, form| Step { step_ms: ms, ..step(Part::Kinds, form, 2) };
        let all = data(vec![of(3.0, "ours"), of(2.0, "ours"), of(4.0, "ours"), of(9.0, "another")]);
        let best: Vec<&Step> = all.of(Part::Kinds).collect();
        assert_eq!(best.iter().map(|step| step.step_ms).collect::<Vec<_>>(), [2.0, 9.0]);
        let ratio = all.ratio([best[1], best[0]], |step| step.step_ms);
        assert_eq!((ratio.value, ratio.low, ratio.high), (4.5, 2.25, 4.5));
    }

    #[test]
    fn parts_of_a_step_make_a_layer() {
        let step = step(Part::Formulation, "ours", 2);
        assert!((step.layer_ms() - 0.8 / 12.0).abs() < 1e-12);
        assert!((step.rate() - 16_000.0).abs() < 1e-6);
    }
}
