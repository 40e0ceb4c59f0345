//! [`PagedStep`]: the new tokens of a ragged batch, where they stand and where their keys and values go. Plain numbers.

use super::{CachedSequence, Pages};
use crate::Result;
use crate::causal_lm::LogitsOf;
use moe_core::ops::PagedSequence;

/// A ragged batch: new tokens of several sequences, one sequence after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PagedStep {
    token_ids: Vec<u32>,
    /// Position of each new token in its sequence.
    pub(crate) positions: Vec<u32>,
    /// Place of each new token in the pool: `page * page_size + row`.
    pub(crate) slots: Vec<u32>,
    /// Seed of the sequence and position of each new token.
    pub(crate) draws: Vec<(u64, u32)>,
    parts: Vec<Part>,
    /// Pages whose rows another page must have before the pass, with that page.
    copies: Vec<(u32, u32)>,
}

/// One sequence of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    pages: Vec<u32>,
    /// Tokens, the new ones among them.
    len: usize,
    new: usize,
    logits: LogitsOf,
}

impl PagedStep {
    /// Makes room for new tokens at the end of `sequence` and adds them to the batch. The sequence grows by them
    /// ([`CachedSequence::grow`]) once the pass went well.
    ///
    /// # Errors
    /// [`crate::Error::OutOfPages`]
    pub fn add(
        &mut self,
        sequence: &mut CachedSequence,
        token_ids: &[u32],
        logits: LogitsOf,
        pages: &Pages,
    ) -> Result<()> {
        self.copies.extend(sequence.reserve(token_ids.len(), pages)?);
        let (len, new) = (sequence.len() + token_ids.len(), token_ids.len());
        let (ids, size) = (sequence.page_ids(), pages.config().page_size);
        self.token_ids.extend_from_slice(token_ids);
        for position in sequence.len()..len {
            self.positions.push(position as u32);
            self.slots.push(ids[position / size] * size as u32 + (position % size) as u32);
            self.draws.push((sequence.seed(), position as u32));
        }
        self.parts.push(Part { pages: ids, len, new, logits });
        Ok(())
    }

    /// New tokens of all sequences.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Position in its sequence of each new token.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Sequences.
    pub fn num_sequences(&self) -> usize {
        self.parts.len()
    }

    /// New tokens of each sequence.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().map(|part| part.new)
    }

    /// The new tokens after which logits are wanted, by their places in the batch.
    pub fn logit_rows(&self) -> Vec<u32> {
        let mut rows = Vec::new();
        let mut end = 0;
        for part in &self.parts {
            let first = end;
            end += part.new as u32;
            match part.logits {
                LogitsOf::None => {}
                LogitsOf::Last => rows.push(end - 1),
                LogitsOf::All => rows.extend(first..end),
            }
        }
        rows
    }

    /// Pages to copy before the pass, each with the page it is copied to.
    pub fn copies(&self) -> &[(u32, u32)] {
        &self.copies
    }

    /// For attention.
    pub(crate) fn sequences(&self) -> Vec<PagedSequence<'_>> {
        self.parts.iter().map(|part| PagedSequence { blocks: &part.pages, len: part.len, new: part.new }).collect()
    }
}
