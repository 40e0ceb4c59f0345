//! The crate's one error type. It knows nothing of HTTP: [`crate::api`] decides which status each one becomes.

use std::path::PathBuf;

/// What can go wrong between a request and its text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model refused its input or failed.
    #[error(transparent)]
    Model(#[from] moe_models::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A file could not be read.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason; part of the message, so not a source of its own.
        reason: std::io::Error,
    },
    /// A file of the model's folder was read but is not what it should be.
    #[error("{file}: {reason}")]
    ModelFile {
        /// The file's name.
        file: String,
        /// What was expected and what came.
        reason: String,
    },
    /// A file of TLS cannot be used.
    #[error("{flag} {}: {reason}", path.display())]
    Tls {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What was expected and what came; part of the message, so not a source of its own.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The tokenizer of the model's folder gave a token that the model does not have.
    #[error(
        "the prompt needs token {token_id}, but the model's vocab_size is {vocab_size}; use the tokenizer.json it was trained with"
    )]
    UnknownToken {
        /// The token.
        token_id: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// The chat template could not be applied to these messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The metrics could not be set up.
    #[error("metrics: {0}")]
    Metrics(String),
    /// A request's field is impossible; the text says what was expected and what came.
    #[error("{message}")]
    Field {
        /// The field as the client wrote it.
        field: String,
        /// What was expected, what came, what to change.
        message: String,
    },
    /// The prompt does not fit into the model's context.
    #[error("{message}")]
    ContextLength {
        /// The field that holds the prompt.
        field: String,
        /// How long it is and how long it may be.
        message: String,
    },
    /// The waiting queue is full.
    #[error("{waiting} requests are waiting, and the queue holds {max_queue}; try again later or raise --max-queue")]
    QueueFull {
        /// Requests waiting now.
        waiting: usize,
        /// The queue's bound.
        max_queue: usize,
    },
    /// The engine takes no more requests.
    #[error("the server is shutting down and takes no new requests")]
    ShuttingDown,
    /// The request ran longer than allowed.
    #[error("the request took longer than {limit_s} s; ask for fewer tokens or raise --request-timeout-s")]
    Timeout {
        /// The limit in seconds.
        limit_s: u64,
    },
    /// The model returned logits nothing can be sampled from.
    #[error("the model returned a logit that is not a number after token {position}; the checkpoint is damaged")]
    LogitsNotFinite {
        /// Tokens the model had read.
        position: usize,
    },
    /// The grammar of a request is none, or cannot go on.
    #[error("the grammar of this request: {0}")]
    Grammar(String),
    /// Every token of the vocabulary is forbidden.
    #[error("no token is left to sample from; allow some by logit_bias, min_tokens, suppress_tokens or the grammar")]
    NothingToSample,
    /// The engine failed in a way nobody foresaw; it goes on with the next request.
    #[error("the engine failed on this request: {0}")]
    EnginePanic(String),
    /// What runs the model is gone; the engine has ended.
    #[error("the model cannot be run any more: {0}")]
    EngineLost(String),
    /// The client left, or the server stopped, before the request was done.
    #[error("the request was cancelled")]
    Cancelled,
}

/// What layers and ranks fail with is the model's failure.
impl From<moe_core::Error> for Error {
    fn from(error: moe_core::Error) -> Self {
        Self::Model(error.into())
    }
}

impl From<moe_parallel::Error> for Error {
    fn from(error: moe_parallel::Error) -> Self {
        Self::Model(error.into())
    }
}

impl Error {
    /// An [`Error::Field`].
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Field { field: field.into(), message: message.into() }
    }

    /// An [`Error::ModelFile`].
    pub fn model_file(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::ModelFile { file: file.into(), reason: reason.into() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
