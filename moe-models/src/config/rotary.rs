//! [`RotaryConfig`]: which columns of a head turn, how fast, and how models stretch that to longer sequences.

use crate::{Error, Result};
use moe_core::ops::{RotaryLayout, RotaryTable};
use std::f64::consts::PI;

/// Rotary positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RotaryConfig {
    /// Which columns turn together.
    pub layout: RotaryLayout,
    /// Columns of a head that turn.
    pub rotary_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched.
    pub scaling: RotaryScaling,
}

/// How the frequencies of a model are changed for sequences longer than those it was first trained on.
///
/// # Source
/// transformers 5.23 `modeling_rope_utils.py`, whose names these are.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[expect(clippy::large_enum_variant, reason = "configurations are plain data of which there are few")]
pub enum RotaryScaling {
    /// Not at all.
    #[default]
    None,
    /// All of them divided by a factor.
    Linear {
        /// Above 0.
        factor: f64,
    },
    /// Slow ones divided by a factor, fast ones kept (Llama 3.1).
    Llama3 {
        /// What slow ones are divided by.
        factor: f64,
        /// Turns over the original length below which a frequency is slow.
        low_freq_factor: f64,
        /// Turns over it above which one is fast.
        high_freq_factor: f64,
        /// The original length, in tokens.
        original_positions: usize,
    },
    /// The same with a ramp over the pairs of columns, and cosines and sines scaled (YaRN, 2309.00071).
    Yarn {
        /// What slow ones are divided by.
        factor: f64,
        /// Turns over the original length from which on a frequency is kept.
        beta_fast: f64,
        /// Turns over it up to which one is divided.
        beta_slow: f64,
        /// The original length, in tokens.
        original_positions: usize,
        /// Whether the ramp begins and ends at whole pairs.
        truncate: bool,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
    /// Each divided by a factor of its own (LongRoPE, 2402.13753).
    PerPair {
        /// What they are divided by.
        factors: PairFactors,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
}

/// Most pairs of columns that can have a factor each.
const MOST_PAIRS: usize = 128;

/// A positive factor for each pair of columns that turns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairFactors {
    count: usize,
    values: [f64; MOST_PAIRS],
}

impl PairFactors {
    /// These factors.
    ///
    /// # Errors
    /// [`Error::Config`] if there are more than 128, or one is no positive number.
    pub fn new(factors: &[f64]) -> Result<Self> {
        if factors.len() > MOST_PAIRS {
            let count = factors.len();
            return Err(Error::Config(format!("factors must be at most {MOST_PAIRS}, one for each pair, got {count}")));
        }
        if let Some(bad) = factors.iter().find(|factor| !(**factor > 0.0 && factor.is_finite())) {
            return Err(Error::Config(format!("factors must be positive numbers, got {bad}")));
        }
        let mut values = [1.0; MOST_PAIRS];
        values[..factors.len()].copy_from_slice(factors);
        Ok(Self { count: factors.len(), values })
    }

