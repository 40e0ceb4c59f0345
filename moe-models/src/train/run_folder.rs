//! [`RunFolder`]: where a run writes, and with which ranks.

use super::lock::RunLock;
use super::ranks::{OneRank, Ranks, all_well};
use crate::Result;
use moe_parallel::Phase;
use std::path::{Path, PathBuf};

/// The folder of a run, seen from one of its ranks.
#[derive(Debug)]
pub struct RunFolder {
    pub(super) dir: PathBuf,
    pub(super) ranks: Box<dyn Ranks>,
    /// On the rank that writes.
    pub(super) lock: Option<RunLock>,
}

impl RunFolder {
    /// The folder `dir` of a run over `ranks`, which all reach it under this name. Rank 0 locks it.
    ///
    /// # Errors
    /// As [`RunLock::acquire`], on every rank; and as [`Ranks`].
    pub fn shared(dir: &Path, ranks: Box<dyn Ranks>) -> Result<Self> {
        let lock = lock_for(dir, &*ranks)?;
        Ok(Self::locked(dir, ranks, lock))
    }

    /// The same where rank 0 has locked the folder before ([`lock_for`]).
    pub fn locked(dir: &Path, ranks: Box<dyn Ranks>, lock: Option<RunLock>) -> Self {
        Self { dir: dir.to_owned(), ranks, lock }
    }
}

/// Locks the folder `dir` on rank 0.
///
/// # Errors
/// As [`RunFolder::shared`].
pub fn lock_for(dir: &Path, ranks: &dyn Ranks) -> Result<Option<RunLock>> {
    let lock = if ranks.rank() == 0 { RunLock::acquire(dir).map(Some) } else { Ok(None) };
    all_well(ranks, Phase::Start, lock)
}

/// As [`lock_for`], also from a rank that was given up.
///
/// # Errors
/// As [`RunLock::take_over`], on every rank; and as [`Ranks`].
pub fn take_over_for(dir: &Path, ranks: &dyn Ranks) -> Result<Option<RunLock>> {
    let lock = if ranks.rank() == 0 { RunLock::take_over(dir).map(Some) } else { Ok(None) };
    all_well(ranks, Phase::Start, lock)
}

/// Of a run of one rank.
impl From<RunLock> for RunFolder {
    fn from(lock: RunLock) -> Self {
        Self { dir: lock.dir().to_owned(), ranks: Box::new(OneRank), lock: Some(lock) }
    }
}
