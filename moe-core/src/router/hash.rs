//! Hash routing: the expert is a fixed random function of the vocabulary id.

use super::select::{Decision, Demand, slots_in_order};
use super::{RouteContext, Router};
use crate::{CounterRng, Error, Result, RouterLosses, Routing};
use candle_core::{DType, Tensor};

/// One expert per token by its vocabulary id, weight 1; nothing is learned, nothing dropped.
///
/// # Source
/// Roller et al. 2021 (2106.04426), random hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashRouter {
    num_experts: usize,
    seed: u64,
}

impl HashRouter {
    /// A router over `num_experts` experts; `seed` fixes the hash.
    ///
    /// # Errors
    /// [`Error::Config`] for 0 experts.
    pub fn new(num_experts: usize, seed: u64) -> Result<Self> {
        if num_experts == 0 {
            return Err(Error::Config("num_experts must be at least 1, got 0".into()));
        }
        Ok(Self { num_experts, seed })
    }

    /// The expert of a vocabulary id.
    pub fn expert_of(&self, token_id: u32) -> u32 {
        CounterRng::new(self.seed, u64::from(token_id)).below(self.num_experts as u32)
    }
}

impl Router for HashRouter {
    fn num_experts(&self) -> usize {
        self.num_experts
    }

    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        let num_tokens = tokens.dim(0)?;
        context.check(num_tokens)?;
        let ids =
            context.token_ids.ok_or_else(|| Error::Input("hash routing needs token_ids in the context".into()))?;
        let chosen = ids.iter().map(|&id| self.expert_of(id)).collect();
        let demand = Demand::new(chosen, 1, self.num_experts, context);
        let kept = demand.expert_ids.clone();
        let slots = slots_in_order(&kept, self.num_experts, 0..num_tokens);
        let ones = kept.iter().map(|&e| if e == crate::DROPPED { 0f32 } else { 1.0 }).collect::<Vec<_>>();
        let dtype = if tokens.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let combine_weights = Tensor::from_vec(ones, (num_tokens, 1), tokens.device())?.to_dtype(dtype)?;
        let losses = RouterLosses::default();
        Ok(Decision { demand, kept, slots, capacity: None, combine_weights, losses }.into_routing())
    }
}
