//! Rotary position embedding as data: which columns turn, and the cosines and sines of every position, computed once per
//! model, when they are first asked for.

use crate::{Error, Result};
use std::sync::{Arc, OnceLock};

/// Which columns of a head form a pair; `h` is half of the table's `rotary_dim`.
///
/// ```text
/// Halves       (0, h) (1, h + 1) (2, h + 2) ..
/// Interleaved  (0, 1) (2, 3)     (4, 5)     ..
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RotaryLayout {
    /// `rotate_half` of Llama, Mixtral and GPT-NeoX in transformers.
    Halves,
    /// That of the RoFormer paper, GPT-J and DeepSeek.
    Interleaved,
}

/// The positions of the rows.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// `start`, `start + 1`, .. along the dimension before the last.
    From(u32),
    /// One per row, all leading dimensions flattened.
    Each(&'a [u32]),
}

/// Cosines and sines of the angles `position * frequency`, for positions `0..max_positions`. Clones share memory, which grows with the
/// positions that are asked for: a model may allow many more than anybody uses.
///
/// Angles are f64; cosines and sines are rounded to f32 at the end, so that late positions are as exact as early ones.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    head_dim: usize,
    /// Pairs of columns that turn, half of the rotary dimension.
    pairs: usize,
    max_positions: usize,
    angles: Arc<Angles>,
}

/// Positions whose values are computed together.
const BLOCK: usize = 256;

/// What values are computed from, and those that are there.
#[derive(Debug)]
struct Angles {
    /// Radians per position, one for each pair.
    frequencies: Vec<f64>,
    /// What every value is multiplied with, one after the other.
    factors: Vec<f64>,
    /// Of each [`BLOCK`] positions `[BLOCK, 2, pairs]`: cosines, then sines.
    blocks: Vec<OnceLock<Box<[f32]>>>,
}

impl Angles {
    fn new(frequencies: Vec<f64>, factors: Vec<f64>, max_positions: usize) -> Self {
        let blocks = (0..max_positions.div_ceil(BLOCK)).map(|_| OnceLock::new()).collect();
        Self { frequencies, factors, blocks }
    }

    /// The values of a block. Not inlined, so that they do not depend on what the caller is compiled for.
    #[cold]
    #[inline(never)]
    fn compute(&self, block: usize) -> Box<[f32]> {
        let angles = |position: usize| self.frequencies.iter().map(move |f| position as f64 * f);
        let scaled = |value: f64| self.factors.iter().fold(value as f32, |v, factor| (f64::from(v) * factor) as f32);
        (block * BLOCK..(block + 1) * BLOCK)
            .flat_map(|position| angles(position).map(f64::cos).chain(angles(position).map(f64::sin)))
            .map(scaled)
            .collect()
    }
}

impl RotaryTable {
    /// Frequencies `theta^(-2 i / rotary_dim)` for pair `i`; columns of a head from `rotary_dim` on stay as they are.
    ///
    /// # Errors
    /// [`Error::Input`] if `rotary_dim` is odd, 0 or above `head_dim`, `theta` is not positive, or there are more
    /// than 2^32 positions.
    pub fn new(head_dim: usize, rotary_dim: usize, theta: f64, max_positions: usize) -> Result<Self> {
        Self::from_frequencies(head_dim, &Self::frequencies(rotary_dim, theta)?, max_positions)
    }

    /// These frequencies, in radians per position, one for each pair.
    ///
    /// # Errors
    /// [`Error::Input`] if `rotary_dim` is odd or `theta` is not positive.
    pub fn frequencies(rotary_dim: usize, theta: f64) -> Result<Vec<f64>> {
        if !rotary_dim.is_multiple_of(2) {
            return Err(Error::Input(format!("rotary_dim must be even, as columns turn in pairs; got {rotary_dim}")));
        }
        if !theta.is_finite() || theta <= 0.0 {
            return Err(Error::Input(format!(
                "theta must be finite and positive, got {theta}; models use 10000 and up"
            )));
        }
        let frequency = |i: usize| theta.powf(-2.0 * i as f64 / rotary_dim as f64);
        Ok((0..rotary_dim / 2).map(frequency).collect())
    }

    /// Any frequencies, one per pair, in radians per position: for models that scale them.
    ///
    /// # Errors
    /// [`Error::Input`] if there is none, one is not finite, they need more columns than `head_dim` has, or there
    /// are more than 2^32 positions.
    pub fn from_frequencies(head_dim: usize, frequencies: &[f64], max_positions: usize) -> Result<Self> {
        let pairs = frequencies.len();
        if pairs == 0 || 2 * pairs > head_dim {
            return Err(Error::Input(format!(
                "rotary_dim must be from 2 to the head_dim of {head_dim}, got {}",
                2 * pairs
            )));
        }
        if let Some(bad) = frequencies.iter().find(|f| !f.is_finite()) {
            return Err(Error::Input(format!("frequencies must be finite, got {bad}")));
        }
        if u32::try_from(max_positions.saturating_sub(1)).is_err() {
            return Err(Error::Input(format!("max_positions must be at most 2^32, got {max_positions}")));
        }
        let angles = Arc::new(Angles::new(frequencies.to_vec(), Vec::new(), max_positions));
        Ok(Self { head_dim, pairs, max_positions, angles })
    }

