//! [`MoeBlock`]: an MoE layer of any kind, built from its configuration.

use crate::config::{RESIDUAL_MLP, SHARED_EXPERT};
use crate::ops::{MoeOps, Ops};
use crate::{
    BranchConfig, Dispatcher, DroplessRouter, ExpertMlps, Gate, LocalDispatcher, Mlp, MoeConfig, MoeLayer, MoeOutput,
    ParamSpec, ResidualMoe, Result, RouteContext, Router, RouterConfig, SharedExpertMoe, Top1Router, Top2Router,
    TopKRouter, Weight, WeightSource, WeightUse,
};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use std::sync::Arc;

/// The routed part of a [`MoeBlock`].
pub type Routed<D> = MoeLayer<Box<dyn Router>, D, ExpertMlps>;

/// A standard MoE layer, or one with a branch beside its experts.
#[derive(Debug)]
pub enum MoeBlock<D = LocalDispatcher> {
    /// The experts alone.
    Plain(Routed<D>),
    /// Mixed with a fixed network.
    Residual(ResidualMoe<Box<dyn Router>, D, ExpertMlps>),
    /// Added to a shared expert.
    Shared(SharedExpertMoe<Box<dyn Router>, D, ExpertMlps>),
}

impl MoeBlock {
    /// A layer whose parameters lie under `vb`, with all its experts here.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an impossible configuration; if a parameter is missing or has another shape.
    pub fn new(config: &MoeConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let dispatcher = LocalDispatcher::new(Arc::clone(&ops) as Arc<dyn MoeOps>);
        Self::with_dispatcher(config, vb, ops, dispatcher)
    }
}

impl<D: Dispatcher> MoeBlock<D> {
    /// A layer whose parameters lie under `vb`, with those of its experts here that `dispatcher` says.
    ///
    /// # Errors
    /// As [`MoeBlock::new`].
    pub fn with_dispatcher(config: &MoeConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>, dispatcher: D) -> Result<Self> {
        config.validate()?;
        let held = dispatcher.num_local_experts(config.num_experts);
        let experts = ExpertMlps::new(&config.expert, held, &vb, Arc::clone(&ops) as Arc<dyn MoeOps>)?;
        let routed = MoeLayer::new(router(config, &vb, &ops)?, dispatcher, experts)?;
        Ok(match config.branch {
            BranchConfig::None => Self::Plain(routed),
            BranchConfig::Residual(mlp) => {
                let mlp = Mlp::new(&mlp, vb.pp(RESIDUAL_MLP), Arc::clone(&ops))?;
                let [weight, bias] = config.coefficient();
                Self::Residual(ResidualMoe::new(routed, mlp, gate_weight(&weight, &vb, &ops)?, bias.get(&vb)?)?)
            }
            BranchConfig::Shared { mlp, gate } => {
                let mlp = Mlp::new(&mlp, vb.pp(SHARED_EXPERT), Arc::clone(&ops))?;
                let gate = gate.then(|| gate_weight(&config.shared_expert_gate(), &vb, &ops)).transpose()?;
                Self::Shared(SharedExpertMoe::new(routed, mlp, gate)?)
            }
        })
    }

    /// Sends each token through its experts and the branch.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// If a part refuses the input.
    pub fn forward(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<MoeOutput> {
        match self {
            Self::Plain(moe) => moe.forward(tokens, context),
            Self::Residual(moe) => moe.forward(tokens, context),
            Self::Shared(moe) => moe.forward(tokens, context),
        }
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        match self {
            Self::Plain(moe) => moe.weights(),
            Self::Residual(moe) => moe.weights(),
            Self::Shared(moe) => moe.weights(),
        }
    }
}

fn gate_weight(spec: &ParamSpec, vb: &VarBuilder<'_>, ops: &Arc<dyn Ops>) -> Result<Weight> {
    ops.weight(&WeightSource::new(vb, spec), WeightUse::Gate)
}

fn router(config: &MoeConfig, vb: &VarBuilder<'_>, ops: &Arc<dyn Ops>) -> Result<Box<dyn Router>> {
    let gate = Gate::with_ops(gate_weight(&config.gate(), vb, ops)?, Arc::clone(ops) as Arc<dyn MoeOps>)?;
    Ok(match config.router {
        RouterConfig::Top1(config) => Box::new(Top1Router::new(gate, config)?),
        RouterConfig::Top2(config) => Box::new(Top2Router::new(gate, config)?),
        RouterConfig::TopK(config) => Box::new(TopKRouter::new(gate, config)?),
        RouterConfig::Dropless { config: policy, .. } => {
            let bias = config.selection_bias().map(|spec| spec.get(vb)).transpose()?;
            Box::new(DroplessRouter::new(gate, bias, policy)?)
        }
    })
}
