//! [`Routing`]: what a router decided, as a value; and the arithmetic of capacity and load.

use crate::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Marks a choice that was dropped (no capacity, or no choice at all) in [`Routing::expert_ids`].
pub const DROPPED: u32 = u32::MAX;

/// Which experts each token goes to, with which weights, and what that cost.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Tokens routed.
    pub num_tokens: usize,
    /// Experts to choose from.
    pub num_experts: usize,
    /// Choices per token (for expert choice: the most experts that took one token).
    pub top_k: usize,
    /// Chosen experts, `[tokens, top_k]` row by row; [`DROPPED`] where a choice was dropped.
    pub expert_ids: Vec<u32>,
    /// Position of each choice among its expert's kept rows, `[tokens, top_k]`; 0 where dropped.
    pub slots: Vec<u32>,
    /// Factors applied in combine, `[tokens, top_k]`, 0 where dropped. Carries the gradient to the gate.
    pub combine_weights: Tensor,
    /// Rows an expert can take, where there is a limit.
    pub capacity: Option<usize>,
    /// Demand and drops.
    pub load: ExpertLoad,
    /// Auxiliary losses, unscaled.
    pub losses: RouterLosses,
}

/// Auxiliary losses of one routing, unscaled; each is a scalar with its graph.
#[derive(Debug, Clone, Default)]
pub struct RouterLosses {
    /// [`crate::load_balance_loss`], where the policy has one.
    pub load_balance: Option<Tensor>,
    /// [`crate::router_z_loss`].
    pub router_z: Option<Tensor>,
}

/// How the routes of one call spread over the experts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertLoad {
    /// Demand before any drop, `[num_experts]`.
    pub tokens_per_expert: Vec<u32>,
    /// Routes dropped for lack of capacity.
    pub dropped: u32,
}

impl ExpertLoad {
    /// Routes demanded in all.
    pub fn routes(&self) -> u64 {
        self.tokens_per_expert.iter().map(|&c| u64::from(c)).sum()
    }

    /// Load of the busiest expert over the mean load (1 is even); 0 without routes.
    pub fn imbalance(&self) -> f64 {
        let routes = self.routes();
        if routes == 0 {
            return 0.0;
        }
        let max = self.tokens_per_expert.iter().copied().max().unwrap_or(0);
        f64::from(max) * self.tokens_per_expert.len() as f64 / routes as f64
    }

    /// Dropped routes over demanded routes; 0 without routes.
    pub fn drop_rate(&self) -> f64 {
        let routes = self.routes();
        if routes == 0 { 0.0 } else { f64::from(self.dropped) / routes as f64 }
    }

    /// Adds the counts of another call over the same experts.
    pub fn add(&mut self, other: &Self) {
        self.tokens_per_expert.resize(self.tokens_per_expert.len().max(other.tokens_per_expert.len()), 0);
        for (sum, count) in self.tokens_per_expert.iter_mut().zip(&other.tokens_per_expert) {
            *sum += count;
        }
        self.dropped += other.dropped;
    }
}

/// How many rows an expert takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Factor over the even share when training; `None` drops nothing.
    pub train_factor: Option<f64>,
    /// Factor over the even share otherwise; `None` drops nothing.
    pub eval_factor: Option<f64>,
    /// Least capacity, in rows.
    pub min_capacity: usize,
}

impl Capacity {
    /// DeepSpeed's defaults: factors 1.0 and 1.0, at least 4 rows.
    pub const DEEPSPEED: Self = Self { train_factor: Some(1.0), eval_factor: Some(1.0), min_capacity: 4 };
    /// No limit.
    pub const UNLIMITED: Self = Self { train_factor: None, eval_factor: None, min_capacity: 0 };

    /// Rows per expert for `num_tokens` tokens of `top_k` choices, or `None` without limit.
    pub fn rows(&self, train: bool, num_tokens: usize, num_experts: usize, top_k: usize) -> Option<usize> {
        let factor = if train { self.train_factor } else { self.eval_factor };
        factor.map(|f| capacity_rows(num_tokens, num_experts, f * top_k as f64, self.min_capacity))
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if a factor is not a positive number.
    pub fn validate(&self) -> Result<()> {
        for (name, factor) in [("train", self.train_factor), ("eval", self.eval_factor)] {
            if factor.is_some_and(|f| !(f > 0.0 && f.is_finite())) {
                return Err(crate::Error::Config(format!(
                    "{name} capacity factor must be a positive number, got {factor:?}; leave it out to drop nothing"
                )));
            }
        }
        Ok(())
    }
}

/// `max(ceil(num_tokens / num_experts * factor), min_capacity)`, in the original's single precision.
///
/// # Source
/// DeepSpeed `_capacity`; the factor is an f32 there, and so it is here: 10 * 1.1 is 11 and not 12.
pub fn capacity_rows(num_tokens: usize, num_experts: usize, factor: f64, min_capacity: usize) -> usize {
    let share = (num_tokens as f64 / num_experts as f64) as f32;
    ((share * factor as f32).ceil() as usize).max(min_capacity)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The executed values of the reference's `_capacity`.
    #[test]
    fn capacity_matches_the_reference() {
        for (tokens, experts, factor, min, want) in [
            (10, 3, 1.0, 0, 4),
            (10, 3, 1.1, 0, 4),
            (7, 8, 1.0, 4, 4),
            (8, 4, 1.25, 4, 4),
            (8192, 128, 1.0, 4, 64),
            (100, 3, 0.03, 0, 1),
            (30, 10, 1.1, 0, 4),
        ] {
            assert_eq!(capacity_rows(tokens, experts, factor, min), want, "({tokens}, {experts}, {factor}, {min})");
        }
        assert_eq!(capacity_rows(100, 10, 1.1, 0), 11, "in double precision this would be 12");
    }

    #[test]
    fn load_figures() {
        let load = ExpertLoad { tokens_per_expert: vec![6, 2, 0, 0], dropped: 2 };
        assert_eq!(load.imbalance(), 3.0);
        assert_eq!(load.drop_rate(), 0.25);
        assert_eq!(ExpertLoad::default().imbalance(), 0.0);
    }
}
