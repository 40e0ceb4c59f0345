//! [`Linear`]: a matrix and perhaps a bias.

use crate::Result;
use crate::config::LinearConfig;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use moe_core::{Ops, Weight, WeightSource, WeightUse};
use std::sync::Arc;

/// `x W^T + b` over the last dimension.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    ops: Arc<dyn Ops>,
}

impl Linear {
    /// The map whose parameters lie under `vb`.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn new(config: &LinearConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let weight = ops.weight(&WeightSource::new(&vb, &config.weight()), WeightUse::Product)?;
        let bias = config.bias().map(|spec| spec.get(&vb)).transpose()?;
        Ok(Self { weight, bias, ops })
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// `[.., in]` to `[.., out]`
    ///
    /// # Errors
    /// If the width is another.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.ops.linear(x, &self.weight, self.bias.as_ref())?)
    }
}
