//! [`PartReport`]: what a rank tells the one that ends a save.

use super::super::checkpoint::FileCheck;
use super::super::ranks::{from_words, to_words};
use super::index::{Entry, Save};
use super::part::SavingRank;
use crate::hf::WeightForm;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The files that a rank wrote, and what is in them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartReport {
    pub(super) save: Save,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    pub(super) weights: WeightForm,
    pub(super) files: Vec<FileCheck>,
    pub(super) entries: Vec<Entry>,
}

impl PartReport {
    /// Of no file yet.
    pub(super) fn new(by: SavingRank, weights: WeightForm) -> Self {
        let SavingRank { save, rank, ranks } = by;
        Self { save, rank, ranks, weights, files: Vec::new(), entries: Vec::new() }
    }

    /// Who wrote them.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The files.
    pub fn files(&self) -> &[FileCheck] {
        &self.files
    }

    /// What is in them.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// As a message: its length in bytes, then the bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] if it cannot be told.
    pub fn to_words(&self) -> Result<Vec<u64>> {
        let told = serde_json::to_vec(self);
        let bytes =
            told.map_err(|e| Error::Argument(format!("the report of rank {} cannot be told: {e}", self.rank)))?;
        Ok(to_words(&bytes))
    }

    /// The message that `rank` sent.
    ///
    /// # Errors
    /// [`Error::OtherRank`] for one that is no report, or another rank's.
    pub fn from_words(rank: usize, words: &[u64]) -> Result<Self> {
        let unreadable = |reason: String| Error::OtherRank {
            rank,
            text: format!("sent no report of its part of a checkpoint ({reason}); do all ranks run the same program?"),
        };
        let bytes =
            from_words(words).ok_or_else(|| unreadable(format!("a length that {} words do not have", words.len())))?;
        let report: Self = serde_json::from_slice(&bytes).map_err(|e| unreadable(e.to_string()))?;
        match report.rank == rank {
            true => Ok(report),
            false => Err(unreadable(format!("that of rank {}", report.rank))),
        }
    }
}
