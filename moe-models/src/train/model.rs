//! [`TrainModel`]: what the training loop needs of a model, and nothing else.

use crate::{Family, Model, Precision, Recompute, Result};
use candle_core::Var;
use std::path::Path;

pub use crate::batch::{LayerLoad, LossOutput, LossParts, Pass, TokenBatch, TrainPass};

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
    /// Whether a parameter is decayed. By default those of two or more dimensions are: biases and norms are not.
    fn has_weight_decay(&self, _name: &str, shape: &[usize]) -> bool {
        shape.len() >= 2
    }
    /// The group whose buffer a parameter's gradient is kept in: those that the same ranks reduce, and update together.
    fn grad_group(&self, _name: &str) -> String {
        "dense".into()
    }
    /// What the matrix products of [`TrainModel::loss`] read. The trainer refuses settings that say otherwise.
    ///
    /// By default f32, which is what ordinary tensor operations on f32 parameters compute in.
    fn precision(&self) -> Precision {
        Precision::F32
    }
    /// What [`TrainModel::loss`] computes again in its backward pass. The trainer refuses settings that say otherwise.
    ///
    /// By default nothing.
    fn recompute(&self) -> Recompute {
        Recompute::None
    }
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

/// The decay flag of each parameter of `model`.
pub(crate) fn decay_flags<M: TrainModel>(model: &M) -> Vec<bool> {
    model.params().iter().map(|(name, var)| model.has_weight_decay(name, var.dims())).collect()
}

impl<F: Family> TrainModel for Model<F> {
    fn vocab_size(&self) -> usize {
        self.decoder_config().vocab_size
    }
    fn max_seq_len(&self) -> usize {
        self.decoder_config().max_seq_len
    }
    fn params(&self) -> &[(String, Var)] {
        self.params()
    }
    fn has_weight_decay(&self, name: &str, _: &[usize]) -> bool {
        self.table().get(name).is_some_and(|spec| spec.decay)
    }
    fn grad_group(&self, name: &str) -> String {
        let experts = self.table().get(name).filter(|spec| spec.is_stacked());
        experts.map_or_else(|| "dense".into(), |spec| format!("experts of {}", spec.shape[0]))
    }
    fn precision(&self) -> Precision {
        self.precision()
    }
    fn recompute(&self) -> Recompute {
        self.recompute()
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        self.loss(batch, pass)
    }
    fn save(&self, dir: &Path, dtype: candle_core::DType) -> Result<()> {
        self.save(dir, dtype)
    }
}
