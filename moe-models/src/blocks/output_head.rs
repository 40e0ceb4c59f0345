//! [`OutputHead`]: from the last hidden states to logits or to the loss.
//!
//! A bias is a column more of the matrix, which is multiplied with a 1 behind the hidden states: the fused losses need not know
//! of it.

use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use candle_nn::VarBuilder;
use moe_core::ops::{Distillation, DistilledLoss, SoftTargets, StudentOutput};
use moe_core::{Ops, ParamInit, ParamSpec, Weight, WeightSource, WeightUse};
use std::collections::HashMap;
use std::sync::Arc;

/// The output layer: a matrix of its own, perhaps with a bias, or the embedding.
#[derive(Debug, Clone)]
pub struct OutputHead {
    weight: Weight,
    bias: Bias,
    ops: Arc<dyn Ops>,
}

#[derive(Debug, Clone)]
enum Bias {
    None,
    /// Beside the matrix; both may change from pass to pass.
    Beside(Tensor),
    /// The last column of the packed matrix.
    Packed,
}

impl OutputHead {
    /// A matrix of its own, `spec` under `vb`, and its bias if there is one.
    ///
    /// # Errors
    /// If one is missing or has another shape.
    pub fn new(spec: &ParamSpec, bias: Option<&ParamSpec>, vb: &VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let Some(bias) = bias else {
            let weight = ops.weight(&WeightSource::new(vb, spec), WeightUse::Output)?;
            return Ok(Self { weight, bias: Bias::None, ops });
        };
        let (weight, bias) = (spec.get(vb)?, bias.get(vb)?);
        let wide = beside(&weight, &bias)?;
        let wide_spec = ParamSpec::new("weight", wide.dims(), ParamInit::Zeros);
        let device = wide.device().clone();
        let vb = VarBuilder::from_tensors(HashMap::from([(wide_spec.name.clone(), wide)]), DType::F32, &device);
        Ok(match ops.weight(&WeightSource::new(&vb, &wide_spec), WeightUse::Output)? {
            Weight::Tensor(_) => Self { weight: weight.into(), bias: Bias::Beside(bias), ops },
            packed => Self { weight: packed, bias: Bias::Packed, ops },
        })
    }

    /// The embedding's table.
    pub fn tied(table: &Weight, ops: Arc<dyn Ops>) -> Self {
        Self { weight: table.clone(), bias: Bias::None, ops }
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// What is multiplied: hidden states, with a 1 behind them where there is a bias, and the matrix.
    fn product(&self, hidden: &Tensor) -> Result<(Tensor, Weight)> {
        let with_one = || Tensor::cat(&[hidden, &hidden.narrow(D::Minus1, 0, 1)?.ones_like()?], D::Minus1);
        Ok(match &self.bias {
            Bias::None => (hidden.clone(), self.weight.clone()),
            Bias::Beside(bias) => (with_one()?, beside(self.weight.tensor()?, bias)?.into()),
            Bias::Packed => (with_one()?, self.weight.clone()),
        })
    }

    /// `[tokens, d_model]` to `[tokens, vocab_size]`
    ///
    /// # Errors
    /// If the width is another.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let (hidden, weight) = self.product(hidden)?;
        Ok(self.ops.linear(&hidden, &weight, None)?)
    }

    /// Mean cross-entropy in nats per counted token; the logits are never whole in memory.
    ///
    /// # Errors
    /// If the sizes differ or a target is outside the vocabulary.
    pub fn loss(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let (hidden, weight) = self.product(hidden)?;
        Ok(self.ops.linear_cross_entropy(&hidden, &weight, targets)?)
    }

    /// What a teacher's output layer says of `hidden`, which has no gradient: for [`OutputHead::distillation`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer with a bias.
    pub fn soft_targets<'a>(&'a self, hidden: &'a Tensor) -> Result<SoftTargets<'a>> {
        self.refuse_bias()?;
        Ok(SoftTargets::Layer { hidden, weight: &self.weight })
    }

    /// Mean cross-entropy plus the divergence from a teacher, nats per counted token; no logits are ever whole in memory.
    ///
    /// # Errors
    /// If the sizes differ, or a target or an entry is outside the vocabulary; [`Error::Argument`] for a layer with a bias.
    pub fn distillation(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> Result<DistilledLoss> {
        self.refuse_bias()?;
        let student = StudentOutput { hidden, weight: &self.weight, targets, part: None };
        Ok(self.ops.linear_distillation(student, soft, how)?)
    }

    fn refuse_bias(&self) -> Result<()> {
        match self.bias {
            Bias::None => Ok(()),
            _ => Err(Error::Argument(
                "distillation is not implemented for an output layer with a bias (lm_head_bias); take a model without"
                    .into(),
            )),
        }
    }
}

/// `[out, in]` and `[out]` as one matrix `[out, in + 1]`.
fn beside(weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[weight, &bias.unsqueeze(1)?], 1)?)
}
