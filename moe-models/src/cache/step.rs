//! [`PagedStep`]: the new tokens of a ragged batch, where they stand and where their keys and values go. Plain numbers.

use super::{CachedSequence, Pages, PoolConfig};
use crate::causal_lm::LogitsOf;
use crate::{Error, Result};
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
    seed: u64,
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
    /// [`Error::OutOfPages`]
    pub fn add(
        &mut self,
        sequence: &mut CachedSequence,
        token_ids: &[u32],
        logits: LogitsOf,
        pages: &Pages,
    ) -> Result<()> {
        self.copies.extend(sequence.reserve(token_ids.len(), pages)?);
        let (len, new) = (sequence.len() + token_ids.len(), token_ids.len());
        let part = Part { seed: sequence.seed(), pages: sequence.page_ids(), len, new, logits };
        self.push(part, token_ids, pages.config().page_size);
        Ok(())
    }

    /// Adds a sequence whose pages are taken.
    fn push(&mut self, part: Part, token_ids: &[u32], page_size: usize) {
        self.token_ids.extend_from_slice(token_ids);
        for position in part.len - part.new..part.len {
            self.positions.push(position as u32);
            self.slots.push(part.pages[position / page_size] * page_size as u32 + (position % page_size) as u32);
            self.draws.push((part.seed, position as u32));
        }
        self.parts.push(part);
    }

    /// All of it as numbers, for the rank that has the pages. [`PagedStep::from_words`] reads them.
    pub fn to_words(&self) -> Vec<u32> {
        let mut words = vec![self.parts.len() as u32, self.copies.len() as u32];
        words.extend(self.copies.iter().flat_map(|&(from, to)| [from, to]));
        let mut ids = self.token_ids.iter();
        for part in &self.parts {
            let logits = match part.logits {
                LogitsOf::None => 0,
                LogitsOf::Last => 1,
                LogitsOf::All => 2,
            };
            words.extend([part.seed as u32, (part.seed >> 32) as u32, part.len as u32, part.new as u32, logits]);
            words.extend(&part.pages);
            words.extend(ids.by_ref().take(part.new));
        }
        words
    }

    /// The step that `words` say, for a pool of such pages.
    ///
    /// # Errors
    /// [`Error::Argument`] if they say none, or name a page that the pool does not have.
    pub fn from_words(words: &[u32], pages: PoolConfig) -> Result<Self> {
        let mut words = Words(words);
        let mut step = Self::default();
        let (num_parts, num_copies) = (words.next()?, words.next()?);
        for pair in words.take(2 * num_copies as usize)?.chunks_exact(2) {
            step.copies.push((pages.check(pair[0])?, pages.check(pair[1])?));
        }
        for _ in 0..num_parts {
            let seed = u64::from(words.next()?) | u64::from(words.next()?) << 32;
            let (len, new) = (words.next()? as usize, words.next()? as usize);
            let logits = match words.next()? {
                0 => LogitsOf::None,
                1 => LogitsOf::Last,
                2 => LogitsOf::All,
                _ => return Err(Words::broken()),
            };
            if new > len {
                return Err(Words::broken());
            }
            let held = words.take(len.div_ceil(pages.page_size))?.iter();
            let held = held.map(|&page| pages.check(page)).collect::<Result<_>>()?;
            let token_ids = words.take(new)?;
            step.push(Part { seed, pages: held, len, new, logits }, token_ids, pages.page_size);
        }
        if words.0.is_empty() { Ok(step) } else { Err(Words::broken()) }
    }

    /// The same in `count` steps of about as many tokens, cut between sequences; none where there is no such cut. Pages are
    /// copied already.
    pub(crate) fn split(&self, count: usize, page_size: usize) -> Option<Vec<Self>> {
        if count < 2 || self.parts.len() < count {
            return None;
        }
        let total = self.token_ids.len();
        let (mut steps, mut end) = (vec![Self::default(); count], 0);
        for part in &self.parts {
            // The one that the middle of its tokens falls into.
            let index = (2 * end + part.new) * count / (2 * total).max(1);
            let token_ids = &self.token_ids[end..end + part.new];
            steps[index.min(count - 1)].push(part.clone(), token_ids, page_size);
            end += part.new;
        }
        let longest = steps.iter().map(|step| step.token_ids.len()).max()?;
        let shortest = steps.iter().map(|step| step.token_ids.len()).min()?;
        // Even to a fifth.
        (shortest > 0 && 5 * longest * count <= 6 * total).then_some(steps)
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

/// Numbers that are read one after the other.
struct Words<'a>(&'a [u32]);

impl<'a> Words<'a> {
    fn broken() -> Error {
        Error::Argument("these words are no step: they were cut off or come from another version".into())
    }

    fn take(&mut self, count: usize) -> Result<&'a [u32]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(Self::broken)?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<u32> {
        Ok(self.take(1)?[0])
    }
}

impl PoolConfig {
    fn check(self, page: u32) -> Result<u32> {
        if (page as usize) < self.num_pages {
            return Ok(page);
        }
        Err(Error::Argument(format!("page {page} is not one of {}", self.num_pages)))
    }
}
