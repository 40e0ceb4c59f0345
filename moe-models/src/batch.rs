//! What goes into a training pass and what comes out.

use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::ExpertLoad;
pub use moe_core::ops::IGNORED;

/// Token sequences and what follows each token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[batch, seq_len]`, row by row.
    pub input_ids: Vec<u32>,
    /// `[batch, seq_len]`: the next token of each; [`IGNORED`] where it does not count.
    pub target_ids: Vec<u32>,
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
}

impl TokenBatch {
    /// No sequence: for a rank that only takes part in the passes of others. Its losses are 0.
    pub fn empty(seq_len: usize) -> Self {
        Self { input_ids: vec![], target_ids: vec![], batch: 0, seq_len }
    }

    /// Refuses sizes that do not fit each other.
    pub(crate) fn check(&self) -> Result<()> {
        let tokens = self.batch * self.seq_len;
        if self.seq_len == 0 || self.input_ids.len() != tokens || self.target_ids.len() != tokens {
            return Err(Error::Argument(format!(
                "a batch of {} x {} tokens got {} inputs and {} targets",
                self.batch,
                self.seq_len,
                self.input_ids.len(),
                self.target_ids.len()
            )));
        }
        Ok(())
    }
}

/// Why a loss is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// With gradients, training capacity and noise.
    Train(TrainPass),
    /// Without gradients, draws and drops, and so without auxiliary losses.
    Eval,
}

impl Pass {
    /// A training pass of this seed, at the beginning of a run.
    pub fn train(seed: u64) -> Self {
        Self::Train(TrainPass { seed, ..TrainPass::default() })
    }
}

/// Which of a run's training passes one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainPass {
    /// Drives every random draw of the pass: a different one for every micro-batch.
    pub seed: u64,
    /// Optimizer steps done before it.
    pub step: u64,
    /// Training tokens seen before its step.
    pub tokens: u64,
    /// Index of its micro-batch in the step.
    pub micro_batch: usize,
}

/// What a loss is made of, in nats per token; parts that are scaled are given as they enter the sum.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossParts {
    /// Mean cross-entropy of the language model.
    pub lm: f64,
    /// Load-balance losses, summed over layers.
    pub load_balance: f64,
    /// Router z-losses, summed over layers.
    pub router_z: f64,
    /// Divergence of a student from its teacher.
    pub kd: f64,
}

impl LossParts {
    /// What the router adds.
    pub fn aux(&self) -> f64 {
        self.load_balance + self.router_z
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.lm + self.aux() + self.kd
    }

    /// Adds those of another batch.
    pub fn add(&mut self, other: &Self) {
        self.each_mut(other, |own, other| *own += other);
    }

    /// Every part times `factor`.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        let same = self;
        self.each_mut(&same, |own, _| *own *= factor);
        self
    }

    fn each_mut(&mut self, other: &Self, change: impl Fn(&mut f64, f64)) {
        let Self { lm, load_balance, router_z, kd } = self;
        change(lm, other.lm);
        change(load_balance, other.load_balance);
        change(router_z, other.router_z);
        change(kd, other.kd);
    }
}

/// The loss of one batch and what it is made of.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Language-model loss plus scaled auxiliary losses: a scalar, with its graph in [`Pass::Train`].
    pub loss: Tensor,
    /// Its parts.
    pub parts: LossParts,
    /// Load of each MoE layer.
    pub layers: Vec<LayerLoad>,
}

/// The load of one MoE layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLoad {
    /// Transformer layer, from 0.
    pub layer: usize,
    /// Demand and drops.
    pub load: ExpertLoad,
}
