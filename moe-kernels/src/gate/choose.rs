//! One token's choice: scores in place of logits, group limits, the best experts, their weights.
//!
//! An expert is compared by one 64-bit key, its score in total order above its id turned round: the largest key is the
//! best expert, and the lower id among equals. Keys are scanned once per choice; nothing sorts all experts.
//!
//! A score that is NaN is above all numbers, whatever its sign: its expert is chosen and its weight is NaN, so that the
//! token's output shows it.

use moe_core::ops::SIGMOID_LEAST;
use moe_core::{DroplessConfig, GroupScore, ScoreFunction};

/// Choices up to which a scan for each is cheaper than one partition.
const MAX_SCANS: usize = 24;
/// Sums of weights below this count as this: what the routers of `moe-core` divide by.
const LEAST_SUM: f32 = 1e-20;

/// The rule of choice, with memory for one token's keys.
pub(super) struct Chooser<'a> {
    config: &'a DroplessConfig,
    selection_bias: Option<&'a [f32]>,
    keys: Vec<i64>,
    group_keys: Vec<i64>,
    top_groups: Vec<u32>,
}

impl<'a> Chooser<'a> {
    pub(super) fn new(config: &'a DroplessConfig, selection_bias: Option<&'a [f32]>, num_experts: usize) -> Self {
        let limited = config.num_groups > 1 && config.top_groups < config.num_groups;
        let groups = if limited { config.num_groups } else { 0 };
        Self {
            config,
            selection_bias,
            keys: vec![0; num_experts],
            group_keys: vec![0; groups],
            top_groups: vec![0; if limited { config.top_groups } else { 0 }],
        }
    }

    /// Turns a token's logits into scores and writes its experts, best first, and their weights.
    #[inline(always)]
    pub(super) fn choose(&mut self, logits: &mut [f32], expert_ids: &mut [u32], weights: &mut [f32]) {
        let scores = logits;
        match self.config.score_function {
            ScoreFunction::Softmax => softmax(scores),
            ScoreFunction::Sigmoid => scores.iter_mut().for_each(|z| *z = sigmoid(*z)),
        }
        match self.selection_bias {
            Some(bias) => {
                for (i, ((k, &score), &bias)) in self.keys.iter_mut().zip(&*scores).zip(bias).enumerate() {
                    *k = key(score + bias, i);
                }
            }
            None => self.keys.iter_mut().zip(&*scores).enumerate().for_each(|(i, (k, &score))| *k = key(score, i)),
        }
        if !self.group_keys.is_empty() {
            self.limit_groups();
        }
        take_largest(&mut self.keys, expert_ids);
        for (weight, &expert) in weights.iter_mut().zip(&*expert_ids) {
            *weight = scores[expert as usize];
        }
        if self.config.normalize {
            let sum = sum(weights);
            let sum = if sum < LEAST_SUM { LEAST_SUM } else { sum };
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        let scale = self.config.scale as f32;
        weights.iter_mut().for_each(|w| *w *= scale);
    }

    /// Takes all experts outside the best groups to minus infinity.
    #[inline(always)]
    fn limit_groups(&mut self) {
        let size = self.keys.len() / self.group_keys.len();
        for (group, (k, keys)) in self.group_keys.iter_mut().zip(self.keys.chunks_exact(size)).enumerate() {
            let best = largest(keys);
            let score = match self.config.group_score {
                GroupScore::Max => score_of(best),
                GroupScore::TopTwoSum => {
                    let below = |top: i64, k: &i64| if *k < best && *k > top { *k } else { top };
                    let second = keys.iter().fold(i64::MIN, below);
                    score_of(best) + if size > 1 { score_of(second) } else { 0.0 }
                }
            };
            *k = key(score, group);
        }
        take_largest(&mut self.group_keys, &mut self.top_groups);
        for (group, keys) in self.keys.chunks_exact_mut(size).enumerate() {
            if !self.top_groups.contains(&(group as u32)) {
                keys.iter_mut().enumerate().for_each(|(i, k)| *k = key(f32::NEG_INFINITY, group * size + i));
            }
        }
    }
}

/// A key that orders by `f32::total_cmp`, NaN on top, and the lower index first among equals.
#[inline(always)]
fn key(score: f32, index: usize) -> i64 {
    let score = if score.is_nan() { f32::NAN } else { score };
    let bits = score.to_bits() as i32;
    let ordered = bits ^ ((bits >> 31) as u32 >> 1) as i32;
    (i64::from(ordered) << 32) | i64::from(!(index as u32))
}

#[inline(always)]
fn score_of(key: i64) -> f32 {
    let ordered = (key >> 32) as i32;
    f32::from_bits((ordered ^ ((ordered >> 31) as u32 >> 1) as i32) as u32)
}

#[inline(always)]
fn index_of(key: i64) -> u32 {
    !(key as u32)
}

#[inline(always)]
fn largest(keys: &[i64]) -> i64 {
    keys.iter().fold(i64::MIN, |top, &k| if k > top { k } else { top })
}

/// The indices of the largest keys, largest first, as many as `indices` has; `keys` is used up.
#[inline(always)]
fn take_largest(keys: &mut [i64], indices: &mut [u32]) {
    let count = indices.len();
    if count <= MAX_SCANS {
        for index in indices {
            *index = index_of(largest(keys));
            // No key of a score is as small: its low half would be that of index u32::MAX.
            keys[*index as usize] = i64::MIN;
        }
        return;
    }
    if count < keys.len() {
        keys.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
    }
    keys[..count].sort_unstable_by(|a, b| b.cmp(a));
    indices.iter_mut().zip(keys).for_each(|(index, k)| *index = index_of(*k));
}

/// The softmax of `moe-core`'s routers: the exponential is the library's, because a choice between near equals hangs on
/// its last bit.
#[inline(always)]
fn softmax(values: &mut [f32]) {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for block in whole {
        lanes.iter_mut().zip(block).for_each(|(top, &v)| *top = if v > *top { v } else { *top });
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &v| if v > top { v } else { top });
    values.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum = sum(values);
    values.iter_mut().for_each(|v| *v /= sum);
}

/// The sum in candle's order on a CPU with AVX2: 32 partial sums over whole blocks, folded in halves, then the rest.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0; 32];
    let (whole, rest) = values.as_chunks::<32>();
    for block in whole {
        lanes.iter_mut().zip(block).for_each(|(sum, v)| *sum += v);
    }
    let mut eight = [0.0; 8];
    for (i, sum) in eight.iter_mut().enumerate() {
        *sum = (lanes[i] + lanes[8 + i]) + (lanes[16 + i] + lanes[24 + i]);
    }
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[4 + i]);
    rest.iter().fold((four[0] + four[1]) + (four[2] + four[3]), |sum, v| sum + v)
}

