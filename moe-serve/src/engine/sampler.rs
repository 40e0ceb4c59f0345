//! Draws the next token from a row of logits. Pure: the random number comes from outside.
//!
//! Tokens are put in order only where a draw looks, and nothing is copied where nothing is changed: a step draws for every
//! sequence, while the model waits.

use super::plain_draw::PlainDraw;
use super::request::SamplingParams;
use crate::{Error, Result};
use moe_core::ops::host::{Real, dispatch};
use std::borrow::Cow;
use std::collections::HashMap;

/// What may be drawn this time.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenLimits<'a> {
    /// These are not.
    pub forbidden: &'a [u32],
    /// Only these are, if given: token `id` is bit `id % 32` of word `id / 32`.
    pub allowed: Option<&'a [u32]>,
}

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

    /// The draw at `position`, but for these tokens, as one that needs nothing of this sampler; `None` if it does.
    pub(super) fn plain(&self, forbidden: &[u32], position: usize, uniform: f64) -> Option<PlainDraw> {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        (!self.penalises() && self.params.logit_bias.is_empty()).then(|| PlainDraw {
            temperature,
            top_k,
            top_p,
            min_p,
            num_tokens: self.num_tokens,
            forbidden: self.suppressed.iter().chain(forbidden).copied().collect(),
            position,
            uniform,
        })
    }

    /// Draws a token within `limits`. `logits` is `[vocab_size]`; `uniform` is in `[0, 1)`.
    ///
    /// # Errors
    /// [`Error::LogitsNotFinite`] if a logit is NaN or positive infinity, [`Error::NothingToSample`] if all are forbidden.
    pub fn sample(&self, logits: &[f32], limits: TokenLimits<'_>, position: usize, uniform: f64) -> Result<u32> {
        if !lanes_all(logits, |x| x < f32::INFINITY) {
            return Err(Error::LogitsNotFinite { position });
        }
        let adjusted = self.adjusted(logits, limits);
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
    fn adjusted<'a>(&self, logits: &'a [f32], limits: TokenLimits<'_>) -> Cow<'a, [f32]> {
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
                        // A penalty near 0 makes it very likely, not infinite.
                        (*logit / params.repetition_penalty).min(f32::MAX)
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
        if let Some(allowed) = limits.allowed {
            for (logits, &word) in adjusted.to_mut().chunks_mut(32).zip(allowed.iter().chain(std::iter::repeat(&0))) {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
        if !(self.suppressed.is_empty() && limits.forbidden.is_empty()) {
            let adjusted = adjusted.to_mut();
            for &id in self.suppressed.iter().chain(limits.forbidden) {
                if let Some(logit) = adjusted.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        adjusted
    }

    /// Draws from what `top_k`, `top_p` and `min_p` leave, in this order, each of what the one before left.
    fn draw(&self, logits: &[f32], max: f32, uniform: f64) -> u32 {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let mut ranking = Ranking::new(logits, max, temperature);
        let mut kept = ranking.all();
        if top_k > 0 && top_k < kept.count {
            kept = ranking.first(top_k);
        }
        if top_p < 1.0 {
            // The token that crosses it is still in.
            let target = f64::from(top_p) * kept.weight;
            kept = ranking.until(kept, |cumulative| cumulative >= target);
        }
        if min_p > 0.0 {
            kept = ranking.at_least(kept, min_p);
        }
        // The first whose running sum exceeds the random number; the last one if rounding leaves a gap.
        let target = uniform * kept.weight;
        let drawn = ranking.until(kept, |cumulative| cumulative > target);
        ranking.last_of(drawn)
    }
}

/// A token that can be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
    /// Its probability over the likeliest one's.
    weight: f32,
}

impl Candidate {
    /// By falling logit, the lower id first among equals.
    fn by_rank(a: &Self, b: &Self) -> std::cmp::Ordering {
        b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
    }
}

/// The first `count` candidates in the order of their ranks, `weight` in all. They are all of the octaves before `octave`, and
/// the first `inside` of that one.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Prefix {
    octave: usize,
    inside: usize,
    count: usize,
    weight: f64,
}

/// Powers of two between the largest f32 weight, 1, and the smallest normal one.
const OCTAVES: usize = 127;

/// Candidates by octave of their weights. Cuts and draws look at sums of octaves, and only into the one octave where they fall.
struct Ranking<'a> {
    logits: &'a [f32],
    weights: Vec<f32>,
    counts: [usize; OCTAVES],
    sums: [f64; OCTAVES],
    /// The octaves that were looked into, with their candidates in the order of their ranks as far as was needed.
    opened: Vec<(usize, Vec<Candidate>)>,
}

impl<'a> Ranking<'a> {
    fn new(logits: &'a [f32], max: f32, temperature: f32) -> Self {
        let weights = weights(logits, max, temperature);
        let (mut counts, mut sums) = ([0; OCTAVES], [0.0; OCTAVES]);
        for &weight in &weights {
            if weight > 0.0 {
                counts[octave(weight)] += 1;
                sums[octave(weight)] += f64::from(weight);
            }
        }
        Self { logits, weights, counts, sums, opened: Vec::new() }
    }

    fn all(&self) -> Prefix {
        let octave = self.counts.iter().rposition(|&count| count > 0).unwrap_or(0);
        let count = self.counts.iter().sum();
        Prefix { octave, inside: self.counts[octave], count, weight: self.sums.iter().sum() }
    }

    /// The candidates of an octave.
    fn open(&mut self, index: usize) -> &mut Vec<Candidate> {
        let at = self.opened.iter().position(|(opened, _)| *opened == index).unwrap_or_else(|| {
            let pairs = self.weights.iter().zip(self.logits).zip(0u32..);
            let inside = pairs.filter(|((weight, _), _)| **weight > 0.0 && octave(**weight) == index);
            let candidates = inside.map(|((&weight, &logit), id)| Candidate { logit, id, weight }).collect();
            self.opened.push((index, candidates));
            self.opened.len() - 1
        });
        &mut self.opened[at].1
    }

    /// The first `count` candidates, of at least as many.
    fn first(&mut self, count: usize) -> Prefix {
        let (mut before, mut weight) = (0, 0.0);
        for index in 0..OCTAVES {
            if before + self.counts[index] >= count {
                let inside = count - before;
                let candidates = self.open(index);
                partition(candidates, inside);
                weight += candidates[..inside].iter().map(|c| f64::from(c.weight)).sum::<f64>();
                return Prefix { octave: index, inside, count, weight };
            }
            before += self.counts[index];
            weight += self.sums[index];
        }
        self.all()
    }

    /// The shortest beginning of `kept` whose running sum is `enough`, or all of it.
    fn until(&mut self, kept: Prefix, enough: impl Fn(f64) -> bool) -> Prefix {
        let (mut before, mut weight) = (0, 0.0);
        for index in 0..=kept.octave {
            let is_last = index == kept.octave;
            if is_last || enough(weight + self.sums[index]) {
                let end = if is_last { kept.inside } else { self.counts[index] };
                let candidates = self.open(index);
                partition(candidates, end);
                let (inside, sum) = cross(&mut candidates[..end], |sum| enough(weight + sum));
                return Prefix { octave: index, inside, count: before + inside, weight: weight + sum };
            }
            before += self.counts[index];
            weight += self.sums[index];
        }
        kept
    }

    /// Those of `kept` with at least this weight, and the first one in any case.
    fn at_least(&mut self, kept: Prefix, least: f32) -> Prefix {
        let index = octave(least);
        if index > kept.octave {
            return kept;
        }
        let end = if index == kept.octave { kept.inside } else { self.counts[index] };
        let candidates = self.open(index);
        partition(candidates, end);
        candidates[..end].sort_unstable_by(Candidate::by_rank);
        let inside = candidates[..end].iter().take_while(|c| c.weight >= least).count();
        let sum: f64 = candidates[..inside].iter().map(|c| f64::from(c.weight)).sum();
        let count = self.counts[..index].iter().sum::<usize>() + inside;
        let weight = self.sums[..index].iter().sum::<f64>() + sum;
        if count == 0 { self.first(1) } else { Prefix { octave: index, inside, count, weight } }
    }

    /// The last of the first so many candidates.
    fn last_of(&mut self, prefix: Prefix) -> u32 {
        let mut prefix = prefix;
        while prefix.inside == 0 && prefix.octave > 0 {
            prefix.octave -= 1;
            prefix.inside = self.counts[prefix.octave];
        }
        let candidates = self.open(prefix.octave);
        partition(candidates, prefix.inside);
        let last = candidates[..prefix.inside].iter().max_by(|a, b| Candidate::by_rank(a, b));
        last.map_or(0, |candidate| candidate.id)
    }
}

/// Which power of two a weight from 0 (exclusive) to 1 comes after.
fn octave(weight: f32) -> usize {
    let exponent = (weight.to_bits() >> 23) as usize;
    127usize.saturating_sub(exponent).min(OCTAVES - 1)
}

/// `exp((logit - max) / temperature)`, and 0 for what is impossible.
fn weights(logits: &[f32], max: f32, temperature: f32) -> Vec<f32> {
    let mut weights = vec![0.0; logits.len()];
    dispatch(
        #[inline(always)]
        || {
            for (weight, &logit) in weights.iter_mut().zip(logits) {
                let exp = ((logit - max) / temperature).exp_();
                *weight = if logit == f32::NEG_INFINITY { 0.0 } else { exp };
            }
        },
    );
    weights
}

/// Brings the first `count` in rank to the front.
fn partition(candidates: &mut [Candidate], count: usize) {
    if (1..candidates.len()).contains(&count) {
        candidates.select_nth_unstable_by(count - 1, Candidate::by_rank);
    }
}

/// How many candidates, in the order of their ranks, it takes until their running sum is `enough`, and that sum; all if it never
/// is. Halves the candidates instead of sorting them.
fn cross(candidates: &mut [Candidate], enough: impl Fn(f64) -> bool) -> (usize, f64) {
    const SORTED: usize = 16;
    let (mut low, mut high, mut sum) = (0, candidates.len(), 0.0);
    while high - low > SORTED {
        let half = (high - low) / 2;
        partition(&mut candidates[low..high], half);
        let more: f64 = candidates[low..low + half].iter().map(|c| f64::from(c.weight)).sum();
        if enough(sum + more) {
            high = low + half;
        } else {
            sum += more;
            low += half;
        }
    }
    candidates[low..high].sort_unstable_by(Candidate::by_rank);
    for (i, candidate) in candidates[low..high].iter().enumerate() {
        sum += f64::from(candidate.weight);
        if enough(sum) {
            return (low + i + 1, sum);
        }
    }
    (high, sum)
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
