//! The crate's one error type.

use crate::train::NonFinite;
use moe_parallel::Fault;
use std::path::PathBuf;

/// What can go wrong in `moe-models`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(candle_core::Error),
    /// An MoE layer refused its configuration or input.
    #[error(transparent)]
    Moe(moe_core::Error),
    /// A kernel refused its input.
    #[error(transparent)]
    Kernel(#[from] moe_kernels::Error),
    /// The ranks of a model cannot be laid out so, or one of them failed.
    #[error(transparent)]
    Parallel(#[from] moe_parallel::Error),
    /// A configuration value is missing, unknown or impossible; the text names it and the fix.
    #[error("{0}")]
    Config(String),
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason; part of the message, so not a source of its own.
        reason: std::io::Error,
    },
    /// A file was read but its content is not what it should be.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what came.
        reason: String,
    },
    /// The tokenizer could not be trained, loaded or applied.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The pool of cached keys and values is used up.
    #[error(
        "{needed} pages of the key-value cache are needed and {free} are free; end sequences, or make a larger pool"
    )]
    OutOfPages {
        /// To go on.
        needed: usize,
        /// In the pool.
        free: usize,
    },
    /// Training made no update for too long, because losses or gradients were not finite.
    #[error(
        "{}{what}; no update for {in_a_row} steps in a row; lower lr, lengthen the warm-up, or look at the data",
        step.map_or_else(String::new, |step| format!("step {step}: "))
    )]
    NonFinite {
        /// The last step, counted from 1; `None` from an optimizer alone, which does not count them.
        step: Option<u64>,
        /// What was not finite in it.
        what: Box<NonFinite>,
        /// Steps without an update, up to this one.
        in_a_row: u64,
    },
    /// The model panicked in a training step or an evaluation.
    #[error(
        "the model panicked at micro-batch {micro_batch}: {text}; this is a defect of the program or the model, please report it"
    )]
    Panic {
        /// What it worked on: the index in the step or in the evaluation.
        micro_batch: usize,
        /// The text of the panic.
        text: String,
    },
    /// Another process writes to the folder of a run.
    #[error(
        "{} is in use by {}; wait for that run, {}, or choose another folder",
        dir.display(),
        holder.map_or_else(|| "another process".to_owned(), |id| format!("process {id}")),
        holder.map_or_else(|| "end it".to_owned(), |id| format!("end it (kill {id})"))
    )]
    InUse {
        /// The folder.
        dir: PathBuf,
        /// The id of that process; `None` if it has not written it yet.
        holder: Option<u32>,
    },
    /// Another rank of the run failed, and this one ends with it.
    #[error("rank {rank}: {text}")]
    OtherRank {
        /// Which one.
        rank: usize,
        /// Its error.
        text: String,
    },
    /// A process has come to need more memory than it may.
    #[error(
        "this process has needed {:.1} MB of memory, over its budget of {:.1} MB; raise the budget, make micro-batches smaller, \
         recompute activations, or divide more over the ranks; what was saved before is whole",
        *peak as f64 / 1e6,
        *budget as f64 / 1e6
    )]
    Memory {
        /// Most bytes at once.
        peak: usize,
        /// Bytes allowed.
        budget: usize,
    },
    /// An argument of a call is out of range; the text names it and the fix.
    #[error("{0}")]
    Argument(String),
}

impl Error {
    /// What ended the communication between ranks, where that is behind this error.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Parallel(error) => error.fault(),
            Self::Moe(error) => Fault::of_core(error),
            Self::Candle(error) => Fault::of_candle(error),
            _ => None,
        }
    }

    /// An [`Error::Io`] at `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), reason: source }
    }

    /// An [`Error::Format`] at `path`.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }
}

/// A fault between ranks comes out as itself, whichever operation it passed through: all ranks tell it in the same words.
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match Fault::of_candle(&error) {
            Some(fault) => Self::Parallel(fault.clone().into()),
            None => Self::Candle(error),
        }
    }
}

/// As from candle's error.
impl From<moe_core::Error> for Error {
    fn from(error: moe_core::Error) -> Self {
        match Fault::of_core(&error) {
            Some(fault) => Self::Parallel(fault.clone().into()),
            None => Self::Moe(error),
        }
    }
}

/// For parts of a model that run inside of an operation.
impl From<Error> for moe_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Moe(error) => error,
            Error::Candle(error) => error.into(),
            Error::Kernel(error) => error.into(),
            Error::Parallel(error) => error.into(),
            other => candle_core::Error::wrap(other).into(),
        }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;
    use moe_parallel::comm::{Cause, Kind, Phase, Site, Stamp};

    #[test]
    fn a_fault_has_the_same_words_whatever_it_passed_through() {
        let stamp = Stamp { context: 0, sequence: 1, kind: Kind::AllGather, site: Site::layer(Phase::Forward, 0) };
        let fault = Fault { rank: 3, stamp, cause: Cause::Left { peer: 1 } };
        let candle = || candle_core::Error::from(fault.clone()).bt();
        let core = || moe_core::Error::from(candle());
        for error in
            [Error::from(candle()), Error::from(core()), Error::from(moe_core::Error::from(Error::from(core())))]
        {
            assert_eq!(error.fault(), Some(&fault));
            assert_eq!(error.to_string(), fault.to_string());
        }
    }
}
