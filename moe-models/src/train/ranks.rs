//! [`Ranks`]: what the ranks of a run do together, between what each does alone. The trainer is written against it, and knows
//! neither communicators nor layouts.
//!
//! One step, on every rank alike:
//!
//! ```text
//! share              which micro-batches of the global batch are this rank's; losses and gradients of these alone
//! Division::start    gradients that are complete begin to be added up, while the last backward pass still runs
//! exchange           losses and loads of all micro-batches, or the error of a rank that failed
//! Division::finish   gradients: sums over all micro-batches
//! Division::gather_* sums of squares, from which every rank computes the same norm; parameters, once each has updated what it
//!                    owns
//! exchange           whether rank 0 could write what was due
//! ```
//!
//! Whatever decides about the course of a run (a norm, a loss, a stop, an error) is the same on all ranks by then, so all take
//! the same branches and none waits for one that has left.

use super::division::{Division, Undivided};
use super::optimizer::{Owned, Units};
use crate::{Error, Result};
use moe_kernels::parallel;
use moe_parallel::{Phase, Placement};
use std::fmt::Debug;
use std::ops::Range;
use std::time::{Duration, Instant};

/// How the passes of a step, or of an evaluation, run on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    /// This rank's and, where it has fewer than others, those in which it only takes part.
    pub rounds: usize,
    /// Ranks meet inside of them: all take part in every one, without tokens if need be.
    pub meeting: bool,
}

impl Passes {
    /// Of a rank that waits for nobody.
    pub fn alone(rounds: usize) -> Self {
        Self { rounds, meeting: false }
    }

    /// Runs one. Where it waits for nobody it keeps the threads of the pool awake from kernel to kernel, which is the fastest;
    /// threads that wait busily for another rank would take the cores from it.
    pub(crate) fn run<R>(self, pass: impl FnOnce() -> R) -> R {
        if self.meeting { pass() } else { parallel::together(pass) }
    }
}

/// What one rank has sent to others and waited for, since it began: `[inside of its node, to other nodes]`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Rows to experts and back.
    pub all_to_all_bytes: [u64; 2],
    /// Time in which passes waited for rows, seconds.
    pub all_to_all_seconds: [f64; 2],
    /// Gradients, their sums, and parameters.
    pub gradient_bytes: [u64; 2],
    /// Time in which any of them were under way, seconds.
    pub gradient_seconds: f64,
    /// Time of it in which steps waited for them alone, seconds.
    pub gradient_wait_seconds: f64,
}

impl Traffic {
    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let bytes = |now: [u64; 2], then: [u64; 2]| [0, 1].map(|level| now[level].saturating_sub(then[level]));
        let seconds = [0, 1].map(|level| self.all_to_all_seconds[level] - before.all_to_all_seconds[level]);
        Self {
            all_to_all_bytes: bytes(self.all_to_all_bytes, before.all_to_all_bytes),
            all_to_all_seconds: seconds,
            gradient_bytes: bytes(self.gradient_bytes, before.gradient_bytes),
            gradient_seconds: self.gradient_seconds - before.gradient_seconds,
            gradient_wait_seconds: self.gradient_wait_seconds - before.gradient_wait_seconds,
        }
    }

    fn words(&self) -> Vec<u64> {
        let [a, b] = self.all_to_all_seconds;
        let seconds = [a, b, self.gradient_seconds, self.gradient_wait_seconds].map(f64::to_bits);
        [&self.all_to_all_bytes[..], &self.gradient_bytes, &seconds].concat()
    }

    fn read(rank: usize, words: &[u64]) -> Result<Self> {
        let &[a, b, c, d, x, y, z, w] = words else { return Err(unreadable(rank)) };
        let [x, y, gradient_seconds, gradient_wait_seconds] = [x, y, z, w].map(f64::from_bits);
        Ok(Self {
            all_to_all_bytes: [a, b],
            all_to_all_seconds: [x, y],
            gradient_bytes: [c, d],
            gradient_seconds,
            gradient_wait_seconds,
        })
    }

    /// Bytes of all ranks, and the longest times.
    pub(crate) fn over(ranks: &dyn Ranks, own: &Self) -> Result<Self> {
        let mut sum = Self::default();
        for (rank, words) in exchange(ranks, Phase::Update, Ok(own.words()))?.into_iter().enumerate() {
            let one = Self::read(rank, &words)?;
            for level in [0, 1] {
                sum.all_to_all_bytes[level] += one.all_to_all_bytes[level];
                sum.gradient_bytes[level] += one.gradient_bytes[level];
                sum.all_to_all_seconds[level] = sum.all_to_all_seconds[level].max(one.all_to_all_seconds[level]);
            }
            sum.gradient_seconds = sum.gradient_seconds.max(one.gradient_seconds);
            sum.gradient_wait_seconds = sum.gradient_wait_seconds.max(one.gradient_wait_seconds);
        }
        Ok(sum)
    }
}

