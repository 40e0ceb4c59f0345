//! [`OutputHead`]: from the last hidden states to logits or to the loss.

use crate::Result;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use moe_core::ops::{Distillation, DistilledLoss, SoftTargets, StudentOutput};
use moe_core::{Ops, ParamSpec, Weight, WeightSource, WeightUse};
use std::sync::Arc;

/// The output layer: a matrix of its own, or the embedding.
#[derive(Debug, Clone)]
pub struct OutputHead {
    weight: Weight,
    ops: Arc<dyn Ops>,
}

impl OutputHead {
    /// A matrix of its own, `spec` under `vb`.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn new(spec: &ParamSpec, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let weight = ops.weight(&WeightSource::new(&vb, spec), WeightUse::Output)?;
        Ok(Self { weight, ops })
    }

    /// The embedding's table.
    pub fn tied(table: &Weight, ops: Arc<dyn Ops>) -> Self {
        Self { weight: table.clone(), ops }
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// `[tokens, d_model]` to `[tokens, vocab_size]`
    ///
    /// # Errors
    /// If the width is another.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.ops.linear(hidden, &self.weight, None)?)
    }

    /// Mean cross-entropy in nats per counted token; the logits are never whole in memory.
    ///
    /// # Errors
    /// If the sizes differ or a target is outside the vocabulary.
    pub fn loss(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor> {
        Ok(self.ops.linear_cross_entropy(hidden, &self.weight, targets)?)
    }

    /// What a teacher's output layer says of `hidden`, which has no gradient: for [`OutputHead::distillation`].
    pub fn soft_targets<'a>(&'a self, hidden: &'a Tensor) -> SoftTargets<'a> {
        SoftTargets::Layer { hidden, weight: &self.weight }
    }

    /// Mean cross-entropy plus the divergence from a teacher, nats per counted token; no logits are ever whole in memory.
    ///
    /// # Errors
    /// If the sizes differ, or a target or an entry is outside the vocabulary.
    pub fn distillation(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> Result<DistilledLoss> {
        let student = StudentOutput { hidden, weight: &self.weight, targets, part: None };
        Ok(self.ops.linear_distillation(student, soft, how)?)
    }
}
