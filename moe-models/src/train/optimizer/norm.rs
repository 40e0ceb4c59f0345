//! The global gradient norm: sums of squares of chunks, wherever they are computed, added in one order.

use super::grads::Grads;
use super::owned::Owned;
use super::units::Units;
use crate::{Error, Result};
use moe_kernels::{adamw, select};

/// The sum of the squares of one chunk of the gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChunkSum {
    /// Number of the chunk in the model, the same on every rank.
    pub chunk: usize,
    /// The sum.
    pub sum: f64,
}

impl Owned {
    /// The sums of what is owned.
    pub(super) fn squares(&self, grads: &Grads<'_>) -> Vec<ChunkSum> {
        let (mut numbers, mut values) = (Vec::new(), Vec::new());
        for param in 0..self.units().num_params() {
            let ranges = self.ranges(param).iter().zip(grads.ranges(self, param)).collect::<Vec<_>>();
            let mut at = 0;
            for chunk in self.chunks(param) {
                while ranges[at].0.end <= chunk.range.start {
                    at += 1;
                }
                let (range, grad) = &ranges[at];
                numbers.push(chunk.number);
                values.push(&grad[chunk.range.start - range.start..chunk.range.end - range.start]);
            }
        }
        let sums = adamw::sums_of_squares(select::current(), &values);
        numbers.into_iter().zip(sums).map(|(chunk, sum)| ChunkSum { chunk, sum }).collect()
    }
}

impl Units {
    /// The norm that the sums of all chunks of the model make, in any order. Sums are added chunk by chunk within a unit, and
    /// unit by unit in the order of their names: the bits are the same however chunks are spread over ranks and threads.
    /// A chunk may come several times, from ranks that hold the same one.
    ///
    /// # Errors
    /// [`Error::Argument`] naming a unit of which a chunk is missing, or came with two different sums.
    pub fn norm(&self, sums: &[ChunkSum]) -> Result<f64> {
        let mut of_chunk: Vec<Option<f64>> = vec![None; self.num_chunks()];
        for &ChunkSum { chunk, sum } in sums {
            let place = of_chunk.get_mut(chunk).ok_or_else(|| {
                Error::Argument(format!("the sum of chunk {chunk} came, the model has {} chunks", self.num_chunks()))
            })?;
            // Not a number is no other than not a number.
            if place.is_some_and(|known| known != sum && !(known.is_nan() && sum.is_nan())) {
                let unit = self.all().find(|(_, chunks)| chunks.contains(&chunk)).map_or("", |(unit, _)| &unit.name);
                return Err(Error::Argument(format!(
                    "ranks have different gradients of {unit}, though they should hold the same sum"
                )));
            }
            *place = Some(sum);
        }
        let mut total = 0.0;
        for (unit, chunks) in self.all() {
            let mut sum = 0.0;
            for chunk in &of_chunk[chunks] {
                let missing = || format!("no rank gave the sum of squares of a part of {}", unit.name);
                sum += chunk.ok_or_else(|| Error::Argument(missing()))?;
            }
            total += sum;
        }
        Ok(f64::sqrt(total))
    }
}
