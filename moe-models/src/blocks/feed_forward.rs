//! [`FeedForward`]: the part of a layer that looks at each token alone.

use crate::Result;
use crate::config::FeedForwardConfig;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use moe_core::{Mlp, MoeBlock, MoeOutput, Ops, RouteContext, Weight};
use moe_parallel::RankDispatcher;
use std::sync::Arc;

/// One network for all tokens, or routed experts.
#[derive(Debug)]
pub enum FeedForward {
    /// One network.
    Dense(Mlp),
    /// Experts.
    Moe(MoeBlock<RankDispatcher>),
}

impl FeedForward {
    /// The part whose parameters lie under `vb`; `dispatcher` takes tokens to the experts of as many as it is asked for.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn new(
        config: &FeedForwardConfig,
        vb: VarBuilder<'_>,
        ops: Arc<dyn Ops>,
        dispatcher: impl FnOnce(usize) -> Result<RankDispatcher>,
    ) -> Result<Self> {
        Ok(match config {
            FeedForwardConfig::Dense(mlp) => Self::Dense(Mlp::new(mlp, vb, ops)?),
            FeedForwardConfig::Moe(moe) => {
                Self::Moe(MoeBlock::with_dispatcher(moe, vb, ops, dispatcher(moe.num_experts)?)?)
            }
        })
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        match self {
            Self::Dense(mlp) => mlp.weights(),
            Self::Moe(moe) => moe.weights(),
        }
    }

    /// `[tokens, d_model]` to the same; the second value is there for experts.
    ///
    /// # Errors
    /// If a part refuses the input.
    pub fn forward(&self, x: &Tensor, context: &RouteContext<'_>) -> Result<(Tensor, Option<MoeOutput>)> {
        let output = match self {
            Self::Dense(mlp) => return Ok((mlp.forward(x)?, None)),
            Self::Moe(moe) => moe.forward(x, context)?,
        };
        Ok((output.hidden.clone(), Some(output)))
    }
}
