//! What a run reports: the same tags in `metrics.jsonl` and in TensorBoard event files.

pub mod jsonl;
pub mod tensorboard;

use super::model::LayerLoad;
use super::ranks::Traffic;
use crate::Result;
use std::path::Path;

/// Tag of the total loss of a training step, nats per token.
pub const TRAIN_LOSS: &str = "train/loss";
/// Tag of the language-model loss of a training step, nats per token.
pub const TRAIN_LM_LOSS: &str = "train/lm_loss";
/// Tag of the auxiliary losses of a training step, scaled as they enter the total.
pub const TRAIN_AUX_LOSS: &str = "train/aux_loss";
/// Tag of their load-balance part.
pub const TRAIN_LOAD_BALANCE_LOSS: &str = "train/load_balance_loss";
/// Tag of their router z-loss part.
pub const TRAIN_ROUTER_Z_LOSS: &str = "train/router_z_loss";
/// Tag of a student's scaled divergence from its teacher, while it follows it.
pub const TRAIN_KD_LOSS: &str = "train/kd_loss";
/// Tag of the learning rate.
pub const TRAIN_LR: &str = "train/lr";
/// Tag of the global gradient norm before clipping.
pub const TRAIN_GRAD_NORM: &str = "train/grad_norm";
/// Tag of the training speed since the last record.
pub const TRAIN_TOKENS_PER_SECOND: &str = "train/tokens_per_second";
/// Tag of the most memory a process of the run has had, bytes: of the rank that has needed most.
pub const PEAK_MEMORY_BYTES: &str = "train/peak_memory_bytes";
/// Tag of the bytes of rows sent to experts and back since the last record, over all ranks; `/intra_node` or `/inter_node` is
/// appended.
pub const MOE_A2A_BYTES: &str = "moe/a2a_bytes";
/// Tag of the time in which passes waited for them, seconds, of the rank that waited most; as [`MOE_A2A_BYTES`].
pub const MOE_A2A_SECONDS: &str = "moe/a2a_seconds";
/// Tag of the bytes of gradients and parameters sent since the last record, over all ranks; as [`MOE_A2A_BYTES`].
pub const GRADIENT_BYTES: &str = "train/gradient_bytes";
/// Tag of the time in which any of them were under way since the last record, seconds, of the rank where it was longest.
pub const GRADIENT_SECONDS: &str = "train/gradient_seconds";
/// Tag of the time in which steps waited for them alone, seconds, of the rank that waited most. For the rest of the time ranks were
/// in their backward passes, or waited for the losses of slower ones.
pub const GRADIENT_WAIT_SECONDS: &str = "train/gradient_wait_seconds";
/// Tag of the validation loss, nats per token over all sources.
pub const VALID_LOSS: &str = "valid/loss";
/// Tag of the validation loss in bits per byte over all sources; `/SOURCE` is appended for each source.
pub const VALID_BITS_PER_BYTE: &str = "valid/bits_per_byte";

/// Values of one optimizer step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Record {
    /// Optimizer steps done.
    pub step: u64,
    /// Training tokens seen.
    pub tokens: u64,
    /// Tags and values, in order.
    pub values: Vec<(String, f64)>,
}

impl Record {
    /// An empty record.
    pub fn new(step: u64, tokens: u64) -> Self {
        Self { step, tokens, values: Vec::new() }
    }

    /// Adds a value.
    pub fn push(&mut self, tag: impl Into<String>, value: f64) {
        self.values.push((tag.into(), value));
    }

    /// Adds what ranks have sent each other.
    pub fn push_traffic(&mut self, traffic: &Traffic) {
        for (level, name) in ["intra_node", "inter_node"].into_iter().enumerate() {
            self.push(format!("{MOE_A2A_BYTES}/{name}"), traffic.all_to_all_bytes[level] as f64);
            self.push(format!("{MOE_A2A_SECONDS}/{name}"), traffic.all_to_all_seconds[level]);
            self.push(format!("{GRADIENT_BYTES}/{name}"), traffic.gradient_bytes[level] as f64);
        }
        self.push(GRADIENT_SECONDS, traffic.gradient_seconds);
        self.push(GRADIENT_WAIT_SECONDS, traffic.gradient_wait_seconds);
    }

    /// Adds imbalance (max / mean), drop rate and tokens per expert of each MoE layer.
    pub fn push_loads(&mut self, loads: &[LayerLoad]) {
        for LayerLoad { layer, load } in loads {
            self.push(format!("moe/layer_{layer}/imbalance"), load.imbalance());
            self.push(format!("moe/layer_{layer}/drop_rate"), load.drop_rate());
            for (expert, &tokens) in load.tokens_per_expert.iter().enumerate() {
                self.push(format!("moe/layer_{layer}/tokens_per_expert/{expert}"), f64::from(tokens));
            }
        }
    }
}

/// Writes every record to both files.
#[derive(Debug)]
pub struct MetricsWriter {
    jsonl: jsonl::JsonlWriter,
    events: tensorboard::EventWriter,
}

impl MetricsWriter {
    /// Opens `dir/metrics.jsonl` and a new event file in `dir/tensorboard`. Records after `resume_step` are cut from
    /// the first, and TensorBoard is told to forget them; 0 starts both anew.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if a file cannot be written, [`crate::Error::Format`] if the present file is not ours.
    pub fn open(dir: &Path, resume_step: u64) -> Result<Self> {
        let jsonl = jsonl::JsonlWriter::open(&dir.join("metrics.jsonl"), resume_step)?;
        let purge_from = if resume_step > 0 { resume_step + 1 } else { 0 };
        Ok(Self { jsonl, events: tensorboard::EventWriter::create(&dir.join("tensorboard"), Some(purge_from))? })
    }

    /// Writes `record` and flushes it to the operating system.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if a file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        self.jsonl.write(record)?;
        self.events.write(record)
    }
}