/// As `moe_core::ops::sigmoid` has it.
fn sigmoid(z: f32) -> f32 {
    // Not `max`, which would make a number of NaN.
    let z = if z < SIGMOID_LEAST { SIGMOID_LEAST } else { z };
    1.0 / ((-z).exp() + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_like_total_cmp_and_keep_score_and_index() {
        let scores = [f32::NEG_INFINITY, -2.5, -f32::MIN_POSITIVE, -0.0, 0.0, 1e-40, 1.0, f32::INFINITY, f32::NAN];
        for (i, &a) in scores.iter().enumerate() {
            assert_eq!((score_of(key(a, 7)).to_bits(), index_of(key(a, 7))), (a.to_bits(), 7));
            assert!(key(a, 3) > key(a, 4), "the lower index comes first");
            for &b in &scores[..i] {
                assert!(key(a, 9) > key(b, 0), "{a} above {b}");
            }
        }
        // Neither sign nor payload of a NaN counts, and no key is as small as that of a choice already taken.
        assert_eq!(key(-f32::NAN, 5), key(f32::NAN, 5));
        assert!(key(f32::from_bits(u32::MAX), 1 << 20) > key(f32::INFINITY, 0));
        assert!(key(f32::NEG_INFINITY, 1 << 20) > i64::MIN);
    }

    #[test]
    fn scans_and_partition_agree_with_sorting() {
        let scores: Vec<f32> = (0..67).map(|i| ((i * 37) % 11) as f32).collect();
        let keys: Vec<i64> = scores.iter().enumerate().map(|(i, &s)| key(s, i)).collect();
        let mut want: Vec<u32> = (0..67).collect();
        want.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        for count in [0, 1, 8, MAX_SCANS, MAX_SCANS + 1, 66, 67] {
            let mut got = vec![0; count];
            take_largest(&mut keys.clone(), &mut got);
            assert_eq!(got, want[..count], "{count}");
        }
    }
}
