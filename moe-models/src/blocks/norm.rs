//! [`Norm`]: LayerNorm or RMSNorm.

use crate::Result;
use crate::config::NormConfig;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use moe_core::Ops;
use std::sync::Arc;
use tracing::debug_span;

/// A norm over the last dimension: LayerNorm if it has a bias, else RMSNorm.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    epsilon: f64,
    ops: Arc<dyn Ops>,
}

impl Norm {
    /// The norm whose parameters lie under `vb`.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn new(config: &NormConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let bias = config.bias().map(|spec| spec.get(&vb)).transpose()?;
        Ok(Self { weight: config.weight().get(&vb)?, bias, epsilon: config.epsilon, ops })
    }

    /// Shape `[.., width]` stays.
    ///
    /// # Errors
    /// If the width is another.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, &self.weight, self.bias.as_ref())
    }

    /// `x + delta` and its norm.
    ///
    /// # Errors
    /// If the shapes differ or the width is another.
    pub fn add(&self, x: &Tensor, delta: &Tensor) -> Result<[Tensor; 2]> {
        let _norm = debug_span!("norm").entered();
        Ok(self.ops.add_norm(x, delta, &self.weight, self.bias.as_ref(), self.epsilon)?)
    }

    fn apply(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let _norm = debug_span!("norm").entered();
        Ok(match bias {
            Some(bias) => self.ops.layer_norm(x, weight, bias, self.epsilon)?,
            None => self.ops.rms_norm(x, weight, self.epsilon)?,
        })
    }

    /// The same over each head of `[.., heads * width]`.
    ///
    /// # Errors
    /// If the last dimension is no whole number of heads.
    pub fn forward_heads(&self, x: &Tensor) -> Result<Tensor> {
        let heads = x.reshape(((), self.weight.dim(0)?))?;
        let weight = self.ops.for_heads(&self.weight)?;
        let bias = self.bias.as_ref().map(|bias| self.ops.for_heads(bias)).transpose()?;
        Ok(self.apply(&heads, &weight, bias.as_ref())?.reshape(x.shape())?)
    }
}
