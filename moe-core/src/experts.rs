//! Experts: the feed-forward networks behind a router, stacked; and the same network alone.

use crate::ops::host::expect_shape;
use crate::ops::{CandleOps, MoeOps, Ops};
use crate::{Activation, Error, ExpertRows, MlpConfig, ParamSpec, Result, Weight, WeightSource, WeightUse};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use std::sync::Arc;

/// Applies each expert to its rows.
pub trait Experts {
    /// Experts held here; no more than the router chooses among.
    fn num_experts(&self) -> usize;

    /// What they multiply with; by default nothing.
    fn weights(&self) -> Vec<&Weight> {
        Vec::new()
    }

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
    pub fc_in: Weight,
    /// `[d_ff * activation.inputs()]`
    pub fc_in_bias: Option<Tensor>,
    /// `[d_model, d_ff]`
    pub fc_out: Weight,
    /// `[d_model]`
    pub fc_out_bias: Option<Tensor>,
}

impl MlpWeights {
    /// The weights of one network below the prefix of `vb`, kept as `ops` keeps them; or of `stack` of them.
    fn fetch(config: &MlpConfig, stack: Option<usize>, vb: &VarBuilder<'_>, ops: &dyn MoeOps) -> Result<Self> {
        let stacked = |spec: ParamSpec| match stack {
            Some(experts) => spec.stacked(experts),
            None => spec,
        };
        let weight = |spec: ParamSpec| ops.weight(&WeightSource::new(vb, &stacked(spec)), WeightUse::Product);
        let bias = |spec: Option<ParamSpec>| spec.map(|spec| stacked(spec).get(vb)).transpose();
        Ok(Self {
            fc_in: weight(config.fc_in())?,
            fc_in_bias: bias(config.fc_in_bias())?,
            fc_out: weight(config.fc_out())?,
            fc_out_bias: bias(config.fc_out_bias())?,
        })
    }

    fn check(&self, stack: &[usize], activation: Activation) -> Result<()> {
        let dims = self.fc_out.dims();
        if dims.len() != stack.len() + 2 || dims[..stack.len()] != *stack {
            return Err(Error::Config(format!("fc_out must be {stack:?} x [d_model, d_ff], got {dims:?}")));
        }
        let (d_model, d_ff) = (dims[stack.len()], dims[stack.len() + 1]);
        let shape = |tail: &[usize]| [stack, tail].concat();
        let inner = d_ff * activation.inputs();
        if self.fc_in.dims() != shape(&[inner, d_model]) {
            let (want, got) = (shape(&[inner, d_model]), self.fc_in.dims());
            return Err(Error::Config(format!("fc_in must have shape {want:?}, got {got:?}")));
        }
        if let Some(bias) = &self.fc_in_bias {
            expect_shape("fc_in_bias", bias, &shape(&[inner]))?;
        }
        self.fc_out_bias.as_ref().map_or(Ok(()), |bias| expect_shape("fc_out_bias", bias, &shape(&[d_model])))
    }
}

/// One dense feed-forward network: the fixed branch of a residual MoE, a shared expert, or a dense layer.
#[derive(Debug, Clone)]
pub struct Mlp {
    weights: MlpWeights,
    activation: Activation,
    ops: Arc<dyn Ops>,
}

impl Mlp {
    /// A network whose parameters lie under `vb`.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn new(config: &MlpConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        Self::of(MlpWeights::fetch(config, None, &vb, &*ops)?, config.activation, ops)
    }

    /// A network with these weights, in ordinary candle operations.
    ///
    /// # Errors
    /// If a shape does not fit the others.
    pub fn from_weights(weights: MlpWeights, activation: Activation) -> Result<Self> {
        Self::of(weights, activation, Arc::new(CandleOps))
    }

    /// A network with these weights and operations.
    ///
    /// # Errors
    /// If a shape does not fit the others.
    pub fn of(weights: MlpWeights, activation: Activation, ops: Arc<dyn Ops>) -> Result<Self> {
        weights.check(&[], activation)?;
        Ok(Self { weights, activation, ops })
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        vec![&self.weights.fc_in, &self.weights.fc_out]
    }

    /// The operations in use.
    pub(crate) fn ops(&self) -> &dyn Ops {
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
        self.ops.mlp(x, &self.weights, self.activation)
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
    /// `num_experts` experts whose parameters lie under `vb`, stacked or one by one.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape, or there is no expert.
    pub fn new(config: &MlpConfig, num_experts: usize, vb: &VarBuilder<'_>, ops: Arc<dyn MoeOps>) -> Result<Self> {
        Self::of(MlpWeights::fetch(config, Some(num_experts), vb, &*ops)?, config.activation, ops)
    }

    /// Experts with stacked weights `[experts, ..]`, in ordinary candle operations.
    ///
    /// # Errors
    /// If a shape does not fit the others or there is no expert.
    pub fn from_weights(weights: MlpWeights, activation: Activation) -> Result<Self> {
        Self::of(weights, activation, Arc::new(CandleOps))
    }

    /// The same with given operations.
    ///
    /// # Errors
    /// If a shape does not fit the others or there is no expert.
    pub fn of(weights: MlpWeights, activation: Activation, ops: Arc<dyn MoeOps>) -> Result<Self> {
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

    fn weights(&self) -> Vec<&Weight> {
        vec![&self.weights.fc_in, &self.weights.fc_out]
    }

    fn forward(&self, rows: ExpertRows) -> Result<ExpertRows> {
        let ExpertRows { rows, offsets } = rows;
        let rows = self.ops.experts(&rows, &self.weights, self.activation, &offsets)?;
        Ok(ExpertRows { rows, offsets })
    }
}