/// The ranks of a run, seen from one of them. All of them call the same methods in the same order. Rank 0 writes the files.
///
/// # Errors
/// All methods: [`Error`] if a rank is missing or does something else than the others; then it is one on every rank.
pub trait Ranks: Debug + Send {
    /// This rank's number.
    fn rank(&self) -> usize;

    /// Which part of the model it holds.
    fn placement(&self) -> Placement;

    /// Which of `count` micro-batches this rank computes. All ranks together compute each once; an index keeps its tokens and
    /// its seed whatever rank computes it. A rank may have none.
    fn share(&self, count: usize) -> Range<usize>;

    /// A short message to every rank; those of all ranks, in rank order. A fault names the `phase`.
    fn exchange(&self, phase: Phase, own: Vec<u64>) -> Result<Vec<Vec<u64>>>;

    /// How its passes run, where there are `count` in all: training micro-batches or batches of an evaluation.
    fn passes(&self, count: usize) -> Passes {
        Passes::alone(self.share(count).len())
    }

    /// What this rank has sent and waited for; `None` of one that has nobody to send to, on all ranks or none.
    fn traffic(&self) -> Option<Traffic> {
        None
    }

    /// This rank has failed in its passes, and others may wait for it in theirs or between them: tells them.
    fn fail(&self, _why: &Error) {}

    /// How gradients and moments of `params` are divided, which all ranks have in this order, each its part of them. A plan: nothing
    /// is exchanged.
    fn division(&self, units: Units, params: &[DividedParam]) -> Result<Box<dyn Division>>;
}

/// A parameter whose gradient and moments may be divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DividedParam {
    /// As on every rank.
    pub name: String,
    /// Parameters of one group are on the same ranks ([`super::TrainModel::grad_group`]).
    pub group: String,
}

/// A run of one rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct OneRank;

impl Ranks for OneRank {
    fn rank(&self) -> usize {
        0
    }

    fn placement(&self) -> Placement {
        Placement::WHOLE
    }

    fn share(&self, count: usize) -> Range<usize> {
        0..count
    }

    fn exchange(&self, _: Phase, own: Vec<u64>) -> Result<Vec<Vec<u64>>> {
        Ok(vec![own])
    }

    fn division(&self, units: Units, _: &[DividedParam]) -> Result<Box<dyn Division>> {
        Ok(Box::new(Undivided(Owned::everything(units))))
    }
}

/// What a message begins with.
const WELL: u64 = 0;
const FAILED: u64 = 1;

/// The messages of all ranks, in rank order. An error of any rank is one on all: its own there, [`Error::OtherRank`] elsewhere.
pub(crate) fn exchange(ranks: &dyn Ranks, phase: Phase, own: Result<Vec<u64>>) -> Result<Vec<Vec<u64>>> {
    let error = match own {
        Ok(words) => {
            let message = [WELL].into_iter().chain(words).collect();
            let messages = ranks.exchange(phase, message)?.into_iter().enumerate();
            return messages.map(|(rank, words)| read(rank, &words)).collect();
        }
        Err(error) => error,
    };
    let text = error.to_string().into_bytes();
    // This rank knows what went wrong; whether the others could be told is of no matter to it.
    ranks.exchange(phase, [FAILED].into_iter().chain(text.into_iter().map(u64::from)).collect()).ok();
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

/// Bytes as words: how many, then eight to a word.
pub(crate) fn to_words(bytes: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    [bytes.len() as u64].into_iter().chain(bytes.chunks(8).map(word)).collect()
}

/// The bytes of [`to_words`]; `None` of words that it has not made.
pub(crate) fn from_words(words: &[u64]) -> Option<Vec<u8>> {
    let (len, words) = words.split_first()?;
    let len = usize::try_from(*len).ok().filter(|len| len.div_ceil(8) == words.len())?;
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(len);
    Some(bytes)
}

/// A message that is none.
pub(crate) fn unreadable(rank: usize) -> Error {
    Error::OtherRank { rank, text: "sent a message that ends too early; do all ranks run the same program?".into() }
}

/// `own`, if every rank's is well.
pub(crate) fn all_well<T>(ranks: &dyn Ranks, phase: Phase, own: Result<T>) -> Result<T> {
    match own {
        Ok(value) => exchange(ranks, phase, Ok(Vec::new())).map(|_| value),
        Err(error) => exchange(ranks, phase, Err(error)).map(|_| unreachable!("an error of this rank stays one")),
    }
}

/// Does `work` on rank 0, then on the others, which find there what it has left behind: a cache of tokens, say. An error of one
/// is one on all. Whoever waits may do so for longer than the deadline of an operation.
///
/// # Errors
/// What `work` returns on any rank; as [`Ranks`].
pub fn first_rank_first<T: Send>(ranks: &dyn Ranks, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if ranks.rank() == 0 {
        let result = all_well(ranks, Phase::Start, meeting_others(ranks, work))?;
        while any(ranks, Phase::Start, false)? {}
        all_well(ranks, Phase::Start, Ok(result))
    } else {
        while any(ranks, Phase::Start, false)? {}
        all_well(ranks, Phase::Start, Ok(()))?;
        all_well(ranks, Phase::Start, meeting_others(ranks, work))
    }
}

/// Does `work` on a thread of its own, while this one meets the other ranks until nobody is at work any more.
fn meeting_others<T: Send>(ranks: &dyn Ranks, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    const INTERVAL: Duration = Duration::from_millis(500);
    const LOOK: Duration = Duration::from_millis(5);
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut told = Ok(true);
        while matches!(told, Ok(true)) {
            let begun = Instant::now();
            while !working.is_finished() && begun.elapsed() < INTERVAL {
                std::thread::sleep(LOOK);
            }
            told = any(ranks, Phase::Start, !working.is_finished());
        }
        let result = working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        told.and(result)
    })
}

