//! [`Ranks`]: what the ranks of a run do together, between what each does alone. The trainer is written against it, and knows
//! neither communicators nor layouts.
//!
//! One step, on every rank alike:
//!
//! ```text
//! share        which micro-batches of the global batch are this rank's; losses and gradients of these alone
//! exchange     losses and loads of all micro-batches, or the error of a rank that failed
//! reduce       gradients: sums over all micro-batches
//! gather_*     sums of squares, from which every rank computes the same norm; parameters, once each has updated what it owns
//! exchange     whether rank 0 could write what was due
//! ```
//!
//! Whatever decides about the course of a run (a norm, a loss, a stop, an error) is the same on all ranks by then, so all take
//! the same branches and none waits for one that has left.

use super::optimizer::{ChunkSum, Moments, Owned, Units};
use crate::{Error, Result};
use candle_core::Var;
use moe_core::tape::GradGroup;
use moe_kernels::parallel;
use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;

/// What passes do with the threads of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// Keep them awake from kernel to kernel ([`moe_kernels::parallel::together`]): the fastest where a pass waits for nobody.
    Awake,
    /// Wake them for each kernel: where ranks meet inside of passes, since threads that wait busily would take the cores from
    /// the rank that is waited for.
    OnDemand,
}

impl Threads {
    /// Runs one pass.
    pub(crate) fn run<R>(self, pass: impl FnOnce() -> R) -> R {
        match self {
            Self::Awake => parallel::together(pass),
            Self::OnDemand => pass(),
        }
    }
}

/// The ranks of a run, seen from one of them. All of them call the same methods in the same order. Rank 0 writes the files.
///
/// What has a default does what ranks do that each own every element ([`Owned::everything`]); one that divides moments
/// replaces all four of those methods.
///
/// # Errors
/// All methods: [`Error`] if a rank is missing or does something else than the others; then it is one on every rank.
pub trait Ranks: Debug + Send {
    /// This rank's number.
    fn rank(&self) -> usize;

    /// Which of `count` micro-batches this rank computes. All ranks together compute each once; an index keeps its tokens and
    /// its seed whatever rank computes it. A rank may have none.
    fn share(&self, count: usize) -> Range<usize>;

    /// A short message to every rank; those of all ranks, in rank order.
    fn exchange(&self, own: Vec<u64>) -> Result<Vec<Vec<u64>>>;

    /// Adds up gradients over the ranks that hold the same parameters, each group by its name. A rank brings the sums over its
    /// own micro-batches and gets those over all of the global batch, which the trainer divides by their number: where a group's
    /// values count a micro-batch more than once, the implementation divides by how often. What this rank does not own
    /// ([`Ranks::owned`]) may be left as it is.
    fn reduce(&self, groups: &mut [GradGroup]) -> Result<()>;

    /// What passes do with the threads of the pool; at the door of training and evaluation passes alike.
    fn threads(&self) -> Threads {
        Threads::Awake
    }

    /// The elements this rank updates; `groups` names the group of each parameter's gradient, as in [`Ranks::reduce`]. A plan:
    /// nothing is exchanged.
    fn owned(&self, units: Units, _groups: &[String]) -> Result<Owned> {
        Ok(Owned::everything(units))
    }

    /// The sums of all chunks of the model, of which this rank brings those it owns.
    fn gather_squares(&self, own: Vec<ChunkSum>) -> Result<Vec<ChunkSum>> {
        Ok(own)
    }

    /// Brings what other ranks have updated into `params`, of which this rank has updated what it owns. The indices of those
    /// that were written to, whose copies in bf16 are then made anew.
    fn gather_params(&self, _owned: &Owned, _params: &[(String, Var)]) -> Result<Vec<usize>> {
        Ok(Vec::new())
    }

    /// The moments of whole parameters, for a checkpoint; this rank brings those of what it owns. Read on rank 0 alone.
    fn gather_moments<'a>(&self, _owned: &Owned, own: &'a [Moments]) -> Result<Cow<'a, [Moments]>> {
        Ok(Cow::Borrowed(own))
    }
}

/// A run of one rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct OneRank;

impl Ranks for OneRank {
    fn rank(&self) -> usize {
        0
    }

