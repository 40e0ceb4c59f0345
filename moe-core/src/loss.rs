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
    if let Some(expert) = expert_ids.iter().find(|&&expert| expert != DROPPED && expert as usize >= experts) {
        return Err(Error::Input(format!("expert_ids of a load-balance loss must lie below {experts}, got {expert}")));
    }
    if tokens == 0 {
        return Ok(router_probs.sum_all()?); // zero, and part of the graph
    }
    let sequences = tokens / seq_len;
    // Routes are counted and divided once: a sum of many small shares in floating point drifts.
    let mut counts = vec![0u64; sequences * experts];
    for (choice, &expert) in expert_ids.iter().enumerate().filter(|(_, e)| **e != DROPPED) {
        counts[choice / top_k / seq_len * experts + expert as usize] += 1;
    }
    let routes = (seq_len * top_k) as f64;
    let shares: Vec<f64> = counts.into_iter().map(|count| count as f64 / routes).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    /// The shares come back as the gradient of the probabilities, times `experts / tokens`.
    fn shares(expert_ids: &[u32], top_k: usize, experts: usize, dtype: DType) -> Vec<f64> {
        let tokens = expert_ids.len() / top_k;
        let probs = Tensor::full(1.0 / experts as f64, (tokens, experts), &Device::Cpu).unwrap();
        let probs = candle_core::Var::from_tensor(&probs.to_dtype(dtype).unwrap()).unwrap();
        let grads = load_balance_loss(&probs, expert_ids, top_k).unwrap().backward().unwrap();
        let first = grads.get(&probs).unwrap().get(0).unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        first.iter().map(|g| g * tokens as f64 / experts as f64).collect()
    }

    #[test]
    fn load_shares_of_many_tokens_do_not_drift() {
        // A number of tokens whose inverse has no end in binary: summed one by one, all of it came to 1.0010.
        let tokens = 100_003;
        for (dtype, tolerance) in [(DType::F32, 2e-7), (DType::F64, 1e-15)] {
            let all_to_one = shares(&vec![1; tokens], 1, 2, dtype);
            assert!(all_to_one[0] == 0.0 && (all_to_one[1] - 1.0).abs() <= tolerance, "{all_to_one:?}");
            let ids: Vec<u32> = (0..2 * tokens).map(|i| if i % 7 == 3 { DROPPED } else { i as u32 % 3 }).collect();
            let got = shares(&ids, 2, 3, dtype);
            for (expert, share) in got.iter().enumerate() {
                let count = ids.iter().filter(|&&id| id == expert as u32).count();
                let want = count as f64 / (2 * tokens) as f64;
                assert!((share - want).abs() <= tolerance, "{dtype:?} expert {expert}: {share}, want {want}");
            }
        }
    }

    #[test]
    fn experts_that_are_not_there_are_refused() {
        let probs = Tensor::full(0.5f32, (4, 2), &Device::Cpu).unwrap();
        let message = load_balance_loss_per_sequence(&probs, &[0, 1, 2, 0], 1, 2).unwrap_err().to_string();
        assert!(message.contains("below 2, got 2"), "{message}");
    }
}