/// The largest of the ranks' numbers.
pub(crate) fn most(ranks: &dyn Ranks, own: u64) -> Result<u64> {
    let all = exchange(ranks, Phase::Update, Ok(vec![own]))?;
    Ok(all.iter().filter_map(|words| words.first().copied()).max().unwrap_or(own))
}

/// Whether this is so on any rank.
pub(crate) fn any(ranks: &dyn Ranks, phase: Phase, own: bool) -> Result<bool> {
    Ok(exchange(ranks, phase, Ok(vec![u64::from(own)]))?.iter().any(|words| words.first() == Some(&1)))
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
        fn placement(&self) -> Placement {
            Placement::WHOLE
        }
        fn share(&self, count: usize) -> Range<usize> {
            0..count
        }
        fn exchange(&self, _: Phase, own: Vec<u64>) -> Result<Vec<Vec<u64>>> {
            Ok(vec![own, self.0.clone()])
        }
        fn division(&self, units: Units, params: &[DividedParam]) -> Result<Box<dyn Division>> {
            OneRank.division(units, params)
        }
    }

    #[test]
    fn errors_of_any_rank_are_errors_here() {
        let text: Vec<u64> = [FAILED].into_iter().chain("disk full".bytes().map(u64::from)).collect();
        let message = all_well(&WithRankOne(text), Phase::Start, Ok(())).unwrap_err().to_string();
        assert_eq!(message, "rank 1: disk full");
        assert!(all_well(&WithRankOne(vec![]), Phase::Start, Ok(())).unwrap_err().to_string().contains("rank 1"));
        let own = || Err::<(), _>(Error::Argument("mine".into()));
        for ranks in [&WithRankOne(vec![WELL]) as &dyn Ranks, &WithRankOne(vec![FAILED]), &OneRank] {
            assert!(matches!(all_well(ranks, Phase::Start, own()), Err(Error::Argument(text)) if text == "mine"));
        }
        assert_eq!(all_well(&WithRankOne(vec![WELL]), Phase::Start, Ok(7)).unwrap(), 7);
    }

    /// Bytes are summed, times are the longest.
    #[test]
    fn traffic_is_that_of_all_ranks() {
        let of = |bytes: u64, seconds: f64| Traffic {
            all_to_all_bytes: [bytes, 2 * bytes],
            all_to_all_seconds: [seconds, 1.0],
            gradient_bytes: [3 * bytes, 0],
            gradient_seconds: seconds / 2.0,
            gradient_wait_seconds: seconds / 4.0,
        };
        let words = [WELL].into_iter().chain(of(10, 0.5).words()).collect();
        let all = Traffic::over(&WithRankOne(words), &of(7, 0.25)).unwrap();
        assert_eq!(all, of(17, 0.5));
        assert_eq!(of(17, 0.5).since(&of(7, 0.25)).gradient_bytes, [30, 0]);
        assert!(Traffic::over(&WithRankOne(vec![WELL, 1]), &of(7, 0.25)).is_err());
    }

    #[test]
    fn bytes_come_back_from_their_words() {
        for bytes in [&b""[..], b"1", b"12345678", b"123456789"] {
            let words = to_words(bytes);
            assert_eq!((words.len(), from_words(&words).as_deref()), (1 + bytes.len().div_ceil(8), Some(bytes)));
            assert_eq!(from_words(&[&words[..], &[0]].concat()), None);
        }
        assert_eq!((from_words(&[]), from_words(&[u64::MAX])), (None, None));
    }

    #[test]
    fn one_rank_that_stops_stops_all() {
        for (own, other, want) in [(false, 0, false), (true, 0, true), (false, 1, true)] {
            assert_eq!(any(&WithRankOne(vec![WELL, other]), Phase::Update, own).unwrap(), want);
        }
        assert_eq!([most(&WithRankOne(vec![WELL, 7]), 5).unwrap(), most(&OneRank, 5).unwrap()], [7, 5]);
        assert!(!any(&OneRank, Phase::Update, false).unwrap() && any(&OneRank, Phase::Update, true).unwrap());
    }
}
