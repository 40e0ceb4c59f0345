//! Expert choice: each expert takes the tokens it scores highest.

use super::gate::softmax;
use super::select::{Decision, Demand, kept_scores, top_k_indices};
use super::{Gate, RouteContext, Router};
use crate::ops::host::to_f32_vec;
use crate::{Capacity, DROPPED, Result, RouterLosses, Routing, Weight, router_z_loss};
use candle_core::Tensor;

/// Settings of [`ExpertChoiceRouter`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertChoiceConfig {
    /// Mean experts per token; each expert takes `tokens * factor / experts` tokens, in training and evaluation alike.
    pub capacity_factor: f64,
}

/// Experts choose tokens: loads are even by construction, a token may get no expert or all.
///
/// A decision depends on the whole batch, later tokens included: fit for training and encoders, not for causal
/// generation.
///
/// # Source
/// Zhou et al. 2022 (2202.09368), section 3.2.
#[derive(Debug, Clone)]
pub struct ExpertChoiceRouter {
    gate: Gate,
    capacity: Capacity,
}

impl ExpertChoiceRouter {
    /// A router over `gate`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the factor is not a positive number.
    pub fn new(gate: Gate, config: ExpertChoiceConfig) -> Result<Self> {
        let factor = Some(config.capacity_factor);
        let capacity = Capacity { train_factor: factor, eval_factor: factor, min_capacity: 1 };
        capacity.validate()?;
        Ok(Self { gate, capacity })
    }

    /// Decides from logits `[tokens, num_experts]`.
    ///
    /// # Errors
    /// [`crate::Error::Input`] if the context does not fit.
    pub fn route_logits(&self, logits: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        let (tokens, experts) = self.gate.check_logits(logits)?;
        context.check(tokens)?;
        let probs = softmax(logits)?;
        let capacity = self.capacity.rows(context.is_train(), tokens, experts, 1).unwrap_or(tokens).min(tokens);

        // 1. Each expert's tokens, best first: the slot is the rank.
        let host = to_f32_vec(&probs)?;
        let mut per_token: Vec<Vec<(u32, u32)>> = vec![Vec::new(); tokens];
        let mut tokens_per_expert = vec![0; experts];
        for expert in 0..experts {
            let used = |t: usize| if context.is_used(t) { host[t * experts + expert] } else { f32::NEG_INFINITY };
            let scores: Vec<f32> = (0..tokens).map(used).collect();
            let takes = top_k_indices(&scores, capacity).into_iter().filter(|&t| context.is_used(t as usize));
            for (slot, token) in takes.enumerate() {
                per_token[token as usize].push((expert as u32, slot as u32));
                tokens_per_expert[expert] += 1;
            }
        }

        // 2. The same by token, as wide as the token with the most experts.
        let top_k = per_token.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let mut kept = vec![DROPPED; tokens * top_k];
        let mut slots = vec![0; tokens * top_k];
        for (token, choices) in per_token.iter().enumerate() {
            for (choice, &(expert, slot)) in choices.iter().enumerate() {
                kept[token * top_k + choice] = expert;
                slots[token * top_k + choice] = slot;
            }
        }
        let combine_weights = kept_scores(&probs, &kept, &kept, top_k)?;
        let demand = Demand { expert_ids: kept.clone(), top_k, tokens_per_expert };
        let losses = RouterLosses { load_balance: None, router_z: Some(router_z_loss(logits)?) };
        Ok(Decision { demand, kept, slots, capacity: Some(capacity), combine_weights, losses }.into_routing())
    }
}

impl Router for ExpertChoiceRouter {
    fn num_experts(&self) -> usize {
        self.gate.num_experts()
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![self.gate.weight()]
    }

    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        self.route_logits(&self.gate.logits(tokens)?, context)
    }
}
