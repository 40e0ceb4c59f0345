//! [`TrainModel`]: what the training loop needs of a model, and nothing else.

use super::optimizer::UpdateRule;
use crate::config::LayerConfig;
use crate::hf::{NameTable, write_config};
use crate::{DropoutConfig, Family, Model, Precision, Recompute, Result};
use candle_core::{DType, Tensor, Var};
use moe_core::{ParamInit, ParamSpec};
use std::path::Path;

pub use crate::batch::{LayerLoad, LossOutput, LossParts, Pass, TokenBatch, TrainPass};

/// The group of gradients of all parameters that are not those of experts.
const DENSE: &str = "dense";

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
    /// How a parameter is updated. By default those of two or more dimensions are decayed: biases and norms are not.
    fn update_rule(&self, _name: &str, shape: &[usize]) -> UpdateRule {
        UpdateRule::for_shape(shape)
    }
    /// Name and value of each parameter that a checkpoint holds, frozen ones too: by default those that are trained.
    fn weights(&self) -> &[(String, Var)] {
        self.params()
    }
    /// What each of [`TrainModel::weights`] is over all ranks, in their order: by default whole on every rank, as it is here.
    fn specs(&self) -> Vec<ParamSpec> {
        self.weights().iter().map(|(name, var)| ParamSpec::new(name, var.dims(), ParamInit::Zeros)).collect()
    }
    /// What weights are called in files. By default as here.
    fn names(&self) -> NameTable {
        NameTable::new(&[])
    }
    /// What [`TrainModel::loss`] reads of parameters that are not trained, each the very tensor. By default nothing.
    fn frozen(&self) -> &[Tensor] {
        &[]
    }
    /// The biases beside scores by which routers choose experts, each with its layer: no gradient changes them, but the loop does
    /// where it is told to ([`super::TrainConfig::bias_update_speed`]). By default none.
    fn selection_biases(&self) -> Vec<(usize, &Var)> {
        Vec::new()
    }
    /// The group whose buffer a parameter's gradient is kept in: those that the same ranks reduce, and update together.
    fn grad_group(&self, _name: &str) -> String {
        DENSE.into()
    }
    /// What the model is, of which ranks are to be told the same: by default what its weights are called and their shapes.
    ///
    /// # Errors
    /// If it cannot be told.
    fn description(&self) -> Result<String> {
        Ok(self.specs().iter().map(|spec| format!("{} {:?}\n", spec.name, spec.shape)).collect())
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
    /// What [`TrainModel::loss`] drops in training passes. The trainer refuses settings that say otherwise.
    ///
    /// By default nothing.
    fn dropout(&self) -> DropoutConfig {
        DropoutConfig::default()
    }
    /// The loss of one micro-batch.
    ///
    /// # Errors
    /// If the batch does not fit the model or a tensor operation fails.
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput>;
    /// Writes the configuration of weights saved as `dtype`, the Hugging Face way, into the existing folder `dir`. Of several ranks
    /// one is asked.
    ///
    /// # Errors
    /// If a file cannot be written.
    fn save_config(&self, dir: &Path, dtype: DType) -> Result<()>;
}

/// The rule of each parameter of `model`.
pub(crate) fn update_rules<M: TrainModel>(model: &M) -> Vec<UpdateRule> {
    model.params().iter().map(|(name, var)| model.update_rule(name, var.dims())).collect()
}

/// The group whose gradients a parameter's are added up with: those of the dense layers, or of layers with as many experts.
pub(crate) fn grad_group(spec: &ParamSpec) -> String {
    if spec.is_stacked() { format!("experts of {}", spec.shape[0]) } else { DENSE.into() }
}

impl<F: Family> TrainModel for Model<F> {
    fn vocab_size(&self) -> usize {
        self.decoder_config().vocab_size
    }
    fn max_seq_len(&self) -> usize {
        self.decoder_config().max_seq_len
    }
    fn params(&self) -> &[(String, Var)] {
        self.trainable()
    }
    fn update_rule(&self, name: &str, _: &[usize]) -> UpdateRule {
        UpdateRule::decays(self.table().get(name).is_some_and(|spec| spec.decay))
    }
    fn weights(&self) -> &[(String, Var)] {
        Self::params(self)
    }
    fn specs(&self) -> Vec<ParamSpec> {
        self.table().specs().to_vec()
    }
    fn names(&self) -> NameTable {
        self.config().names()
    }
    fn description(&self) -> Result<String> {
        self.config().to_json(DType::F32)
    }
    fn frozen(&self) -> &[Tensor] {
        self.frozen()
    }
    fn selection_biases(&self) -> Vec<(usize, &Var)> {
        let layers = self.decoder_config().layers.iter().enumerate();
        let name = |(layer, config): (usize, &LayerConfig)| {
            let bias = config.feed_forward.moe()?.selection_bias()?;
            Some((layer, format!("model.layers.{layer}.mlp.{}", bias.name)))
        };
        let named = |(layer, name): (usize, String)| {
            let (_, var) = Self::params(self).iter().find(|(known, _)| *known == name)?;
            Some((layer, var))
        };
        layers.filter_map(name).filter_map(named).collect()
    }
    fn grad_group(&self, name: &str) -> String {
        self.table().get(name).map_or_else(|| DENSE.to_owned(), grad_group)
    }
    fn precision(&self) -> Precision {
        self.precision()
    }
    fn recompute(&self) -> Recompute {
        self.recompute()
    }
    fn dropout(&self) -> DropoutConfig {
        self.dropout()
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        self.loss(batch, pass)
    }
    fn save_config(&self, dir: &Path, dtype: DType) -> Result<()> {
        write_config(self.config(), dir, dtype)
    }
}
