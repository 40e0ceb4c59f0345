//! DeepSpeed's top-k gating with its two drop policies.

use super::gate::softmax;
use super::infer::infer;
use super::select::{Decision, Demand, kept_scores, normalized, slots_in_order, top_k_indices};
use super::top1::jittered;
use super::{DroplessConfig, Gate, Mode, RouteContext, Router};
use crate::ops::host::to_f32_vec;
use crate::{Capacity, Error, Result, RouterLosses, Routing, Weight, load_balance_loss, router_z_loss};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Which routes an expert over capacity keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropPolicy {
    /// Those with the highest probability.
    #[default]
    Probs,
    /// Those of the earliest tokens.
    Position,
}

/// Settings of [`TopKRouter`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopKConfig {
    /// Experts per token.
    pub top_k: usize,
    /// Rows an expert takes; the factor is multiplied by `top_k`.
    pub capacity: Capacity,
    /// Which routes are dropped.
    pub drop_policy: DropPolicy,
    /// Jitter on the gate's input, in training only.
    pub jitter: bool,
}

/// `k` experts per token, weights renormalised over the kept routes.
///
/// # Source
/// DeepSpeed `topkgating` as of August 2026 (probabilities are ranked, not raw logits).
#[derive(Debug, Clone)]
pub struct TopKRouter {
    gate: Gate,
    config: TopKConfig,
}

impl TopKRouter {
    /// A router over `gate`.
    ///
    /// # Errors
    /// [`Error::Config`] if `top_k` is 0 or more than the experts, or the capacity is not valid.
    pub fn new(gate: Gate, config: TopKConfig) -> Result<Self> {
        config.capacity.validate()?;
        check_top_k(config.top_k, gate.num_experts())?;
        Ok(Self { gate, config })
    }

    /// Decides from logits `[tokens, num_experts]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the context does not fit.
    pub fn route_logits(&self, logits: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        let (tokens, experts) = self.gate.check_logits(logits)?;
        let top_k = self.config.top_k;
        context.check(tokens)?;
        let probs = softmax(logits)?;

        // 1. The k largest logits of each token.
        let chosen = to_f32_vec(logits)?.chunks_exact(experts).flat_map(|row| top_k_indices(row, top_k)).collect();
        let demand = Demand::new(chosen, top_k, experts, context);

        // 2. Drops; slots always follow the order of tokens.
        let capacity = self.config.capacity.rows(context.is_train(), tokens, experts, top_k);
        let host_probs = to_f32_vec(&probs)?;
        let rank = |choice: usize| match self.config.drop_policy {
            DropPolicy::Probs => host_probs[choice / top_k * experts + demand.expert_ids[choice] as usize],
            DropPolicy::Position => 0.0,
        };
        let kept = demand.keep_first(&demand.ranked_by(rank), capacity);
        let slots = slots_in_order(&kept, experts, 0..tokens * top_k);

        // 3. Weights renormalised over what was kept.
        let weights = kept_scores(&probs, &demand.expert_ids, &kept, top_k)?;
        let losses = RouterLosses {
            load_balance: Some(load_balance_loss(&probs, &demand.expert_ids, top_k)?),
            router_z: Some(router_z_loss(logits)?),
        };
        let combine_weights = normalized(&weights, f64::from(f32::EPSILON))?;
        Ok(Decision { demand, kept, slots, capacity, combine_weights, losses }.into_routing())
    }
}

pub(super) fn check_top_k(top_k: usize, num_experts: usize) -> Result<()> {
    if top_k == 0 || top_k > num_experts {
        return Err(Error::Config(format!(
            "top_k must be between 1 and the number of experts ({num_experts}), got {top_k}"
        )));
    }
    Ok(())
}

impl Router for TopKRouter {
    fn num_experts(&self) -> usize {
        self.gate.num_experts()
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![self.gate.weight()]
    }

    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        if context.mode == Mode::Infer {
            return infer(&self.gate, tokens, None, &DroplessConfig::softmax(self.config.top_k, true), context);
        }
        let logits = self.gate.logits(&jittered(tokens, context, self.config.jitter)?)?;
        self.route_logits(&logits, context)
    }
}
