//! [`DropoutConfig`]: how much a training pass drops, and where. Evaluation and inference drop nothing.

use crate::{Error, Result};
use moe_core::CounterRng;
use moe_core::ops::Dropout;

/// Probabilities of dropout in training passes; 0 drops nothing, and changes no bit.
///
/// # Source
/// Megatron-LM's `attention_dropout` and `hidden_dropout`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DropoutConfig {
    /// Of the attention's probabilities, after the softmax.
    pub attention: f64,
    /// Of what each part of a layer adds to the residual stream, and of the embedding.
    pub hidden: f64,
}

/// What is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The sum of the embeddings, before the first layer.
    Embedding,
    /// A layer's attention probabilities.
    Probabilities,
    /// What a layer's attention adds.
    Attention,
    /// What a layer's feed-forward part adds.
    FeedForward,
}

/// Tells the seeds of masks from others made of a pass's seed and a layer.
const MASKS: u64 = 0x6472_6f70_6f75_7400;

impl DropoutConfig {
    /// Refuses probabilities outside `[0, 1)`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        for (name, probability) in [("attention_dropout", self.attention), ("hidden_dropout", self.hidden)] {
            if !(0.0..1.0).contains(&probability) {
                return Err(Error::Config(format!("{name} must lie in 0..1, without 1, got {probability}")));
            }
        }
        Ok(())
    }

    /// What `place` of a layer drops in the pass of this seed. A function of these three alone, so that a pass that is computed
    /// again, or resumed, drops the same.
    pub(crate) fn at(&self, place: Place, layer: usize, seed: u64) -> Result<Option<Dropout>> {
        let probability = if place == Place::Probabilities { self.attention } else { self.hidden };
        if probability == 0.0 {
            return Ok(None);
        }
        let seed = CounterRng::mix(seed, &[MASKS + place as u64, layer as u64]);
        Ok(Some(Dropout::new(probability, seed)?))
    }
}
