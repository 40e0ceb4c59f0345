//! SparseMixer-v2, the routing of Phi-3.5-MoE: two experts one after the other, each weighed by a softmax over those whose logits
//! are near the best; in training both are drawn.

use super::gate::softmax;
use super::select::{Decision, Demand, argmax, kept_scores, slots_in_order};
use super::{Gate, Mode, RouteContext, Router};
use crate::loss::load_balance_loss;
use crate::ops::host::to_f32_vec;
use crate::{Error, Result, RouterLosses, Routing, Weight, router_z_loss};
use candle_core::Tensor;

/// Settings of [`SparseMixerRouter`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseMixerConfig {
    /// An expert takes part in a choice if its logit is below the best by no more than twice this share of the larger of its own
    /// magnitude and the best (`router_jitter_noise`).
    pub jitter_eps: f64,
    /// In training, what the experts and the gate see is multiplied twice by draws around 1 within this (`input_jitter_noise`).
    pub input_jitter: f64,
}

impl SparseMixerConfig {
    /// Experts per token.
    pub const TOP_K: usize = 2;

    /// Refuses settings that no layer can have.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("router_jitter_noise", self.jitter_eps), ("input_jitter_noise", self.input_jitter)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::Config(format!("{name} must be at least 0 and below 1, got {value}")));
            }
        }
        Ok(())
    }
}

/// Two experts per token, none dropped.
///
/// # Source
/// GRIN (2409.12136), section 2; transformers 5.23 `models/phimoe`, whose gradient of a drawn expert's weight (Heun's third order)
/// this has: that of the softmax, while a quarter of the draws that are not the best enter with all of their weight and the others
/// with a third of it.
#[derive(Debug, Clone)]
pub struct SparseMixerRouter {
    gate: Gate,
    config: SparseMixerConfig,
}

/// Factor on the weight of a draw that is not the best, and the share of such draws that it is for.
const THIRD: f64 = 0.3333;
const FULL_ABOVE: f32 = 0.75;

/// One of the two choices of every token.
struct Choice {
    expert_ids: Vec<u32>,
    /// `[tokens, experts]`: 0, or minus infinity for who takes no part.
    mask: Vec<f32>,
    /// Of each token, whether its expert is the best.
    is_best: Vec<bool>,
}

impl SparseMixerRouter {
    /// A router over `gate`.
    ///
    /// # Errors
    /// [`Error::Config`] if there are fewer than two experts or a setting is not valid.
    pub fn new(gate: Gate, config: SparseMixerConfig) -> Result<Self> {
        config.validate()?;
        if gate.num_experts() < SparseMixerConfig::TOP_K {
            return Err(Error::Config("sparsemixer needs at least 2 experts, got 1".into()));
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
        let scores = to_f32_vec(logits)?;

        // 1. Both choices; the second is among those the first leaves.
        let draws = context.is_train().then(|| context.noise.gumbel(tokens, 2 * experts));
        let drawn = |choice: usize, token: usize| {
            draws.as_ref().map(|draws| &draws[(2 * token + choice) * experts..][..experts])
        };
        let first = self.choose(&scores, experts, None, |token| drawn(0, token));
        let second = self.choose(&scores, experts, Some(&first.expert_ids), |token| drawn(1, token));
        let chosen = first.expert_ids.iter().zip(&second.expert_ids).flat_map(|(&a, &b)| [a, b]).collect();
        let demand = Demand::new(chosen, SparseMixerConfig::TOP_K, experts, context);
        let kept = demand.expert_ids.clone();
        let slots = slots_in_order(&kept, experts, 0..kept.len());

        // 2. Their weights.
        let halves = context.is_train().then(|| context.noise.uniform(tokens, 2));
        let weights = [first, second].into_iter().enumerate().map(|(index, choice)| {
            let factor = |(&u, &best): (&f32, &bool)| if best || u > FULL_ABOVE { 1.0 } else { THIRD };
            let of_choice =
                |halves: &Vec<f32>| halves.iter().skip(index).step_by(2).zip(&choice.is_best).map(factor).collect();
            let factors = halves.as_ref().map(of_choice);
            let own: Vec<u32> = kept.iter().skip(index).step_by(2).copied().collect();
            weight(logits, choice, &own, factors)
        });
        let combine_weights = Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, 1)?;

        let losses = match context.mode {
            Mode::Infer => RouterLosses::default(),
            Mode::Train | Mode::Eval => RouterLosses {
                load_balance: Some(load_balance_loss(&softmax(logits)?, &kept, SparseMixerConfig::TOP_K)?),
                router_z: Some(router_z_loss(logits)?),
            },
        };
        Ok(Decision { demand, kept, slots, capacity: None, combine_weights, losses }.into_routing())
    }

    /// For each token the best of those that take part, or the best once `draws` are added.
    fn choose<'a>(
        &self,
        scores: &[f32],
        experts: usize,
        taken: Option<&[u32]>,
        draws: impl Fn(usize) -> Option<&'a [f32]>,
    ) -> Choice {
        let (mut expert_ids, mut is_best) = (Vec::new(), Vec::new());
        let mut mask = Vec::with_capacity(scores.len());
        let least = (2.0 * self.config.jitter_eps) as f32;
        for (token, scores) in scores.chunks_exact(experts).enumerate() {
            let mut left = scores.to_vec();
            if let Some(taken) = taken {
                left[taken[token] as usize] = f32::NEG_INFINITY;
            }
            let best = argmax(&left);
            let top = left[best as usize];
            for (score, left) in scores.iter().zip(&mut left) {
                if (top - score) / score.abs().max(top) > least {
                    *left = f32::NEG_INFINITY;
                }
            }
            mask.extend(left.iter().map(|v| if *v == f32::NEG_INFINITY { f32::NEG_INFINITY } else { 0.0 }));
            if let Some(draws) = draws(token) {
                left.iter_mut().zip(draws).for_each(|(score, draw)| *score += draw);
            }
            let chosen = argmax(&left);
            expert_ids.push(chosen);
            is_best.push(chosen == best);
        }
        Choice { expert_ids, mask, is_best }
    }
}

/// The weight of each token's expert, `[tokens, 1]`; `factors` change its value and not its gradient.
fn weight(logits: &Tensor, choice: Choice, kept: &[u32], factors: Option<Vec<f64>>) -> Result<Tensor> {
    let mask = Tensor::from_vec(choice.mask, logits.shape(), logits.device())?.to_dtype(logits.dtype())?;
    let probs = softmax(&(logits + mask)?)?;
    let weight = kept_scores(&probs, &choice.expert_ids, kept, 1)?;
    let Some(factors) = factors else { return Ok(weight) };
    let off: Vec<f64> = factors.into_iter().map(|factor| factor - 1.0).collect();
    let off = Tensor::from_vec(off, weight.shape(), logits.device())?.to_dtype(weight.dtype())?;
    Ok((&weight + (weight.detach() * off)?)?)
}

impl Router for SparseMixerRouter {
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
