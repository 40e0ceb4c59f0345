//! Draws the next token from a row of logits. Pure: the random number comes from outside.
//!
//! The likeliest tokens are put in order only as far down as a draw needs them, and nothing is copied where nothing is changed:
//! a step draws for every sequence, while the model waits.

use super::request::SamplingParams;
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::HashMap;

/// Draws the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    /// Ids below this may be sampled; the rest pads the model's vocabulary.
    num_tokens: usize,
    /// Never sampled.
    suppressed: Vec<u32>,
    /// Occurrences among the generated tokens.
    generated: HashMap<u32, u32>,
    /// Distinct tokens of the prompt.
    prompt: Vec<u32>,
}

impl Sampler {
    /// A sampler for the continuation of `prompt`.
    pub fn new(params: SamplingParams, num_tokens: usize, suppressed: &[u32], prompt: &[u32]) -> Self {
        let mut prompt = if params.repetition_penalty == 1.0 { Vec::new() } else { prompt.to_vec() };
        prompt.sort_unstable();
        prompt.dedup();
        Self { params, num_tokens, suppressed: suppressed.to_vec(), generated: HashMap::new(), prompt }
    }

    /// Remembers a sampled token for the penalties.
    pub fn push(&mut self, token_id: u32) {
        if self.penalises() {
            *self.generated.entry(token_id).or_default() += 1;
        }
    }

    fn penalises(&self) -> bool {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }

    /// Draws a token. `logits` is `[vocab_size]`; `forbidden` are not sampled this time; `uniform` is in `[0, 1)`.
    ///
    /// # Errors
    /// [`Error::LogitsNotFinite`] if a logit is NaN or positive infinity, [`Error::NothingToSample`] if all are forbidden.
    pub fn sample(&self, logits: &[f32], forbidden: &[u32], position: usize, uniform: f64) -> Result<u32> {
        if !lanes_all(logits, |x| x < f32::INFINITY) {
            return Err(Error::LogitsNotFinite { position });
        }
        let adjusted = self.adjusted(logits, forbidden);
        let max = lanes_max(&adjusted);
        if max == f32::NEG_INFINITY {
            return Err(Error::NothingToSample);
        }
        if self.params.temperature == 0.0 {
            // The lowest id among equals.
            let first = adjusted.iter().position(|&x| x == max);
            return first.map(|id| id as u32).ok_or(Error::NothingToSample);
        }
        Ok(self.draw(&adjusted, max, uniform))
    }

