//! Every bound a request meets, in one place.

use std::time::Duration;
use tokio::time::Instant;

/// Bounds the operator sets.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Requests that may wait beyond those that could start at once.
    pub max_queue: usize,
    /// From a request's arrival to the end of its answer, which a client may then take within `write_timeout`.
    pub request_timeout: Duration,
    /// From a request's arrival to the end of its body.
    pub body_timeout: Duration,
    /// From a connection's begin to its first request's whole head, and from a later request's first byte to that.
    pub header_timeout: Duration,
    /// From the end of an answer to the first byte of the next request on its connection.
    pub keep_alive_timeout: Duration,
    /// How long a client may take nothing of what is ready for it. A stream that has nothing ready is not slow.
    pub write_timeout: Duration,
    /// Connections open at one time; those that wait for their clients give way to more, which otherwise wait until one closes.
    pub max_connections: usize,
    /// After a signal to stop, so long may running answers go on.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            max_queue: 64,
            request_timeout: Duration::from_secs(600),
            body_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(30),
            max_connections: 512,
            shutdown_grace: Duration::from_secs(10),
        }
    }
}

/// When `limit` has passed since `from`; in a hundred years, if that is further than clocks go.
pub(super) fn deadline(from: Instant, limit: Duration) -> Instant {
    const LONG: Duration = Duration::from_secs(100 * 366 * 86_400);
    from.checked_add(limit.min(LONG)).unwrap_or(from)
}

/// Bodies of the largest size that may be read and parsed at one time; each takes a multiple of its size in memory.
pub(super) const MAX_LARGEST_BODIES: usize = 4;
/// Bytes of every body beside those.
pub(super) const UNSHARED_BODY_BYTES: usize = 64 << 10;
/// Nesting of a request's JSON: schemas take two levels for each of their own.
pub(super) const MAX_JSON_DEPTH: usize = 48;
/// Values in a request's JSON.
pub(super) const MAX_JSON_VALUES: usize = 1 << 20;
/// Bytes of a text whose tokens are only counted, where the model's context is not longer.
pub(super) const MAX_TOKENIZED_BYTES: usize = 1 << 20;
/// Continuations per prompt.
pub(super) const MAX_N: usize = 16;
/// Prompts per request.
pub(super) const MAX_PROMPTS: usize = 256;
/// Prompts times continuations.
pub(super) const MAX_CHOICES: usize = 512;
/// What an answer tells of its prompts' tokens: alternatives of each, layers of experts. Tokens that are generated take their time; a
/// prompt's are read by the thousand.
pub(super) const MAX_PROMPT_RECORDS: usize = 1 << 21;
/// Messages of a conversation.
pub(super) const MAX_MESSAGES: usize = 1024;
/// Text parts of a message.
pub(super) const MAX_PARTS: usize = 256;
/// Stop strings.
pub(super) const MAX_STOPS: usize = 4;
/// Bytes of a stop string.
pub(super) const MAX_STOP_BYTES: usize = 256;
/// Stop token ids.
pub(super) const MAX_STOP_TOKENS: usize = 64;
/// Alternatives per token.
pub(super) const MAX_LOGPROBS: usize = 20;
/// Entries of `logit_bias`.
pub(super) const MAX_LOGIT_BIAS: usize = 1024;
/// Bytes of a schema, a regular expression or a grammar.
pub(super) const MAX_GRAMMAR_BYTES: usize = 64 << 10;
/// Texts of which an answer is one.
pub(super) const MAX_CHOICE_TEXTS: usize = 1024;
/// Largest `priority`, and its smallest with a minus.
pub(super) const MAX_PRIORITY: i64 = 1000;
/// Bytes of `user`.
pub(super) const MAX_USER_BYTES: usize = 512;
/// Tools of a request; OpenAI's number.
pub(super) const MAX_TOOLS: usize = 128;
/// Bytes of all tools of a request.
pub(super) const MAX_TOOLS_BYTES: usize = 128 << 10;
/// Bytes of a tool's name; OpenAI's number.
pub(super) const MAX_TOOL_NAME_BYTES: usize = 64;
/// Calls in one message.
pub(super) const MAX_CALLS_IN_MESSAGE: usize = 128;
