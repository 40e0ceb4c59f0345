//! Draws the next token from a row of logits. Pure: the random number comes from outside.

use super::request::SamplingParams;
use crate::{Error, Result};
use std::collections::HashMap;

/// Draws the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler<'a> {
    params: &'a SamplingParams,
    /// Ids below this may be sampled; the rest pads the model's vocabulary.
    num_tokens: usize,
    /// Never sampled.
    suppressed: &'a [u32],
    /// Occurrences among the generated tokens.
    generated: HashMap<u32, u32>,
    /// Distinct tokens of the prompt.
    prompt: Vec<u32>,
}

impl<'a> Sampler<'a> {
    /// A sampler for the continuation of `prompt`.
    pub fn new(params: &'a SamplingParams, num_tokens: usize, suppressed: &'a [u32], prompt: &[u32]) -> Self {
        let mut prompt = prompt.to_vec();
        prompt.sort_unstable();
        prompt.dedup();
        Self { params, num_tokens, suppressed, generated: HashMap::new(), prompt }
    }

    /// Remembers a sampled token for the penalties.
    pub fn push(&mut self, token_id: u32) {
        *self.generated.entry(token_id).or_default() += 1;
    }

    /// Draws a token. `logits` is `[vocab_size]`; `forbidden` are not sampled this time; `uniform` is in `[0, 1)`.
    ///
    /// # Errors
    /// [`Error::LogitsNotFinite`] if a logit is NaN or positive infinity, [`Error::NothingToSample`] if all are forbidden.
    pub fn sample(&self, logits: &[f32], forbidden: &[u32], position: usize, uniform: f64) -> Result<u32> {
        if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(Error::LogitsNotFinite { position });
        }
        let adjusted = self.adjusted(logits, forbidden);
        if self.params.temperature == 0.0 {
            return greedy(&adjusted);
        }
        let mut candidates = candidates(&adjusted, self.params.temperature)?;
        keep_top_k(&mut candidates, self.params.top_k);
        keep_top_p(&mut candidates, self.params.top_p);
        keep_min_p(&mut candidates, self.params.min_p);
        let probs: Vec<f64> = candidates.iter().map(|c| c.1).collect();
        Ok(candidates[sample_index(&probs, uniform)].0)
    }

    /// Logits after bias and penalties; forbidden and padding tokens are negative infinity.
    fn adjusted(&self, logits: &[f32], forbidden: &[u32]) -> Vec<f32> {
        let params = self.params;
        let mut adjusted = logits[..self.num_tokens.min(logits.len())].to_vec();
        for &(id, bias) in &params.logit_bias {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if params.repetition_penalty != 1.0 {
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
        for (&id, &count) in &self.generated {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
            }
        }
        for &id in self.suppressed.iter().chain(forbidden) {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        adjusted
    }
}

/// The likeliest id; the lowest one among equals.
fn greedy(logits: &[f32]) -> Result<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.map_or(f32::NEG_INFINITY, |b| b.1) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as u32).ok_or(Error::NothingToSample)
}

/// `(id, probability)` by falling probability, the lower id first among equals; impossible tokens are left out.
fn candidates(logits: &[f32], temperature: f32) -> Result<Vec<(u32, f64)>> {
    let mut kept: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
        .map(|(id, &logit)| (id as u32, f64::from(logit) / f64::from(temperature)))
        .collect();
    kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let max = kept.first().ok_or(Error::NothingToSample)?.1;
    for candidate in &mut kept {
        candidate.1 = (candidate.1 - max).exp();
    }
    normalise(&mut kept);
    Ok(kept)
}

fn normalise(candidates: &mut [(u32, f64)]) {
    let sum: f64 = candidates.iter().map(|c| c.1).sum();
    for candidate in candidates {
        candidate.1 /= sum;
    }
}

fn keep_top_k(candidates: &mut Vec<(u32, f64)>, top_k: usize) {
    if top_k > 0 && top_k < candidates.len() {
        candidates.truncate(top_k);
        normalise(candidates);
    }
}

fn keep_top_p(candidates: &mut Vec<(u32, f64)>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let mut cumulative = 0.0;
    let kept = candidates.iter().position(|c| {
        cumulative += c.1;
        cumulative >= f64::from(top_p)
    });
    candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
    normalise(candidates);
}

fn keep_min_p(candidates: &mut Vec<(u32, f64)>, min_p: f32) {
    let floor = f64::from(min_p) * candidates[0].1;
    candidates.retain(|c| c.1 >= floor);
    normalise(candidates);
}

/// The first index at which the running sum of `probs` exceeds `uniform`; the last one if rounding leaves a gap.
pub fn sample_index(probs: &[f64], uniform: f64) -> usize {
    let mut cumulative = 0.0;
    probs
        .iter()
        .position(|p| {
            cumulative += p;
            cumulative > uniform
        })
        .unwrap_or(probs.len().saturating_sub(1))
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
