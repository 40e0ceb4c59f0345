//! The crate's one error type.

/// What can go wrong in `moe-core`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A configuration value is impossible; the text names the field, what came and what to change.
    #[error("{0}")]
    Config(String),
    /// An input does not fit the layer; the text names the argument, what was expected and what came.
    #[error("{0}")]
    Input(String),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
