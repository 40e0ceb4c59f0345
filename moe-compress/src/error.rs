//! The crate's one error type.

/// What can go wrong in `moe-compress`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model or its training failed.
    #[error(transparent)]
    Model(#[from] moe_models::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An argument is out of range; the text names it and the fix.
    #[error("{0}")]
    Argument(String),
}

impl Error {
    /// For what gives a model its values.
    pub(crate) fn into_model(self) -> moe_models::Error {
        match self {
            Self::Model(error) => error,
            Self::Candle(error) => error.into(),
            Self::Argument(text) => moe_models::Error::Argument(text),
        }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
