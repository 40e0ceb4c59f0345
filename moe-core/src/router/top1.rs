//! DeepSpeed's top-1 gating: one expert per token, its raw probability as weight, random token selection.

use super::gate::softmax;
use super::infer::infer;
use super::select::{Decision, Demand, argmax, kept_scores, slots_in_order};
use super::{DroplessConfig, Gate, Mode, RouteContext, Router};
use crate::ops::host::to_f32_vec;
use crate::{Capacity, Result, RouterLosses, Routing, Weight, load_balance_loss, router_z_loss};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Noise on the gate, in training only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoisyGate {
    /// The gate's input times a uniform value in `[0.99, 1.01)`, element by element.
    Jitter,
    /// The expert is the argmax of logits plus Gumbel noise; weights and loss use the clean probabilities (top-1 only).
    RSample,
}

/// Half-width of the jitter interval.
pub(super) const JITTER_EPSILON: f32 = 0.01;

/// Settings of [`Top1Router`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Top1Config {
    /// Rows an expert takes.
    pub capacity: Capacity,
    /// Random token selection: under pressure each expert keeps a random subset; else the first tokens come first.
    pub use_rts: bool,
    /// Noise on the gate.
    pub noisy_gate: Option<NoisyGate>,
}

impl Default for Top1Config {
    fn default() -> Self {
        Self { capacity: Capacity::DEEPSPEED, use_rts: true, noisy_gate: None }
    }
}

/// One expert per token.
///
/// # Source
/// DeepSpeed `top1gating` (PAPER: section 3, top-1 gating). Differs: without random token selection the first tokens of
/// an expert are kept, where the original leaves the choice among equals to its `topk`; a batch smaller than
/// `min_capacity` is accepted.
#[derive(Debug, Clone)]
pub struct Top1Router {
    gate: Gate,
    config: Top1Config,
}

impl Top1Router {
    /// A router over `gate`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the capacity is not valid.
    pub fn new(gate: Gate, config: Top1Config) -> Result<Self> {
        config.capacity.validate()?;
        Ok(Self { gate, config })
    }

    /// Decides from logits `[tokens, num_experts]`.
    ///
    /// # Errors
    /// [`crate::Error::Input`] if the context does not fit.
    pub fn route_logits(&self, logits: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        let (tokens, experts) = self.gate.check_logits(logits)?;
        context.check(tokens)?;
        let probs = softmax(logits)?;

        // 1. Each token's expert.
        let mut scores = to_f32_vec(&probs)?;
        if context.is_train() && self.config.noisy_gate == Some(NoisyGate::RSample) {
            let gumbel = context.noise.gumbel(tokens, experts);
            scores = to_f32_vec(logits)?.iter().zip(gumbel).map(|(z, g)| z + g).collect();
        }
        let chosen = scores.chunks_exact(experts).map(argmax).collect();
        let demand = Demand::new(chosen, 1, experts, context);

        // 2. Which of them an expert keeps.
        let capacity = self.config.capacity.rows(context.is_train(), tokens, experts, 1);
        let draws =
            if self.config.use_rts && capacity.is_some() { context.noise.uniform(tokens, experts) } else { vec![] };
        let rank =
            |token: usize| draws.get(token * experts + demand.expert_ids[token] as usize).copied().unwrap_or(1.0);
        let kept = demand.keep_first(&demand.ranked_by(rank), capacity);
        let slots = slots_in_order(&kept, experts, 0..tokens);

        // 3. Weights and losses.
        let combine_weights = kept_scores(&probs, &demand.expert_ids, &kept, 1)?;
        let losses = RouterLosses {
            load_balance: Some(load_balance_loss(&probs, &demand.expert_ids, 1)?),
            router_z: Some(router_z_loss(logits)?),
        };
        Ok(Decision { demand, kept, slots, capacity, combine_weights, losses }.into_routing())
    }
}

impl Router for Top1Router {
    fn num_experts(&self) -> usize {
        self.gate.num_experts()
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![self.gate.weight()]
    }

    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        if context.mode == Mode::Infer {
            return infer(&self.gate, tokens, None, &DroplessConfig::softmax(1, false), context);
        }
        let jitter = self.config.noisy_gate == Some(NoisyGate::Jitter);
        let logits = self.gate.logits(&jittered(tokens, context, jitter)?)?;
        self.route_logits(&logits, context)
    }
}

/// The gate's copy of the tokens, with jitter when training.
pub(super) fn jittered(tokens: &Tensor, context: &RouteContext<'_>, jitter: bool) -> Result<Tensor> {
    if !(jitter && context.is_train()) {
        return Ok(tokens.clone());
    }
    let (rows, cols) = tokens.dims2()?;
    let factors = context.noise.jitter(rows, cols, JITTER_EPSILON);
    Ok((tokens * Tensor::from_vec(factors, (rows, cols), tokens.device())?.to_dtype(tokens.dtype())?)?)
}
