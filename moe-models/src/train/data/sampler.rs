//! Draws training sequences: a weighted blend of sources, each shuffled anew every epoch. The order is a pure function
//! of the seed, the weights and the counts in [`DataPosition`]; no generator state is kept.

use super::packed::PackedSource;
use crate::train::config::Blend;
use crate::{Error, Result};
use moe_core::CounterRng;
use serde::{Deserialize, Serialize};

/// Keeps the shuffle's random numbers apart from every other use of the run's seed.
const SHUFFLE_TAG: u64 = 0x7368_7566_666c_6500;

/// How far a run is in its data: all that is needed to continue exactly.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DataPosition {
    /// Sequences drawn so far, per source.
    pub drawn: Vec<u64>,
}

/// The permutation of one epoch of one source, kept in memory until the epoch ends: four bytes per sequence, a thousandth
/// of what the tokens take at a length of a thousand.
#[derive(Debug, Default)]
struct Shuffle {
    epoch: Option<u64>,
    order: Vec<u32>,
}

/// An endless stream of sequences from several sources.
#[derive(Debug)]
pub struct SequenceSampler {
    sources: Vec<PackedSource>,
    /// Shares, summing to 1.
    shares: Vec<f64>,
    seq_len: usize,
    seed: u64,
    position: DataPosition,
    shuffles: Vec<Shuffle>,
}

impl SequenceSampler {
    /// A sampler at the start of its data. `weights` are relative, one per source.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no source, a weight is not positive, or a source is too short for one sequence.
    pub fn new(sources: Vec<PackedSource>, weights: &[f64], seq_len: usize, seed: u64) -> Result<Self> {
        if sources.is_empty() {
            return Err(Error::Config("no training data; name at least one source".into()));
        }
        if weights.len() != sources.len() || weights.iter().any(|w| !(w.is_finite() && *w > 0.0)) {
            return Err(Error::Config(format!(
                "expected {} positive weights, one per source, got {weights:?}",
                sources.len()
            )));
        }
        for source in &sources {
            let (name, tokens) = (&source.name, source.num_tokens());
            if source.num_sequences(seq_len) == 0 {
                return Err(Error::Config(format!(
                    "source {name} has {tokens} tokens, too few for one sequence of {seq_len}; add text or lower seq_length"
                )));
            }
            if u32::try_from(source.num_sequences(seq_len)).is_err() {
                return Err(Error::Config(format!("source {name} has more than 2^32 sequences; split it")));
            }
        }
        let sum: f64 = weights.iter().sum();
        Ok(Self {
            shares: weights.iter().map(|w| w / sum).collect(),
            position: DataPosition { drawn: vec![0; sources.len()] },
            shuffles: sources.iter().map(|_| Shuffle::default()).collect(),
            sources,
            seq_len,
            seed,
        })
    }

    /// The sources, in the order of [`DataPosition::drawn`].
    pub fn sources(&self) -> &[PackedSource] {
        &self.sources
    }

    /// Each source's share of the sequences, summing to 1.
    pub fn shares(&self) -> &[f64] {
        &self.shares
    }

    /// Tokens per sequence.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Where the stream stands.
    pub fn position(&self) -> &DataPosition {
        &self.position
    }

    /// Continues from `position`, as if the stream had been drawn up to there.
    ///
    /// # Errors
    /// [`Error::Config`] if `position` counts another number of sources.
    pub fn seek(&mut self, position: DataPosition) -> Result<()> {
        if position.drawn.len() != self.sources.len() {
            return Err(Error::Config(format!(
                "the saved data position has {} sources, this run has {}; resume with the data of the first run",
                position.drawn.len(),
                self.sources.len()
            )));
        }
        self.position = position;
        Ok(())
    }

    /// Appends the next sequence's inputs and targets (`seq_len` each) and returns the index of its source.
    pub fn draw(&mut self, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) -> usize {
        let chosen = largest_deficit(&self.shares, &self.position.drawn);
        let count = self.sources[chosen].num_sequences(self.seq_len) as u64;
        let drawn = self.position.drawn[chosen];
        let index = self.shuffled(chosen, drawn / count, (drawn % count) as usize);
        self.sources[chosen].append_sequence(index, self.seq_len, inputs, targets);
        self.position.drawn[chosen] += 1;
        chosen
    }

    /// Entry `rank` of the permutation of `(seed, source, epoch)`.
    fn shuffled(&mut self, source: usize, epoch: u64, rank: usize) -> usize {
        let shuffle = &mut self.shuffles[source];
        if shuffle.epoch != Some(epoch) {
            let count = self.sources[source].num_sequences(self.seq_len) as u32;
            let stream = CounterRng::mix(SHUFFLE_TAG, &[source as u64, epoch]);
            shuffle.order = permutation(count, &mut CounterRng::new(self.seed, stream));
            shuffle.epoch = Some(epoch);
        }
        shuffle.order[rank] as usize
    }
}

/// Relative weights of `sources`: the user's, 1 for those without one; or their tokens.
///
/// # Errors
/// [`Error::Config`] if a source carries a weight although the blend is by tokens.
pub fn blend_weights(sources: &[PackedSource], blend: Blend) -> Result<Vec<f64>> {
    match blend {
        Blend::Equal => Ok(sources.iter().map(|s| s.weight.unwrap_or(1.0)).collect()),
        Blend::Tokens => match sources.iter().find(|s| s.weight.is_some()) {
            None => Ok(sources.iter().map(|s| s.num_tokens() as f64).collect()),
            Some(s) => Err(Error::Config(format!(
                "source {} has a weight, but blend = tokens weighs sources by their tokens; drop one of the two",
                s.name
            ))),
        },
    }
}

/// The source furthest behind its share of the next draw; the first of equals.
///
/// # Source
/// Megatron-LM `megatron/data/helpers.cpp`, `build_blending_indices`.
fn largest_deficit(shares: &[f64], drawn: &[u64]) -> usize {
    let total = drawn.iter().sum::<u64>().max(1) as f64;
    let deficit = |i: usize| shares[i] * total - drawn[i] as f64;
    (1..shares.len()).fold(0, |best, i| if deficit(i) > deficit(best) { i } else { best })
}

/// Fisher-Yates.
fn permutation(count: u32, rng: &mut CounterRng) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    for i in (1..count).rev() {
        order.swap(i as usize, rng.below(i + 1) as usize);
    }
    order
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
