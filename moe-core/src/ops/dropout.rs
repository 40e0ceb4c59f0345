//! [`Dropout`]: which elements of a tensor are dropped, as a pure function of a seed and of where each stands. No mask is kept
//! anywhere: whoever needs one again computes it again.

use crate::{CounterRng, Error, Result};
use candle_core::Tensor;

/// Elements dropped with some probability, the others scaled so that the mean stays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    seed: u64,
    threshold: u32,
    scale: f32,
}

impl Dropout {
    /// Drops elements with `probability`, rounded to multiples of 2^-32; which ones is a function of `seed` and of their row and
    /// column.
    ///
    /// # Errors
    /// [`Error::Config`] for a probability outside `[0, 1)`.
    pub fn new(probability: f64, seed: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&probability) {
            return Err(Error::Config(format!("a dropout probability must lie in [0, 1), got {probability}")));
        }
        let threshold = (probability * 4_294_967_296.0).round() as u32;
        Ok(Self { seed, threshold, scale: (1.0 / (1.0 - probability)) as f32 })
    }

    /// The same of another tensor, one per index.
    #[must_use]
    pub fn of(self, index: u64) -> Self {
        Self { seed: CounterRng::mix(self.seed, &[index]), ..self }
    }

    /// The elements of one row.
    pub fn row(&self, row: usize) -> DropoutRow {
        let key = CounterRng::mix(self.seed, &[row as u64]);
        DropoutRow { keys: [key as u32, (key >> 32) as u32], threshold: self.threshold, scale: self.scale }
    }

    /// The factors of `rows` rows of `width`, one after the other: what the reference multiplies with.
    pub(super) fn factors(&self, rows: usize, width: usize) -> impl Iterator<Item = f32> {
        let this = *self;
        (0..rows).flat_map(move |row| {
            let row = this.row(row);
            (0..width as u32).map(move |column| row.factor(column))
        })
    }
}

/// Which elements of one row are dropped.
#[derive(Debug, Clone, Copy)]
pub struct DropoutRow {
    keys: [u32; 2],
    threshold: u32,
    scale: f32,
}

impl DropoutRow {
    /// What the element in `column` is multiplied with: 0, or the inverse of the share that is kept. Without branches, so that a
    /// loop over columns becomes vector code; the same on every set.
    ///
    /// The random number is a hash of the column under the row's 64-bit key, which comes from Philox: two rounds of a 32-bit
    /// mixing function, a word of the key before each. One word would not do: rows whose keys differ in low bits would be
    /// permutations of each other. It is no generator for anything but such masks; Philox for each element would take five times
    /// as long.
    #[inline(always)]
    pub fn factor(&self, column: u32) -> f32 {
        let random = mixed(mixed(column ^ self.keys[0]) ^ self.keys[1]);
        if random < self.threshold { 0.0 } else { self.scale }
    }
}

/// A bijection of 32 bits in which every bit of the result depends on every bit of the argument.
///
/// # Source
/// Wellons 2018, "Prospecting for Hash Functions": `lowbias32`.
#[inline(always)]
fn mixed(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Dropout of attention probabilities. Its coordinates are those of the whole attention: the sequence's index in the batch, the
/// head's among all heads, query and key in their sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadDropout {
    /// Of the attention.
    pub dropout: Dropout,
    /// Where the first query head of a call stands among all heads: not 0 where others compute those before it.
    pub first_head: usize,
}

impl HeadDropout {
    /// Of all heads.
    pub fn of_all(dropout: Dropout) -> Self {
        Self { dropout, first_head: 0 }
    }

    /// The probabilities of one sequence and query head of the call: row by row a query, column by column a key.
    pub fn head(&self, sequence: usize, head: usize) -> Dropout {
        self.dropout.of(sequence as u64).of((self.first_head + head) as u64)
    }
}

/// `x` times the factors of its rows, the last dimension being the columns.
pub(super) fn reference(x: &Tensor, dropout: &Dropout) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    let rows = x.elem_count() / width.max(1);
    let factors = Tensor::from_iter(dropout.factors(rows, width), x.device())?.reshape(x.shape())?;
    Ok((x * factors.to_dtype(x.dtype())?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dropped(dropout: &Dropout, rows: usize, width: usize) -> Vec<bool> {
        dropout.factors(rows, width).map(|factor| factor == 0.0).collect()
    }

    /// Deviation of a count from its expectation, in standard deviations of that many independent draws.
    fn deviations(count: usize, of: usize, probability: f64) -> f64 {
        (count as f64 - of as f64 * probability) / (of as f64 * probability * (1.0 - probability)).sqrt()
    }

    #[test]
    fn the_share_dropped_is_the_probability_and_the_mean_stays() {
        let (rows, width) = (700, 1000);
        for probability in [0.01, 0.1, 0.5, 0.9] {
            let dropout = Dropout::new(probability, 7).unwrap();
            let all = dropped(&dropout, rows, width);
            let count = |part: &mut dyn Iterator<Item = &bool>| part.filter(|&&gone| gone).count();
            let far = |count, of| deviations(count, of, probability).abs();
            assert!(far(count(&mut all.iter()), all.len()) < 4.0, "{probability}");
            // No row and no column is special: 1700 of them, of which the worst of a normal distribution is at 3.4.
            for row in 0..rows {
                assert!(far(count(&mut all[row * width..][..width].iter()), width) < 5.5, "{probability}: row {row}");
            }
            for column in 0..width {
                let part = &mut all.iter().skip(column).step_by(width);
                assert!(far(count(part), rows) < 5.5, "{probability}: column {column}");
            }
            let mean = dropout.factors(rows, width).map(f64::from).sum::<f64>() / (rows * width) as f64;
            let error = (probability / (1.0 - probability) / (rows * width) as f64).sqrt();
            assert!((mean - 1.0).abs() < 4.0 * error, "{probability}: a mean factor of {mean}");
        }
    }

    /// Neighbours in every direction, other rows, other tensors and other seeds drop together as often as by chance.
    #[test]
    fn draws_of_different_places_are_independent() {
        let (rows, width, probability) = (256, 512, 0.3);
        let dropout = Dropout::new(probability, 3).unwrap();
        let all = dropped(&dropout, rows, width);
        let both = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && **b).count();
        let check = |a: &[bool], b: &[bool], what: &str| {
            let far = deviations(both(a, b), a.len(), probability * probability).abs();
            assert!(far < 4.5, "{what}: {far} standard deviations");
        };
        for distance in [1, 2, 3, 4, 16, 64, 128] {
            check(&all[distance..], &all[..all.len() - distance], "columns");
            check(&all[distance * width..], &all[..all.len() - distance * width], "rows");
        }
        check(&all, &dropped(&Dropout::new(probability, 4).unwrap(), rows, width), "seeds");
        check(&all, &dropped(&dropout.of(0), rows, width), "the first of several");
        let heads = HeadDropout::of_all(dropout);
        let head = |sequence, head| dropped(&heads.head(sequence, head), rows, width);
        check(&head(0, 0), &head(0, 1), "heads");
        check(&head(0, 1), &head(1, 0), "sequences");
        let later = HeadDropout { first_head: 1, ..heads };
        assert_eq!(head(2, 1), dropped(&later.head(2, 0), rows, width), "a head is the same whoever computes it");
    }

    #[test]
    fn probabilities_outside_are_refused_and_zero_drops_nothing() {
        for probability in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            let message = Dropout::new(probability, 1).unwrap_err().to_string();
            assert!(message.contains("[0, 1)"), "{message}");
        }
        assert!(Dropout::new(0.0, 1).unwrap().factors(50, 50).all(|factor| factor == 1.0));
    }
}
