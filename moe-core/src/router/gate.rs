//! The linear map inside a router.

use crate::ops::host::expect_shape;
use crate::ops::{CandleOps, Choices, MoeOps};
use crate::{DroplessConfig, Error, Result, Weight};
use candle_core::Tensor;
use std::sync::Arc;

/// The gate: router logits `tokens W^T`, perhaps with a bias, in f32 (or f64 if the weight is f64) whatever the tokens' type.
#[derive(Debug, Clone)]
pub struct Gate {
    weight: Weight,
    bias: Option<Tensor>,
    ops: Arc<dyn MoeOps>,
}

impl Gate {
    /// A gate with weight `[num_experts, d_model]`, without bias, in ordinary candle operations.
    ///
    /// # Errors
    /// [`Error::Config`] if the weight is not two-dimensional or has no expert.
    pub fn new(weight: Tensor) -> Result<Self> {
        Self::with_ops(weight.into(), Arc::new(CandleOps))
    }

    /// The same with given operations.
    ///
    /// # Errors
    /// As [`Gate::new`].
    pub fn with_ops(weight: Weight, ops: Arc<dyn MoeOps>) -> Result<Self> {
        match weight.dims() {
            [experts, width] if *experts > 0 && *width > 0 => Ok(Self { weight, bias: None, ops }),
            dims => Err(Error::Config(format!(
                "gate weight must be [num_experts, d_model] with num_experts of at least 1, got {dims:?}"
            ))),
        }
    }

    /// The same with a bias `[num_experts]` on the logits.
    ///
    /// # Errors
    /// [`Error::Input`] if it has another shape.
    pub fn with_bias(self, bias: Option<Tensor>) -> Result<Self> {
        if let Some(bias) = &bias {
            expect_shape("gate bias", bias, &[self.num_experts()])?;
        }
        Ok(Self { bias, ..self })
    }

    /// Experts to choose from.
    pub fn num_experts(&self) -> usize {
        self.weight.dims()[0]
    }

    /// `[num_experts, d_model]`
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Tokens and experts of router logits that somebody brings.
    ///
    /// # Errors
    /// [`Error::Input`] if they are not `[tokens, num_experts]`.
    pub(super) fn check_logits(&self, logits: &Tensor) -> Result<(usize, usize)> {
        let tokens = logits.dims2()?.0;
        expect_shape("router logits", logits, &[tokens, self.num_experts()])?;
        Ok((tokens, self.num_experts()))
    }

    /// Router logits.
    ///
    /// # Shapes
    /// `[tokens, d_model]` to `[tokens, num_experts]`
    ///
    /// # Errors
    /// [`Error::Input`] if the width differs from the weight's.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        self.check(tokens)?;
        self.ops.gate(tokens, &self.weight, self.bias.as_ref())
    }

    /// [`MoeOps::choose`] with this weight; `None` too where there is a bias.
    ///
    /// # Errors
    /// [`Error::Input`] if the width differs from the weight's.
    pub(super) fn choose(
        &self,
        tokens: &Tensor,
        selection_bias: Option<&Tensor>,
        config: &DroplessConfig,
    ) -> Result<Option<Choices>> {
        self.check(tokens)?;
        if self.bias.is_some() {
            return Ok(None);
        }
        self.ops.choose(tokens, &self.weight, selection_bias, config)
    }

    fn check(&self, tokens: &Tensor) -> Result<()> {
        let (num_tokens, _) = tokens.dims2()?;
        expect_shape("tokens", tokens, &[num_tokens, self.weight.dims()[1]])
    }
}

/// Softmax over the last dimension in ordinary operations, with its gradient.
pub(super) fn softmax(logits: &Tensor) -> Result<Tensor> {
    if logits.elem_count() == 0 {
        return Ok(logits.clone()); // candle takes no maximum of nothing
    }
    let max = logits.detach().max_keepdim(candle_core::D::Minus1)?;
    let exp = logits.broadcast_sub(&max)?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(candle_core::D::Minus1)?)?)
}
