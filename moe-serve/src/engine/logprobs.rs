//! Log-probabilities as the model gives them, before bias, penalties and temperature.

use moe_kernels::log_sum_exp;

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token_id: u32,
    /// Natural logarithm, over the whole vocabulary.
    pub logprob: f32,
}

/// The log-probability of one token and of the likeliest ones at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token that stands there.
    pub token: TokenLogprob,
    /// The likeliest tokens, best first, the lower id first among equals.
    pub top: Vec<TokenLogprob>,
}

impl TokenLogprobs {
    /// Log-softmax of `logits` at `token_id`, with the `num_top` likeliest ids below `num_tokens`.
    pub(crate) fn of(logits: &[f32], token_id: u32, num_top: usize, num_tokens: usize) -> Self {
        let log_sum = log_sum_exp(logits);
        let at = |id: usize| TokenLogprob { token_id: id as u32, logprob: (f64::from(logits[id]) - log_sum) as f32 };
        let top = top_ids(&logits[..num_tokens.min(logits.len())], num_top).into_iter().map(at).collect();
        Self { token: at(token_id as usize), top }
    }
}

/// The `count` largest entries' indices, largest first, lower index first among equals. For a few of many.
fn top_ids(logits: &[f32], count: usize) -> Vec<usize> {
    let mut top: Vec<usize> = Vec::with_capacity(count.min(logits.len()) + 1);
    if count == 0 {
        return top;
    }
    let mut least = f32::NEG_INFINITY;
    for (id, logit) in logits.iter().enumerate() {
        // An equal one that comes later is no better.
        if top.len() == count && logit.total_cmp(&least).is_le() {
            continue;
        }
        let place = top.partition_point(|&better| logits[better].total_cmp(logit).is_ge());
        top.insert(place, id);
        top.truncate(count);
        least = top.last().map_or(least, |&id| logits[id]);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_of_three_logits() {
        // softmax([ln 1, ln 2, ln 5]) = [1/8, 2/8, 5/8]
        let logits = [1f32.ln(), 2f32.ln(), 5f32.ln()];
        let got = TokenLogprobs::of(&logits, 0, 2, 3);
        assert!((got.token.logprob - 0.125f32.ln()).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|t| t.token_id).collect::<Vec<_>>(), [2, 1]);
        assert!((got.top[0].logprob - 0.625f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn the_likeliest_are_those_that_sorting_finds() {
        let mut rng = moe_core::CounterRng::new(5, 0);
        for len in [1, 7, 300] {
            // Many are equal.
            let logits: Vec<f32> = (0..len).map(|_| rng.below(40) as f32 - 20.0).collect();
            let mut sorted: Vec<usize> = (0..len).collect();
            sorted.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            for count in [0, 1, 5, 20] {
                assert_eq!(top_ids(&logits, count), sorted[..count.min(len)], "{count} of {len}");
            }
        }
    }

    #[test]
    fn padding_is_never_an_alternative_and_ties_take_the_lower_id() {
        let got = TokenLogprobs::of(&[1.0, 1.0, 9.0], 1, 5, 2);
        assert_eq!(got.top.iter().map(|t| t.token_id).collect::<Vec<_>>(), [0, 1]);
    }
}
