//! [`Fault`]: what ended a communication. One rank finds it, every rank returns it.

use super::Stamp;
use std::fmt;
use std::time::Duration;

/// Why an operation could not end.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// The deadline passed and these ranks of the world had sent nothing; beside each, the operation it was last known in.
    Timeout {
        /// Ranks that are missing.
        missing: Vec<(usize, Option<Stamp>)>,
        /// How long was waited.
        after: Duration,
    },
    /// A rank has left: its program ended, or it was killed.
    Left {
        /// The world's rank.
        peer: usize,
    },
    /// A rank does something else.
    Diverged {
        /// The world's rank.
        peer: usize,
        /// What it does.
        theirs: Stamp,
    },
    /// A rank sent another number of bytes than was agreed.
    Size {
        /// The world's rank.
        peer: usize,
        /// What was agreed.
        expected: usize,
        /// What came.
        got: usize,
    },
    /// This rank was told by a fault plan to stop here.
    Killed,
    /// The engine reported an error.
    Engine(String),
}

/// What ended a communication, told to every rank.
#[derive(Clone, PartialEq, Eq)]
pub struct Fault {
    /// The world's rank that found it.
    pub rank: usize,
    /// What that rank was doing.
    pub stamp: Stamp,
    /// What went wrong.
    pub cause: Cause,
}

impl Fault {
    /// The ranks of the world that are to blame, as far as the finder could see.
    pub fn ranks(&self) -> Vec<usize> {
        match &self.cause {
            Cause::Timeout { missing, .. } => missing.iter().map(|(rank, _)| *rank).collect(),
            Cause::Left { peer } | Cause::Diverged { peer, .. } | Cause::Size { peer, .. } => vec![*peer],
            Cause::Killed | Cause::Engine(_) => vec![self.rank],
        }
    }

    /// The fault in an error of candle's, where there is one: candle's backward pass carries it so.
    pub fn of_candle(error: &candle_core::Error) -> Option<&Self> {
        match error {
            candle_core::Error::WrappedContext { wrapped, .. } => wrapped.downcast_ref(),
            candle_core::Error::WithBacktrace { inner, .. } | candle_core::Error::Context { inner, .. } => {
                Self::of_candle(inner)
            }
            candle_core::Error::WithPath { inner, .. } => Self::of_candle(inner),
            _ => None,
        }
    }

    /// The fault in an error of a layer, where there is one.
    pub fn of_core(error: &moe_core::Error) -> Option<&Self> {
        match error {
            moe_core::Error::Candle(error) => Self::of_candle(error),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, stamp, cause } = self;
        write!(f, "rank {rank} in {stamp}: ")?;
        match cause {
            Cause::Timeout { missing, after } => {
                write!(f, "no message within {:.1} s from ", after.as_secs_f64())?;
                for (index, (rank, last)) in missing.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "; " };
                    match last {
                        Some(last) => write!(f, "{comma}rank {rank}, last seen in {last}")?,
                        None => write!(f, "{comma}rank {rank}, never seen")?,
                    }
                }
                Ok(())
            }
            Cause::Left { peer } => write!(f, "rank {peer} has left"),
            Cause::Diverged { peer, theirs } => {
                write!(
                    f,
                    "rank {peer} is in {theirs} instead; all ranks of a group must call the same operations in the same order"
                )
            }
            Cause::Size { peer, expected, got } => {
                write!(f, "rank {peer} sent {got} bytes where {expected} were agreed")
            }
            Cause::Killed => f.write_str("stopped by its fault plan"),
            Cause::Engine(text) => f.write_str(text),
        }
    }
}

/// As text: this is what candle prints of a wrapped error.
impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for candle_core::Error {
    fn from(fault: Fault) -> Self {
        Self::WrappedContext { wrapped: Box::new(fault), context: "communication between ranks".into() }
    }
}
