//! Where a router's random draws come from.

use crate::CounterRng;
use std::fmt::Debug;

/// A source of random matrices. Asked twice for the same thing it gives the same answer.
pub trait NoiseSource: Debug + Sync {
    /// `rows * cols` values uniform in `[0, 1)`: the random token selection.
    fn uniform(&self, rows: usize, cols: usize) -> Vec<f32>;
    /// `rows * cols` standard Gumbel values: RSample and the sampled second expert.
    fn gumbel(&self, rows: usize, cols: usize) -> Vec<f32>;
    /// `rows * cols` values uniform in `[1 - epsilon, 1 + epsilon)`: jitter of the gate's input.
    fn jitter(&self, rows: usize, cols: usize, epsilon: f32) -> Vec<f32>;
}

/// Draws that are a function of a seed and a stream (one stream per step, micro-batch and layer).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeededNoise {
    seed: u64,
    stream: u64,
}

impl SeededNoise {
    /// For passes that draw nothing.
    pub(super) const ZERO: Self = Self { seed: 0, stream: 0 };

    /// The draws of one layer in one pass: give each its own `stream`.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream }
    }

    fn rng(&self, kind: u64) -> CounterRng {
        CounterRng::new(CounterRng::mix(self.seed, &[kind]), self.stream)
    }
}

impl NoiseSource for SeededNoise {
    fn uniform(&self, rows: usize, cols: usize) -> Vec<f32> {
        let mut rng = self.rng(0);
        (0..rows * cols).map(|_| rng.uniform_f32()).collect()
    }

    fn gumbel(&self, rows: usize, cols: usize) -> Vec<f32> {
        let mut rng = self.rng(1);
        (0..rows * cols).map(|_| rng.gumbel_f32()).collect()
    }

    fn jitter(&self, rows: usize, cols: usize, epsilon: f32) -> Vec<f32> {
        let mut rng = self.rng(2);
        (0..rows * cols).map(|_| 1.0 + epsilon * (2.0 * rng.uniform_f32() - 1.0)).collect()
    }
}

/// Draws of tokens that are a function of each token's sequence, position and layer: the same alone, in a batch, and in any
/// chunk of its prompt.
#[derive(Debug, Clone, Copy)]
pub struct PositionedNoise<'a> {
    /// Seed of its sequence and position in it, of each row.
    rows: &'a [(u64, u32)],
    layer: u64,
}

impl<'a> PositionedNoise<'a> {
    /// The draws of one layer; `rows` gives the seed and the position of each token.
    pub fn new(rows: &'a [(u64, u32)], layer: u64) -> Self {
        Self { rows, layer }
    }

    fn draw(&self, rows: usize, cols: usize, kind: u64, draw: impl Fn(&mut CounterRng) -> f32) -> Vec<f32> {
        debug_assert_eq!(rows, self.rows.len());
        let row = |&(seed, position): &(u64, u32)| {
            let mut rng = CounterRng::new(CounterRng::mix(seed, &[kind, u64::from(position)]), self.layer);
            (0..cols).map(|_| draw(&mut rng)).collect::<Vec<_>>()
        };
        self.rows.iter().take(rows).flat_map(row).collect()
    }
}

impl NoiseSource for PositionedNoise<'_> {
    fn uniform(&self, rows: usize, cols: usize) -> Vec<f32> {
        self.draw(rows, cols, 0, CounterRng::uniform_f32)
    }

    fn gumbel(&self, rows: usize, cols: usize) -> Vec<f32> {
        self.draw(rows, cols, 1, CounterRng::gumbel_f32)
    }

    fn jitter(&self, rows: usize, cols: usize, epsilon: f32) -> Vec<f32> {
        self.draw(rows, cols, 2, |rng| 1.0 + epsilon * (2.0 * rng.uniform_f32() - 1.0))
    }
}
