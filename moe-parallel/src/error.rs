//! The crate's one error type. What ends a communication is a [`Fault`](crate::comm::Fault), which every rank is told.

use crate::comm::Fault;

/// What can go wrong in `moe-parallel`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A communication ended: a rank is missing, dead, slow, or does something else than the others.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// A layout that these ranks cannot have; the text names the setting and the nearest possible ones.
    #[error("{0}")]
    Layout(String),
    /// An argument is impossible; the text names it, what was expected and what came.
    #[error("{0}")]
    Argument(String),
    /// A layer refused its input.
    #[error(transparent)]
    Core(#[from] moe_core::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The engine below could not be started, or refused a call before anything was sent.
    #[error("{0}")]
    Engine(String),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The fault behind this error, also where it came through candle's or `moe-core`'s error.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Fault(fault) => Some(fault),
            Self::Core(error) => Fault::of_core(error),
            Self::Candle(error) => Fault::of_candle(error),
            _ => None,
        }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            Error::Core(moe_core::Error::Candle(error)) => error,
            Error::Fault(fault) => fault.into(),
            other => Self::wrap(other),
        }
    }
}

impl From<Error> for moe_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Core(error) => error,
            other => Self::Candle(other.into()),
        }
    }
}
