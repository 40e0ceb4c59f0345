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
    /// Refuses sizes that do not fit each other.
    pub(crate) fn check(&self) -> Result<()> {
        let tokens = self.batch * self.seq_len;
        if tokens == 0 || self.input_ids.len() != tokens || self.target_ids.len() != tokens {
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
    /// With gradients, training capacity and noise; `seed` drives every random draw of the pass.
    Train {
        /// A different one for every micro-batch.
        seed: u64,
    },
    /// Without gradients, draws and drops, and so without auxiliary losses.
    Eval,
}

/// The loss of one batch and what it is made of.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Language-model loss plus scaled auxiliary losses: a scalar, with its graph in [`Pass::Train`].
    pub loss: Tensor,
    /// Mean cross-entropy in nats per token.
    pub lm_loss: f64,
    /// Scaled auxiliary losses, summed over layers.
    pub aux_loss: f64,
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