    /// In the order of the pairs.
    pub fn as_slice(&self) -> &[f64] {
        &self.values[..self.count]
    }
}

/// YaRN's factor on attention for sequences `scale` times as long: `0.1 mscale ln(scale) + 1`, and 1 for shorter ones.
pub(crate) fn yarn_factor(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

impl RotaryConfig {
    /// Frequencies in radians per position, one for each pair of columns.
    ///
    /// # Errors
    /// [`crate::Error::Moe`] if columns do not turn in pairs, or `theta` is not positive.
    pub fn frequencies(&self) -> Result<Vec<f64>> {
        let mut frequencies = RotaryTable::frequencies(self.rotary_dim, self.theta)?;
        match self.scaling {
            RotaryScaling::None => {}
            RotaryScaling::PerPair { factors, .. } => {
                let (pairs, factors) = (frequencies.len(), factors.as_slice());
                if factors.len() != pairs {
                    let count = factors.len();
                    return Err(Error::Config(format!("{pairs} pairs of columns turn, but there are {count} factors")));
                }
                frequencies.iter_mut().zip(factors).for_each(|(frequency, factor)| *frequency /= factor);
            }
            RotaryScaling::Linear { factor } => frequencies.iter_mut().for_each(|frequency| *frequency /= factor),
            RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_positions } => {
                for frequency in &mut frequencies {
                    let turns = original_positions as f64 * *frequency / (2.0 * PI);
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    *frequency = (1.0 - kept) * *frequency / factor + kept * *frequency;
                }
            }
            RotaryScaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate, .. } => {
                // The pair that makes so many turns over the original length.
                let pair_of = |turns: f64| {
                    let ratio = original_positions as f64 / (turns * 2.0 * PI);
                    self.rotary_dim as f64 * ratio.ln() / (2.0 * self.theta.ln())
                };
                let (mut first, mut last) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min(self.rotary_dim as f64 - 1.0));
                let width = if first == last { 1e-3 } else { last - first };
                for (pair, frequency) in frequencies.iter_mut().enumerate() {
                    let divided = ((pair as f64 - first) / width).clamp(0.0, 1.0);
                    *frequency = *frequency / factor * divided + *frequency * (1.0 - divided);
                }
            }
        }
        Ok(frequencies)
    }

    /// Cosines and sines for positions `0..max_positions` of heads of `head_dim` columns.
    ///
    /// # Errors
    /// As [`Self::frequencies`]; if they need more columns than a head has.
    pub fn table(&self, head_dim: usize, max_positions: usize) -> Result<RotaryTable> {
        let table = RotaryTable::from_frequencies(head_dim, &self.frequencies()?, max_positions)?;
        Ok(match self.scaling {
            RotaryScaling::Yarn { attention_factor, .. } | RotaryScaling::PerPair { attention_factor, .. } => {
                table.scaled(attention_factor)
            }
            _ => table,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: RotaryConfig =
        RotaryConfig { layout: RotaryLayout::Halves, rotary_dim: 8, theta: 10_000.0, scaling: RotaryScaling::None };

    /// What `ROPE_INIT_FUNCTIONS` of transformers 5.23 prints for a head of 8 columns, theta 10,000, 64 original positions.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let check = |scaling, want: [f64; 4]| {
            let got = RotaryConfig { scaling, ..PLAIN }.frequencies().unwrap();
            let off = got.iter().zip(want).map(|(g, w)| ((g - w) / w).abs()).fold(0.0, f64::max);
            assert!(off < 1e-6, "{scaling:?}: {got:?} want {want:?}");
        };
        check(RotaryScaling::None, [1.0, 0.1, 0.01, 0.001]);
        check(RotaryScaling::Linear { factor: 4.0 }, LINEAR);
        let llama3 =
            RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 64 };
        check(llama3, LLAMA3);
        // Without anything between slow and fast.
        let step =
            RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 1.0, original_positions: 64 };
        check(step, [1.0, 0.1, 0.00125, 0.000125]);
        let yarn = |beta_fast, truncate| RotaryScaling::Yarn {
            factor: 4.0,
            beta_fast,
            beta_slow: 1.0,
            original_positions: 64,
            truncate,
            attention_factor: 1.0,
        };
        check(yarn(32.0, true), YARN);
        check(yarn(4.0, false), YARN_EXACT);
    }

    #[test]
    fn every_pair_can_have_a_factor() {
        let scaled = |factors: &[f64]| {
            let scaling = RotaryScaling::PerPair { factors: PairFactors::new(factors)?, attention_factor: 1.5 };
            let config = RotaryConfig { scaling, ..PLAIN };
            Ok::<_, Error>((config.frequencies()?, config.table(8, 1)?.at(0).0[0]))
        };
        let (frequencies, cos) = scaled(&[1.0, 2.0, 4.0, 0.5]).unwrap();
        let off = frequencies.iter().zip([1.0, 0.05, 0.0025, 0.002]).map(|(got, want)| (got - want).abs());
        assert!(off.fold(0.0, f64::max) < 1e-12 && cos == 1.5, "{frequencies:?}");
        for (factors, part) in [
            (vec![1.0; 3], "4 pairs of columns turn, but there are 3 factors"),
            (vec![1.0, 0.0, 1.0, 1.0], "positive numbers, got 0"),
            (vec![1.0; 129], "at most 128"),
        ] {
            let text = scaled(&factors).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }

    const LINEAR: [f64; 4] = [0.25, 0.025, 0.0025, 0.00025];
    const LLAMA3: [f64; 4] = [1.0, 0.0130422562, 0.00125, 0.000125];
    const YARN: [f64; 4] = [1.0, 0.0625, 0.0025, 0.00025];
    const YARN_EXACT: [f64; 4] = [1.0, 0.0259965975, 0.0025, 0.00025];

    #[test]
    fn yarn_scales_cosines_and_sines() {
        let scaling = RotaryScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_positions: 64,
            truncate: true,
            attention_factor: yarn_factor(4.0, 1.0),
        };
        let table = RotaryConfig { scaling, ..PLAIN }.table(8, 3).unwrap();
        let (cos, sin) = table.at(0);
        assert_eq!((cos[0], sin[0]), ((0.1 * 4f64.ln() + 1.0) as f32, 0.0));
        assert_eq!(yarn_factor(0.5, 1.0), 1.0);
        assert!(RotaryConfig { rotary_dim: 7, ..PLAIN }.table(8, 3).is_err());
    }
}
