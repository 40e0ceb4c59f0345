//! Auxiliary losses: pure functions of router probabilities and choices.

use crate::{DROPPED, Error, Result};
use candle_core::{D, Tensor};

/// `E * sum_e(mean probability of e * share of routes to e) / k`: 1 when both are even.
///
/// The gradient flows through the probabilities only.
///
/// # Shapes
/// - `router_probs`: `[tokens, num_experts]`
/// - `expert_ids`: `[tokens, top_k]`, choices before any drop ([`DROPPED`] entries count for no expert)
/// - returns: a scalar
///
/// # Errors
/// [`Error::Input`] if the sizes disagree.
///
/// # Source
/// DeepSpeed `top1gating`, `topkgating` (`l_aux`), from GShard equation 4. For top-2 the original passes the first
/// choices only; so does the router of this crate.
pub fn load_balance_loss(router_probs: &Tensor, expert_ids: &[u32], top_k: usize) -> Result<Tensor> {
    let tokens = router_probs.dim(0)?;
    load_balance_loss_per_sequence(router_probs, expert_ids, top_k, tokens.max(1))
}

/// [`load_balance_loss`] of each sequence of `seq_len` tokens, averaged over the sequences.
///
/// # Errors
/// [`Error::Input`] if `seq_len` does not divide the tokens.
///
/// # Source
/// DeepSeek-V3 (2412.19437), equations 17 to 20, without its coefficient.
pub fn load_balance_loss_per_sequence(
    router_probs: &Tensor,
    expert_ids: &[u32],
    top_k: usize,
    seq_len: usize,
) -> Result<Tensor> {
    let (tokens, experts) = router_probs.dims2()?;
    if expert_ids.len() != tokens * top_k || seq_len == 0 || tokens % seq_len != 0 {
        return Err(Error::Input(format!(
            "load-balance loss over {tokens} tokens in sequences of {seq_len} with top_k {top_k} got {} expert ids",
            expert_ids.len()
        )));
    }
    if tokens == 0 {
        return Ok(router_probs.sum_all()?); // zero, and part of the graph
    }
    let sequences = tokens / seq_len;
    let mut shares = vec![0f32; sequences * experts];
    for (choice, &expert) in expert_ids.iter().enumerate().filter(|(_, e)| **e != DROPPED) {
        shares[choice / top_k / seq_len * experts + expert as usize] += 1.0 / (seq_len * top_k) as f32;
    }
    let shares =
        Tensor::from_vec(shares, (sequences, experts), router_probs.device())?.to_dtype(router_probs.dtype())?;
    let means = router_probs.reshape((sequences, seq_len, experts))?.mean(1)?;
    Ok(((means * shares)?.sum_all()? * (experts as f64 / sequences as f64))?)
}

/// Mean over tokens of `logsumexp(logits)^2`: keeps router logits small.
///
/// # Shapes
/// `[tokens, num_experts]` to a scalar
///
/// # Errors
/// If it is not a matrix.
///
/// # Source
/// ST-MoE (Zoph et al. 2022), equation 5.
pub fn router_z_loss(router_logits: &Tensor) -> Result<Tensor> {
    if router_logits.dim(0)? == 0 {
        return Ok(router_logits.sum_all()?); // zero, and part of the graph
    }
    Ok(router_logits.log_sum_exp(D::Minus1)?.sqr()?.mean_all()?)
}

/// Selection biases after one step without auxiliary loss: up by `rate` for experts below the mean load, down above it.
///
/// # Errors
/// [`Error::Input`] if the lengths differ.
///
/// # Source
/// Wang et al. 2024 (2408.15664), algorithm 1; DeepSeek-V3.
pub fn updated_selection_bias(bias: &[f32], tokens_per_expert: &[u32], rate: f32) -> Result<Vec<f32>> {
    if bias.len() != tokens_per_expert.len() || bias.is_empty() {
        return Err(Error::Input(format!("{} biases for {} experts", bias.len(), tokens_per_expert.len())));
    }
    let total: u64 = tokens_per_expert.iter().map(|&c| u64::from(c)).sum();
    let experts = bias.len() as u64;
    Ok(bias
        .iter()
        .zip(tokens_per_expert)
        .map(|(b, &count)| match (u64::from(count) * experts).cmp(&total) {
            std::cmp::Ordering::Less => b + rate,
            std::cmp::Ordering::Equal => *b,
            std::cmp::Ordering::Greater => b - rate,
        })
        .collect())
}
