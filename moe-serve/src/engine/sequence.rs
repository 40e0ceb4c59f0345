//! [`Sequence`]: a continuation the engine works on, as the scheduler sees it: its tokens and its pages.

use moe_models::CachedSequence;
use std::time::Instant;

/// Which continuation of which job. Earlier jobs come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SequenceId {
    pub(super) job: u64,
    pub(super) choice: usize,
}

/// Where a sequence stands among others: the smaller goes first.
pub(super) type Order = (i32, SequenceId);

/// A continuation in the works.
///
/// Reading a prompt, generating, reading all again after its pages were taken away, and starting from what another sequence has
/// read are one thing: of `token_ids` some are `cached`, the rest is to be read, and after the last a token can be drawn.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Smaller goes first.
    pub(super) priority: i32,
    /// Since when it waits, or waited before it began to run.
    pub(super) waits_since: Instant,
    /// Whether what was found of it among the tokens that are kept has been counted.
    pub(super) counted: bool,
    /// Of the prompt and generated.
    pub(super) token_ids: Vec<u32>,
    pub(super) prompt_len: usize,
    /// Tokens it may come to.
    pub(super) max_len: usize,
    pub(super) cached: CachedSequence,
    /// Which replica's pages it holds.
    pub(super) replica: usize,
    /// Whether kept pages may stand for its beginning: not as long as something is to be learned by reading it.
    pub(super) reuses: bool,
    /// Whether it was part of a step that failed, and must show that it does not fail alone.
    pub(super) suspect: bool,
    /// Whether its last token is drawn, and only its experts are still wanted.
    pub(super) closing: bool,
}

impl Sequence {
    pub(super) fn order(&self) -> Order {
        (self.priority, self.id)
    }

    /// Tokens to read before one can be drawn; at least 1.
    pub(super) fn pending(&self) -> usize {
        self.token_ids.len() - self.cached.len()
    }

    /// Whether it only waits for its newest token to be read.
    pub(super) fn generates(&self) -> bool {
        self.pending() == 1 && self.token_ids.len() > self.prompt_len
    }

    /// Tokens that may be guessed after the last.
    pub(super) fn guessable(&self) -> usize {
        if self.closing { 0 } else { self.max_len.saturating_sub(self.token_ids.len() + 1) }
    }
}
