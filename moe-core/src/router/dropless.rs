//! The dropless top-k routing of today's models: softmax or sigmoid scores, selection bias, group limits.

use super::gate::softmax;
use super::infer::infer;
use super::select::{Decision, Demand, kept_scores, normalized, slots_in_order, top_k_indices};
use super::top_k::check_top_k;
use super::{Gate, Mode, RouteContext, Router};
use crate::loss::load_balance_loss_per_sequence;
use crate::ops::host::{expect_shape, to_f32_vec};
use crate::ops::sigmoid;
use crate::{Error, Result, RouterLosses, Routing, Weight, router_z_loss};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreFunction {
    /// Softmax over all experts (Mixtral, Qwen, OLMoE, DeepSeek-V2).
    #[default]
    Softmax,
    /// A sigmoid for each expert by itself (DeepSeek-V3, GLM-4).
    Sigmoid,
}

/// What a group of experts is ranked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2 `group_limited_greedy`).
    #[default]
    Max,
    /// The sum of its two best (DeepSeek-V3 `noaux_tc`).
    TopTwoSum,
}

/// Settings of [`DroplessRouter`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DroplessConfig {
    /// Experts per token.
    pub top_k: usize,
    /// Scores from logits.
    pub score_function: ScoreFunction,
    /// Divide a token's weights by their sum (`norm_topk_prob`).
    pub normalize: bool,
    /// Factor on the weights (`routed_scaling_factor`).
    pub scale: f64,
    /// Groups of consecutive experts; 1 for none.
    pub num_groups: usize,
    /// Groups a token may use, of `num_groups`.
    pub top_groups: usize,
    /// How groups are ranked.
    pub group_score: GroupScore,
    /// Average the load-balance loss over sequences instead of taking it over the batch.
    pub sequence_loss: bool,
}

impl DroplessConfig {
    /// Softmax over all, top-k, no groups.
    pub fn softmax(top_k: usize, normalize: bool) -> Self {
        Self {
            top_k,
            score_function: ScoreFunction::Softmax,
            normalize,
            scale: 1.0,
            num_groups: 1,
            top_groups: 1,
            group_score: GroupScore::Max,
            sequence_loss: false,
        }
    }

    /// Refuses settings that do not fit `num_experts`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self, num_experts: usize) -> Result<()> {
        check_top_k(self.top_k, num_experts)?;
        if self.num_groups == 0 || !num_experts.is_multiple_of(self.num_groups) {
            return Err(Error::Config(format!(
                "n_group must divide the {num_experts} experts, got {}",
                self.num_groups
            )));
        }
        if self.top_groups == 0 || self.top_groups > self.num_groups {
            return Err(Error::Config(format!(
                "topk_group must be between 1 and n_group ({}), got {}",
                self.num_groups, self.top_groups
            )));
        }
        let reachable = num_experts / self.num_groups * self.top_groups;
        if self.top_k > reachable {
            return Err(Error::Config(format!(
                "top_k {} exceeds the {reachable} experts of {} groups; raise topk_group",
                self.top_k, self.top_groups
            )));
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return Err(Error::Config(format!("routed_scaling_factor must be positive, got {}", self.scale)));
        }
        Ok(())
    }
}

/// `k` experts per token, none dropped.
///
/// # Source
/// Mixtral (2401.04088); DeepSeek-V2 (2405.04434) and V3 (2412.19437), whose selection bias moves the choice and not
/// the weight ([`crate::updated_selection_bias`]).
#[derive(Debug, Clone)]
pub struct DroplessRouter {
    gate: Gate,
    selection_bias: Option<Tensor>,
    config: DroplessConfig,
}

impl DroplessRouter {
    /// A router over `gate`; `selection_bias` is `[num_experts]` and gets no gradient.
    ///
    /// # Errors
    /// [`Error::Config`] if the settings do not fit the experts.
    pub fn new(gate: Gate, selection_bias: Option<Tensor>, config: DroplessConfig) -> Result<Self> {
        config.validate(gate.num_experts())?;
        if let Some(bias) = &selection_bias {
            expect_shape("selection_bias", bias, &[gate.num_experts()])?;
        }
        Ok(Self { gate, selection_bias, config })
    }