    /// Logits after bias and penalties; forbidden and padding tokens are negative infinity or left out.
    fn adjusted<'a>(&self, logits: &'a [f32], forbidden: &[u32]) -> Cow<'a, [f32]> {
        let params = &self.params;
        let mut adjusted = Cow::Borrowed(&logits[..self.num_tokens.min(logits.len())]);
        if !params.logit_bias.is_empty() {
            let adjusted = adjusted.to_mut();
            for &(id, bias) in &params.logit_bias {
                if let Some(logit) = adjusted.get_mut(id as usize) {
                    *logit += bias;
                }
            }
        }
        if params.repetition_penalty != 1.0 {
            let adjusted = adjusted.to_mut();
            let fresh = self.generated.keys().filter(|id| self.prompt.binary_search(id).is_err());
            for &id in self.prompt.iter().chain(fresh) {
                if let Some(logit) = adjusted.get_mut(id as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
            }
        }
        if !self.generated.is_empty() {
            let adjusted = adjusted.to_mut();
            for (&id, &count) in &self.generated {
                if let Some(logit) = adjusted.get_mut(id as usize) {
                    *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
                }
            }
        }
        if !(self.suppressed.is_empty() && forbidden.is_empty()) {
            let adjusted = adjusted.to_mut();
            for &id in self.suppressed.iter().chain(forbidden) {
                if let Some(logit) = adjusted.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        adjusted
    }

    /// Draws from what `top_k`, `top_p` and `min_p` leave, in this order, each of what the one before left.
    fn draw(&self, logits: &[f32], max: f32, uniform: f64) -> u32 {
        let SamplingParams { top_k, top_p, min_p, .. } = self.params;
        let temperature = f64::from(self.params.temperature);
        let weight = |logit: f32| ((f64::from(logit) - f64::from(max)) / temperature).exp();
        let mut ranked = Ranked::new(logits, max, temperature);
        let top_k = if top_k == 0 { ranked.len() } else { top_k.min(ranked.len()) };

        // 1. Top-k: the sum of what is left.
        let total: f64 = match top_k < ranked.len() {
            true => ranked.first(top_k).iter().map(|&(logit, _)| weight(logit)).sum(),
            false => ranked.entries.iter().map(|&(logit, _)| weight(logit)).sum(),
        };
        // 2. Top-p: the token that crosses it is still in.
        let mut kept = top_k;
        let mut kept_total = total;
        if top_p < 1.0 {
            let mut cumulative = 0.0;
            for i in 0..top_k {
                cumulative += weight(ranked.at(i));
                if cumulative >= f64::from(top_p) * total {
                    (kept, kept_total) = (i + 1, cumulative);
                    break;
                }
            }
        }
        // 3. Min-p: at least so likely in relation to the likeliest, whose weight is 1.
        if min_p > 0.0 {
            let mut cumulative = 0.0;
            let mut count = 0;
            while count < kept && weight(ranked.at(count)) >= f64::from(min_p) {
                cumulative += weight(ranked.at(count));
                count += 1;
            }
            (kept, kept_total) = (count.max(1), if count == 0 { 1.0 } else { cumulative });
        }
        // 4. The first whose running sum exceeds the random number; the last if rounding leaves a gap.
        let mut cumulative = 0.0;
        for i in 0..kept {
            cumulative += weight(ranked.at(i));
            if cumulative > uniform * kept_total {
                return ranked.entries[i].1;
            }
        }
        ranked.at(kept - 1);
        ranked.entries[kept - 1].1
    }
}

/// Logits with their ids, by falling logit, the lower id first among equals; in order only as far as was asked.
struct Ranked {
    entries: Vec<(f32, u32)>,
    sorted: usize,
}

impl Ranked {
    /// Tokens whose weight is below what a sum of all in f64 could notice are left out.
    fn new(logits: &[f32], max: f32, temperature: f64) -> Self {
        const NEGLIGIBLE: f64 = 60.0;
        let least = (f64::from(max) - NEGLIGIBLE * temperature) as f32;
        let kept = logits.iter().zip(0u32..).filter(|(logit, _)| **logit >= least);
        Self { entries: kept.map(|(&logit, id)| (logit, id)).collect(), sorted: 0 }
    }

    fn len(&self) -> usize {
        self.entries.len()
    }

    /// The logit at place `index`.
    fn at(&mut self, index: usize) -> f32 {
        self.first(index + 1);
        self.entries[index].0
    }

    /// The first `count` in order.
    fn first(&mut self, count: usize) -> &[(f32, u32)] {
        if count > self.sorted {
            let by_rank = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            let end = count.max(64).max(4 * self.sorted).min(self.entries.len());
            let rest = &mut self.entries[self.sorted..];
            let more = end - self.sorted;
            if more < rest.len() {
                rest.select_nth_unstable_by(more - 1, by_rank);
            }
            rest[..more].sort_unstable_by(by_rank);
            self.sorted = end;
        }
        &self.entries[..count]
    }
}

/// Elements that a loop takes side by side.
const LANES: usize = 16;

/// Whether all elements pass, looked at side by side.
fn lanes_all(values: &[f32], passes: impl Fn(f32) -> bool) -> bool {
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder().iter().all(|&x| passes(x));
    let mut all = [true; LANES];
    for chunk in chunks {
        for (all, &x) in all.iter_mut().zip(chunk) {
            *all &= passes(x);
        }
    }
    rest && all == [true; LANES]
}

/// The largest element, none of which is NaN.
fn lanes_max(values: &[f32]) -> f32 {
    let chunks = values.chunks_exact(LANES);
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (max, &x) in max.iter_mut().zip(chunk) {
            *max = larger(*max, x);
        }
    }
    max.into_iter().fold(rest, larger)
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
