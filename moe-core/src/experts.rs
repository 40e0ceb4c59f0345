//! Experts: the feed-forward networks behind a router, stacked.

use crate::ops::host::expect_shape;
use crate::ops::{MoeOps, default_ops};
use crate::{Activation, Error, ExpertRows, Result};
use candle_core::Tensor;
use std::sync::Arc;

/// Applies each expert to its rows.
pub trait Experts {
    /// Experts held.
    fn num_experts(&self) -> usize;

    /// Maps rows `[rows, d_model]` to rows of the same shape and grouping.
    ///
    /// # Errors
    /// If the rows do not fit the experts.
    fn forward(&self, rows: ExpertRows) -> Result<ExpertRows>;
}

/// Weights of a two-layer feed-forward network, or of a stack of them with a leading `[experts]` dimension.
#[derive(Debug, Clone)]
pub struct MlpWeights {
    /// `[d_ff * activation.inputs(), d_model]`; gate before up for SwiGLU.
    pub fc_in: Tensor,
    /// `[d_ff * activation.inputs()]`
    pub fc_in_bias: Option<Tensor>,
    /// `[d_model, d_ff]`
    pub fc_out: Tensor,
    /// `[d_model]`
    pub fc_out_bias: Option<Tensor>,
}

impl MlpWeights {
    fn check(&self, stack: &[usize], activation: Activation) -> Result<()> {
        let dims = self.fc_out.dims();
        if dims.len() != stack.len() + 2 || dims[..stack.len()] != *stack {
            return Err(Error::Config(format!("fc_out must be {stack:?} x [d_model, d_ff], got {dims:?}")));
        }
        let (d_model, d_ff) = (dims[stack.len()], dims[stack.len() + 1]);
        let shape = |tail: &[usize]| [stack, tail].concat();
        expect_shape("fc_in", &self.fc_in, &shape(&[d_ff * activation.inputs(), d_model]))?;
        if let Some(bias) = &self.fc_in_bias {
            expect_shape("fc_in_bias", bias, &shape(&[d_ff * activation.inputs()]))?;
        }
        self.fc_out_bias.as_ref().map_or(Ok(()), |bias| expect_shape("fc_out_bias", bias, &shape(&[d_model])))
    }
}

/// One dense feed-forward network: the fixed branch of a residual MoE, a shared expert, or a dense layer.
#[derive(Debug, Clone)]
pub struct Mlp {
    weights: MlpWeights,
    activation: Activation,
    ops: Arc<dyn MoeOps>,
}

impl Mlp {
    /// A network with these weights.
    ///
    /// # Errors
    /// If a shape does not fit the others.
    pub fn new(weights: MlpWeights, activation: Activation) -> Result<Self> {
        let ops = default_ops(&weights.fc_in);
        Self::with_ops(weights, activation, ops)
    }

    /// The same with given operations.
    ///
    /// # Errors
    /// If a shape does not fit the others.
    pub fn with_ops(weights: MlpWeights, activation: Activation, ops: Arc<dyn MoeOps>) -> Result<Self> {
        weights.check(&[], activation)?;
        Ok(Self { weights, activation, ops })
    }

    /// The operations in use.
    pub(crate) fn ops(&self) -> &dyn MoeOps {
        &*self.ops
    }

    /// Applies the network to the last dimension.
    ///
    /// # Shapes
    /// `[.., d_model]` to `[.., d_model]`
    ///
    /// # Errors
    /// If the width differs from `d_model`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let w = &self.weights;
        let hidden = self.ops.linear(x, &w.fc_in, w.fc_in_bias.as_ref())?;
        let hidden = self.ops.activation(self.activation, &hidden)?;
        self.ops.linear(&hidden, &w.fc_out, w.fc_out_bias.as_ref())
    }
}

/// A stack of feed-forward experts, each of the form of [`Mlp`].
#[derive(Debug, Clone)]
pub struct ExpertMlps {
    weights: MlpWeights,
    activation: Activation,
    ops: Arc<dyn MoeOps>,
}

impl ExpertMlps {
    /// Experts with stacked weights `[experts, ..]`.
    ///
    /// # Errors
    /// If a shape does not fit the others or there is no expert.
    pub fn new(weights: MlpWeights, activation: Activation) -> Result<Self> {
        let ops = default_ops(&weights.fc_in);
        Self::with_ops(weights, activation, ops)
    }

    /// The same with given operations.
    ///
    /// # Errors
    /// If a shape does not fit the others or there is no expert.
    pub fn with_ops(weights: MlpWeights, activation: Activation, ops: Arc<dyn MoeOps>) -> Result<Self> {
        let experts = weights.fc_in.dims().first().copied().unwrap_or(0);
        if experts == 0 {
            return Err(Error::Config("num_experts must be at least 1, got 0".into()));
        }
        weights.check(&[experts], activation)?;
        Ok(Self { weights, activation, ops })
    }
}

impl Experts for ExpertMlps {
    fn num_experts(&self) -> usize {
        self.weights.fc_in.dims()[0]
    }

    fn forward(&self, rows: ExpertRows) -> Result<ExpertRows> {
        let (w, offsets) = (&self.weights, rows.offsets);
        let hidden = self.ops.grouped_linear(&rows.rows, &w.fc_in, w.fc_in_bias.as_ref(), &offsets)?;
        let hidden = self.ops.activation(self.activation, &hidden)?;
        let rows = self.ops.grouped_linear(&hidden, &w.fc_out, w.fc_out_bias.as_ref(), &offsets)?;
        Ok(ExpertRows { rows, offsets })
    }
}