    /// Decides from logits `[tokens, num_experts]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the context does not fit.
    pub fn route_logits(&self, logits: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        self.gate.check_logits(logits)?;
        self.config.decide(logits, self.selection_bias.as_ref(), context)
    }
}

impl DroplessConfig {
    /// The decision from logits `[tokens, num_experts]`; its losses are left out of inference passes.
    pub(super) fn decide(
        &self,
        logits: &Tensor,
        selection_bias: Option<&Tensor>,
        context: &RouteContext<'_>,
    ) -> Result<Routing> {
        let (tokens, experts) = logits.dims2()?;
        context.check(tokens)?;
        let scores = match self.score_function {
            ScoreFunction::Softmax => softmax(logits)?,
            ScoreFunction::Sigmoid => sigmoid(logits)?,
        };
        let selection = to_f32_vec(&match selection_bias {
            Some(bias) => scores.detach().broadcast_add(&bias.to_dtype(scores.dtype())?)?,
            None => scores.clone(),
        })?;
        let chosen = selection.chunks_exact(experts).flat_map(|row| self.choose(row)).collect();
        let demand = Demand::new(chosen, self.top_k, experts, context);
        let kept = demand.expert_ids.clone();
        let slots = slots_in_order(&kept, experts, 0..kept.len());
        let losses = match context.mode {
            Mode::Infer => RouterLosses::default(),
            Mode::Train | Mode::Eval => self.losses(logits, &scores, &kept, context)?,
        };
        let mut weights = kept_scores(&scores, &demand.expert_ids, &kept, self.top_k)?;
        if self.normalize {
            weights = normalized(&weights, 1e-20)?;
        }
        let combine_weights = (weights * self.scale)?;
        Ok(Decision { demand, kept, slots, capacity: None, combine_weights, losses }.into_routing())
    }

    fn losses(
        &self,
        logits: &Tensor,
        scores: &Tensor,
        chosen: &[u32],
        context: &RouteContext<'_>,
    ) -> Result<RouterLosses> {
        let tokens = scores.dim(0)?;
        let seq_len = match (self.sequence_loss, context.seq_len) {
            (false, _) => tokens,
            (true, Some(len)) => len,
            (true, None) => {
                return Err(Error::Input("the per-sequence load-balance loss needs seq_len in the context".into()));
            }
        };
        let probs = match self.score_function {
            ScoreFunction::Softmax => scores.clone(),
            ScoreFunction::Sigmoid => normalized(scores, 1e-20)?,
        };
        Ok(RouterLosses {
            load_balance: Some(load_balance_loss_per_sequence(&probs, chosen, self.top_k, seq_len.max(1))?),
            router_z: Some(router_z_loss(logits)?),
        })
    }

    /// The chosen experts of one token, best first.
    fn choose(&self, selection: &[f32]) -> Vec<u32> {
        if self.num_groups == 1 || self.top_groups == self.num_groups {
            return top_k_indices(selection, self.top_k);
        }
        let size = selection.len() / self.num_groups;
        let group_scores: Vec<f32> = selection
            .chunks_exact(size)
            .map(|group| {
                let best = top_k_indices(group, 2);
                let value = |i: usize| best.get(i).map_or(0.0, |&e| group[e as usize]);
                if self.group_score == GroupScore::Max { value(0) } else { value(0) + value(1) }
            })
            .collect();
        let mut masked = vec![f32::NEG_INFINITY; selection.len()];
        for group in top_k_indices(&group_scores, self.top_groups) {
            let range = group as usize * size..(group as usize + 1) * size;
            masked[range.clone()].copy_from_slice(&selection[range]);
        }
        top_k_indices(&masked, self.top_k)
    }
}

impl Router for DroplessRouter {
    fn num_experts(&self) -> usize {
        self.gate.num_experts()
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![self.gate.weight()]
    }

    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        if context.mode == Mode::Infer {
            return infer(&self.gate, tokens, self.selection_bias.as_ref(), &self.config, context);
        }
        self.route_logits(&self.gate.logits(tokens)?, context)
    }
}