    /// The same with every cosine and sine times `factor`, which scales what turns (YaRN, 2309.00071).
    #[must_use]
    pub fn scaled(&self, factor: f64) -> Self {
        let Angles { frequencies, factors, .. } = &*self.angles;
        let factors = [factors.as_slice(), &[factor]].concat();
        Self { angles: Arc::new(Angles::new(frequencies.clone(), factors, self.max_positions)), ..*self }
    }

    /// Columns of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Columns of a head that turn: the first ones.
    pub fn rotary_dim(&self) -> usize {
        2 * self.pairs
    }

    /// Positions in the table.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Cosines and sines `[rotary_dim / 2]` of a position.
    ///
    /// # Panics
    /// If the position is not in the table.
    #[inline(always)]
    pub fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let position = position as usize;
        assert!(position < self.max_positions, "position {position} is not in a table of {}", self.max_positions);
        let (block, row) = (position / BLOCK, position % BLOCK);
        let values = self.angles.blocks[block].get_or_init(|| self.angles.compute(block));
        values[row * 2 * self.pairs..][..2 * self.pairs].split_at(self.pairs)
    }

    /// One position per row of a tensor of this shape.
    ///
    /// # Errors
    /// [`Error::Input`] if the width is no multiple of `head_dim`, there is not one position per row, or a position is not in
    /// the table.
    pub fn resolve(&self, dims: &[usize], positions: Positions<'_>) -> Result<Vec<u32>> {
        let [leading @ .., width] = dims else {
            return Err(Error::Input("rotary needs an input of at least one dimension".into()));
        };
        if !width.is_multiple_of(self.head_dim) {
            return Err(Error::Input(format!(
                "rotary with a head_dim of {} got an input of width {width}, which is not a whole number of heads",
                self.head_dim
            )));
        }
        let rows: usize = leading.iter().product();
        let seq_len = leading.last().copied().unwrap_or(1);
        if rows == 0 {
            return Ok(Vec::new());
        }
        let too_far = |position: u64| {
            Error::Input(format!(
                "position {position} is not in a table of max_positions {}; make a longer table",
                self.max_positions
            ))
        };
        let max = self.max_positions as u64;
        match positions {
            Positions::From(start) => {
                let last = u64::from(start) + seq_len as u64 - 1;
                if last >= max {
                    return Err(too_far(last));
                }
                Ok((0..rows).map(|row| start + (row % seq_len) as u32).collect())
            }
            Positions::Each(each) if each.len() != rows => {
                Err(Error::Input(format!("positions must be one per row, {rows}, got {}", each.len())))
            }
            Positions::Each(each) => match each.iter().find(|&&p| u64::from(p) >= max) {
                Some(&p) => Err(too_far(p.into())),
                None => Ok(each.to_vec()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What every value was before blocks: each by itself, from its own angle.
    #[test]
    fn values_are_computed_when_they_are_asked_for_and_no_bit_of_them_depends_on_it() {
        let frequencies = RotaryTable::frequencies(6, 10_000.0).unwrap();
        let plain = RotaryTable::from_frequencies(8, &frequencies, 1000).unwrap();
        let scaled = plain.scaled(1.1).scaled(0.7);
        let there = |table: &RotaryTable| table.angles.blocks.iter().filter(|block| block.get().is_some()).count();
        assert_eq!((there(&plain), there(&scaled)), (0, 0));
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for position in [999u32, 0, 255, 256, 511, 998] {
            let angles = || frequencies.iter().map(|f| f64::from(position) * f);
            let want =
                [angles().map(|a| a.cos() as f32).collect(), angles().map(|a| a.sin() as f32).collect::<Vec<_>>()];
            let (cos, sin) = plain.at(position);
            assert_eq!([cos, sin].map(bits), [&want[0], &want[1]].map(|values| bits(values)));
            let times = |value: &f32, factor: f64| (f64::from(*value) * factor) as f32;
            let want = want.map(|values| values.iter().map(|v| times(&times(v, 1.1), 0.7)).collect::<Vec<_>>());
            let (cos, sin) = scaled.at(position);
            assert_eq!([cos, sin].map(bits), [&want[0], &want[1]].map(|values| bits(values)));
        }
        assert_eq!((there(&plain), there(&plain.clone())), (3, 3));
    }

    /// Cosines and sines of all of these would be a terabyte.
    #[test]
    fn positions_that_nobody_uses_take_no_memory() {
        let table = RotaryTable::new(1 << 16, 1 << 16, 10_000.0, 1 << 24).unwrap();
        assert_eq!(table.at((1 << 24) - 1).0.len(), 1 << 15);
        assert_eq!(table.max_positions(), 1 << 24);
    }

    #[test]
    #[should_panic(expected = "position 300 is not in a table of 300")]
    fn a_position_behind_the_last_is_not_there() {
        let _ = RotaryTable::new(4, 4, 10_000.0, 300).unwrap().at(300);
    }
}
