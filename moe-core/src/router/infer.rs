//! The decision of an inference pass: nothing is drawn, nothing is dropped, each token by itself.

use super::select::slots_in_order;
use super::{Gate, RouteContext};
use crate::{DroplessConfig, Result, RouterLosses, Routing};
use candle_core::Tensor;

/// What `config` chooses, in one sweep where the backend can, without gradients and losses.
pub(super) fn infer(
    gate: &Gate,
    tokens: &Tensor,
    selection_bias: Option<&Tensor>,
    config: &DroplessConfig,
    context: &RouteContext<'_>,
) -> Result<Routing> {
    let num_tokens = tokens.dim(0)?;
    context.check(num_tokens)?;
    if context.used_tokens.is_none()
        && let Some(choices) = gate.choose(tokens, selection_bias, config)?
    {
        let (num_experts, top_k) = (gate.num_experts(), config.top_k);
        return Ok(Routing {
            num_tokens,
            num_experts,
            top_k,
            slots: slots_in_order(&choices.expert_ids, num_experts, 0..choices.expert_ids.len()),
            expert_ids: choices.expert_ids,
            combine_weights: Tensor::from_vec(choices.combine_weights, (num_tokens, top_k), tokens.device())?,
            capacity: None,
            load: choices.load,
            losses: RouterLosses::default(),
        });
    }
    config.decide(&gate.logits(tokens)?, selection_bias, context)
}
