//! [`TrainModel`]: what the training loop needs of a model, and nothing else.

use crate::Result;
use candle_core::Var;
use std::path::Path;

pub use crate::gpt::{LayerLoad, LossOutput, Pass, TokenBatch};

/// A model that can be trained: parameters, a loss with a graph, and a way to disk.
///
/// `loss` must be a pure function of the parameters, the batch and the pass: a run is bit-reproducible only then.
pub trait TrainModel: Sync {
    /// Entries of the vocabulary, padding included.
    fn vocab_size(&self) -> usize;
    /// Longest sequence, in tokens.
    fn max_seq_len(&self) -> usize;
    /// Name and value (f32) of each trainable parameter, in an order that never changes.
    fn params(&self) -> &[(String, Var)];
    /// The loss of one micro-batch.
    ///
    /// # Errors
    /// If the batch does not fit the model or a tensor operation fails.
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput>;
    /// Writes configuration and weights, the Hugging Face way, into the existing folder `dir`.
    ///
    /// # Errors
    /// If a file cannot be written.
    fn save(&self, dir: &Path, dtype: candle_core::DType) -> Result<()>;
}

impl TrainModel for crate::gpt::Gpt {
    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }
    fn max_seq_len(&self) -> usize {
        self.config().max_position_embeddings
    }
    fn params(&self) -> &[(String, Var)] {
        self.params()
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        self.loss(batch, pass)
    }
    fn save(&self, dir: &Path, dtype: candle_core::DType) -> Result<()> {
        self.save(dir, dtype)
    }
}
