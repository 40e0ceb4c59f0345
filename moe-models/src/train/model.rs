//! [`TrainModel`]: what the training loop needs of a model, and nothing else.

use super::optimizer::{Unit, Units, UpdateRule};
use crate::{DropoutConfig, Family, Model, Precision, Recompute, Result};
use candle_core::{Tensor, Var};
use moe_core::ParamSpec;
use moe_parallel::Placement;
use moe_parallel::extent::Extent;
use std::collections::{BTreeSet, HashSet};
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
    /// What a parameter of this shape is made of, in the order of its elements: its experts if it is a stack, under names that
    /// all ranks have for them. By default itself.
    fn units(&self, name: &str, shape: &[usize]) -> Vec<Unit> {
        vec![Unit { name: name.to_owned(), elements: shape.iter().product() }]
    }
    /// What all ranks hold of the parameters, in any order: what a run of one rank holds, by default.
    fn all_units(&self) -> Vec<Unit> {
        self.params().iter().flat_map(|(name, var)| self.units(name, var.dims())).collect()
    }
    /// What [`TrainModel::loss`] reads of parameters that are not trained, each the very tensor. By default nothing.
    fn frozen(&self) -> &[Tensor] {
        &[]
    }
    /// The group whose buffer a parameter's gradient is kept in: those that the same ranks reduce, and update together.
    fn grad_group(&self, _name: &str) -> String {
        DENSE.into()
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
    /// Writes configuration and weights, those of frozen parameters too, the Hugging Face way into the existing folder `dir`. Of
    /// several ranks, which hold the same weights, one is asked.
    ///
    /// # Errors
    /// If a file cannot be written.
    fn save(&self, dir: &Path, dtype: candle_core::DType) -> Result<()>;
}

/// The rule of each parameter of `model`.
pub(crate) fn update_rules<M: TrainModel>(model: &M) -> Vec<UpdateRule> {
    model.params().iter().map(|(name, var)| model.update_rule(name, var.dims())).collect()
}

/// The units of `model`.
pub(crate) fn units_of<M: TrainModel>(model: &M) -> Result<Units> {
    let held: Vec<_> = model.params().iter().map(|(name, var)| model.units(name, var.dims())).collect();
    Units::within(model.all_units(), &held)
}

/// The group whose gradients a parameter's are added up with: those of the dense layers, or of layers with as many experts.
pub(crate) fn grad_group(spec: &ParamSpec) -> String {
    if spec.is_stacked() { format!("experts of {}", spec.shape[0]) } else { DENSE.into() }
}

/// What a rank holds of a parameter, in the order of its elements.
fn units(spec: &ParamSpec, placement: &Placement) -> Vec<Unit> {
    let unit = |extent: Extent| Unit { name: extent.key(), elements: extent.elements() };
    placement.extents(spec).into_iter().map(unit).collect()
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
    fn units(&self, name: &str, _: &[usize]) -> Vec<Unit> {
        self.table().get(name).map(|spec| units(spec, &self.placement())).unwrap_or_default()
    }
    fn all_units(&self) -> Vec<Unit> {
        let dims = self.placement().dims();
        let placements = (0..dims.world_size()).filter_map(|rank| Placement::new(dims, rank).ok());
        let trains: HashSet<&str> = self.trainable().iter().map(|(name, _)| name.as_str()).collect();
        let specs = self.table().specs().iter().filter(|spec| trains.contains(spec.name.as_str()));
        let of = |placement: Placement| specs.clone().flat_map(move |spec| units(spec, &placement));
        placements.flat_map(of).collect::<BTreeSet<_>>().into_iter().collect()
    }
    fn frozen(&self) -> &[Tensor] {
        self.frozen()
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
    fn save(&self, dir: &Path, dtype: candle_core::DType) -> Result<()> {
        self.save(dir, dtype)
    }
}