    fn share(&self, count: usize) -> Range<usize> {
        0..count
    }

    fn exchange(&self, own: Vec<u64>) -> Result<Vec<Vec<u64>>> {
        Ok(vec![own])
    }

    fn reduce(&self, _: &mut [GradGroup]) -> Result<()> {
        Ok(())
    }
}

/// What a message begins with.
const WELL: u64 = 0;
const FAILED: u64 = 1;

/// The messages of all ranks, in rank order. An error of any rank is one on all: its own there, [`Error::OtherRank`] elsewhere.
pub(crate) fn exchange(ranks: &dyn Ranks, own: Result<Vec<u64>>) -> Result<Vec<Vec<u64>>> {
    let error = match own {
        Ok(words) => {
            let message = [WELL].into_iter().chain(words).collect();
            return ranks.exchange(message)?.into_iter().enumerate().map(|(rank, words)| read(rank, &words)).collect();
        }
        Err(error) => error,
    };
    let text = error.to_string().into_bytes();
    // This rank knows what went wrong; whether the others could be told is of no matter to it.
    ranks.exchange([FAILED].into_iter().chain(text.into_iter().map(u64::from)).collect()).ok();
    Err(error)
}

fn read(rank: usize, words: &[u64]) -> Result<Vec<u64>> {
    match words.split_first() {
        Some((&WELL, words)) => Ok(words.to_vec()),
        Some((_, text)) => {
            let bytes: Vec<u8> = text.iter().map(|&word| word as u8).collect();
            Err(Error::OtherRank { rank, text: String::from_utf8_lossy(&bytes).into_owned() })
        }
        None => Err(unreadable(rank)),
    }
}

/// A message that is none.
pub(crate) fn unreadable(rank: usize) -> Error {
    Error::OtherRank { rank, text: "sent a message that ends too early; do all ranks run the same program?".into() }
}

/// `own`, if every rank's is well.
pub(crate) fn all_well<T>(ranks: &dyn Ranks, own: Result<T>) -> Result<T> {
    match own {
        Ok(value) => exchange(ranks, Ok(Vec::new())).map(|_| value),
        Err(error) => exchange(ranks, Err(error)).map(|_| unreachable!("an error of this rank stays one")),
    }
}

/// Whether this is so on any rank.
pub(crate) fn any(ranks: &dyn Ranks, own: bool) -> Result<bool> {
    Ok(exchange(ranks, Ok(vec![u64::from(own)]))?.iter().any(|words| words.first() == Some(&1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another rank that always says the same.
    #[derive(Debug)]
    struct WithRankOne(Vec<u64>);

    impl Ranks for WithRankOne {
        fn rank(&self) -> usize {
            0
        }
        fn share(&self, count: usize) -> Range<usize> {
            0..count
        }
        fn exchange(&self, own: Vec<u64>) -> Result<Vec<Vec<u64>>> {
            Ok(vec![own, self.0.clone()])
        }
        fn reduce(&self, _: &mut [GradGroup]) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn errors_of_any_rank_are_errors_here() {
        let text: Vec<u64> = [FAILED].into_iter().chain("disk full".bytes().map(u64::from)).collect();
        let message = all_well(&WithRankOne(text), Ok(())).unwrap_err().to_string();
        assert_eq!(message, "rank 1: disk full");
        assert!(all_well(&WithRankOne(vec![]), Ok(())).unwrap_err().to_string().contains("rank 1"));
        let own = || Err::<(), _>(Error::Argument("mine".into()));
        for ranks in [&WithRankOne(vec![WELL]) as &dyn Ranks, &WithRankOne(vec![FAILED]), &OneRank] {
            assert!(matches!(all_well(ranks, own()), Err(Error::Argument(text)) if text == "mine"));
        }
        assert_eq!(all_well(&WithRankOne(vec![WELL]), Ok(7)).unwrap(), 7);
    }

    #[test]
    fn one_rank_that_stops_stops_all() {
        for (own, other, want) in [(false, 0, false), (true, 0, true), (false, 1, true)] {
            assert_eq!(any(&WithRankOne(vec![WELL, other]), own).unwrap(), want);
        }
        assert!(!any(&OneRank, false).unwrap() && any(&OneRank, true).unwrap());
    }
}
