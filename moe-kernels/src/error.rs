//! The crate's one error type.

/// What can go wrong in `moe-kernels`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An MoE layer refused its configuration or input.
    #[error(transparent)]
    Moe(#[from] moe_core::Error),
    /// An argument of a call does not fit; the text names it, what was expected and what came.
    #[error("{0}")]
    Argument(String),
}

impl From<Error> for moe_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(e) => Self::Candle(e),
            Error::Moe(e) => e,
            Error::Argument(text) => Self::Input(text),
        }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
