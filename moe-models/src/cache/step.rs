//! [`PagedStep`]: where the new tokens of a ragged batch stand and where their keys and values go. Plain numbers.

use super::{CachedSequence, KvPool};
use crate::Result;
use moe_core::ops::PagedSequence;

/// A ragged batch: new tokens of several sequences, one sequence after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PagedStep {
    /// Position of each new token in its sequence.
    pub(crate) positions: Vec<u32>,
    /// Place of each new token in the pool: `page * page_size + row`.
    pub(crate) slots: Vec<u32>,
    /// Seed of the sequence and position of each new token.
    pub(crate) draws: Vec<(u64, u32)>,
    /// Pages, length with the new tokens, and number of new tokens of each sequence.
    sequences: Vec<(Vec<u32>, usize, usize)>,
}

impl PagedStep {
    /// Makes room for `new` tokens at the end of `sequence` and adds them to the batch.
    ///
    /// # Errors
    /// [`crate::Error::OutOfPages`]
    pub fn add(&mut self, sequence: &mut CachedSequence, new: usize, pool: &KvPool) -> Result<()> {
        sequence.reserve(new, pool)?;
        let pages = sequence.page_ids();
        let size = pool.config().page_size;
        for position in sequence.len()..sequence.len() + new {
            self.positions.push(position as u32);
            self.slots.push(pages[position / size] * size as u32 + (position % size) as u32);
            self.draws.push((sequence.seed(), position as u32));
        }
        self.sequences.push((pages, sequence.len() + new, new));
        Ok(())
    }

    /// For attention.
    pub(crate) fn sequences(&self) -> Vec<PagedSequence<'_>> {
        self.sequences.iter().map(|(blocks, len, new)| PagedSequence { blocks, len: *len, new: *new }).collect()
    }
}
