//! DeepSpeed's (GShard's) top-2 gating: first choices outrank second ones, weights renormalised after dropping.

use super::gate::softmax;
use super::infer::infer;
use super::select::{Decision, Demand, argmax, kept_scores, normalized, slots_in_order};
use super::top1::jittered;
use super::{DroplessConfig, Gate, Mode, RouteContext, Router};
use crate::ops::host::to_f32_vec;
use crate::{Capacity, Error, Result, RouterLosses, Routing, Weight, load_balance_loss, router_z_loss};
use candle_core::Tensor;

/// Settings of [`Top2Router`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Top2Config {
    /// Rows an expert takes; the factor is doubled for the two choices.
    pub capacity: Capacity,
    /// Draw the second expert with Gumbel noise, in evaluation too; else the second largest logit.
    pub sample_second_expert: bool,
    /// Jitter on the gate's input, in training only.
    pub jitter: bool,
}

impl Default for Top2Config {
    fn default() -> Self {
        Self { capacity: Capacity::DEEPSPEED, sample_second_expert: true, jitter: false }
    }
}

/// Two experts per token.
///
/// # Source
/// DeepSpeed `top2gating`. The loss counts first choices only; slots follow all first choices of an expert, dropped or
/// not. Differs: the caller's logits are not changed.
#[derive(Debug, Clone)]
pub struct Top2Router {
    gate: Gate,
    config: Top2Config,
}

impl Top2Router {
    /// A router over `gate`.
    ///
    /// # Errors
    /// [`Error::Config`] if there are fewer than two experts or the capacity is not valid.
    pub fn new(gate: Gate, config: Top2Config) -> Result<Self> {
        config.capacity.validate()?;
        if gate.num_experts() < 2 {
            return Err(Error::Config("top-2 routing needs at least 2 experts, got 1; use top_k 1".into()));
        }
        Ok(Self { gate, config })
    }

    /// Decides from logits `[tokens, num_experts]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the context does not fit.
    pub fn route_logits(&self, logits: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        let (tokens, experts) = self.gate.check_logits(logits)?;
        context.check(tokens)?;
        let probs = softmax(logits)?;

        // 1. First and second choices.
        let mut second_scores = to_f32_vec(logits)?;
        if self.config.sample_second_expert {
            let gumbel = context.noise.gumbel(tokens, experts);
            second_scores.iter_mut().zip(gumbel).for_each(|(z, g)| *z += g);
        }
        let mut chosen = Vec::with_capacity(tokens * 2);
        for (probs, others) in to_f32_vec(&probs)?.chunks_exact(experts).zip(second_scores.chunks_exact_mut(experts)) {
            let first = argmax(probs);
            others[first as usize] = f32::NEG_INFINITY;
            let second = argmax(others);
            chosen.extend([first, if second == first { (first + 1) % experts as u32 } else { second }]);
        }
        let first_choices: Vec<u32> = chosen.iter().step_by(2).copied().collect();
        let demand = Demand::new(chosen, 2, experts, context);
        let first_choices = Demand::new(first_choices, 1, experts, context).expert_ids;

        // 2. First choices outrank second ones, earlier tokens later ones.
        let capacity = self.config.capacity.rows(context.is_train(), tokens, experts, 2);
        let order = || (0..tokens).map(|t| 2 * t).chain((0..tokens).map(|t| 2 * t + 1));
        let mut lists = vec![Vec::new(); experts];
        for choice in order().filter(|&c| demand.expert_ids[c] != crate::DROPPED) {
            lists[demand.expert_ids[choice] as usize].push(choice);
        }
        let kept = demand.keep_first(&lists, capacity);
        let slots = slots_in_order(&kept, experts, order());

        // 3. Weights renormalised over what was kept.
        let weights = kept_scores(&probs, &demand.expert_ids, &kept, 2)?;
        let losses = RouterLosses {
            load_balance: Some(load_balance_loss(&probs, &first_choices, 1)?),
            router_z: Some(router_z_loss(logits)?),
        };
        let combine_weights = normalized(&weights, f64::from(f32::EPSILON))?;
        Ok(Decision { demand, kept, slots, capacity, combine_weights, losses }.into_routing())
    }
}

impl Router for Top2Router {
    fn num_experts(&self) -> usize {
        self.gate.num_experts()
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![self.gate.weight()]
    }

    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        if context.mode == Mode::Infer {
            return infer(&self.gate, tokens, None, &DroplessConfig::softmax(2, true), context);
        }
        let logits = self.gate.logits(&jittered(tokens, context, self.config.jitter)?)?;
        self.route_logits(&logits, context)
    }
}
