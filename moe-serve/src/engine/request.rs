//! What the engine is asked to do ([`Job`]) and whom it tells ([`Listener`]).

use super::logprobs::TokenLogprobs;
use crate::Result;
use moe_models::LayerExperts;
use std::fmt::Debug;
use std::sync::Arc;

/// What the continuations of a job may say.
pub trait Grammar: Debug + Send + Sync {
    /// Before the first token of one continuation.
    fn start(&self) -> Box<dyn GrammarState>;
}

/// Where one continuation is in its grammar.
pub trait GrammarState: Debug + Send {
    /// The tokens that may come next: token `id` is bit `id % 32` of word `id / 32`. Tokens that end a text are among them where it
    /// may end.
    ///
    /// # Errors
    /// [`crate::Error::Grammar`] if the grammar cannot go on.
    fn allowed(&self) -> Result<Vec<u32>>;
    /// Goes on by a token that was allowed and ends nothing.
    ///
    /// # Errors
    /// As [`GrammarState::allowed`].
    fn push(&mut self, token_id: u32) -> Result<()>;
    /// Whether the text is whole and nothing more may be said.
    fn is_complete(&self) -> bool;
}

/// How the next token is drawn. Applied in this order: `logit_bias`, penalties, `temperature`, `top_k`, `top_p`, `min_p`.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token (the lowest id among equals).
    pub temperature: f32,
    /// Keeps the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of likeliest tokens whose probability reaches `top_p`; in `(0, 1]`.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the likeliest; in `[0, 1]`.
    pub min_p: f32,
    /// Divides positive logits (multiplies negative ones) of every token of prompt and output; 1 is neutral.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token already generated.
    pub presence_penalty: f32,
    /// Subtracted from a logit once per occurrence of the token among the generated ones.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same request, same model: same text.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// When a sequence ends.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopParams {
    /// Tokens to generate at most. A sequence also ends, by length, where the model's context ends.
    pub max_tokens: usize,
    /// Tokens of prompt and answer together, at most, though one is generated in any case.
    pub max_length: Option<usize>,
    /// Until so many tokens are generated, no stop token is sampled.
    pub min_tokens: usize,
    /// These end the sequence, beside the model's end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Treats the model's end-of-sequence tokens as ordinary ones.
    pub ignore_eos: bool,
}

impl StopParams {
    /// Tokens that may follow a prompt of so many in a context of so many.
    pub(crate) fn tokens_after(&self, prompt: usize, context: usize) -> usize {
        let to_length = self.max_length.map_or(usize::MAX, |length| length.saturating_sub(prompt).max(1));
        self.max_tokens.min(to_length).min(context.saturating_sub(prompt))
    }
}

/// One request: every prompt is continued `n` times with the same parameters.
///
/// Continuations are numbered `prompt_index * n + k`; number `i` draws from stream `i` of the seed. Its tokens depend on nothing
/// but the job and the model: not on other jobs, nor on when and beside what it runs.
#[derive(Debug, Clone)]
pub struct Job {
    /// Token ids, none empty, each at most the model's context (less one when tokens are to be generated).
    pub prompts: Vec<Vec<u32>>,
    /// Continuations per prompt, at least 1.
    pub n: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// When a continuation ends.
    pub stop: StopParams,
    /// Likeliest alternatives to report with the log-probability of each generated token; `None` reports neither.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Whether the experts of each token are reported.
    pub experts: bool,
    /// Jobs with smaller numbers go first.
    pub priority: i32,
    /// What continuations may say; anything, without it. One that is complete ends, [`FinishReason::Stop`].
    pub grammar: Option<Arc<dyn Grammar>>,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            n: 1,
            sampling: SamplingParams::default(),
            stop: StopParams::default(),
            logprobs: None,
            prompt_logprobs: None,
            experts: false,
            priority: 0,
            grammar: None,
        }
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was sampled, or the listener asked to stop.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
}

impl FinishReason {
    /// The word used on the wire and as a metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What the engine learned from reading a prompt.
#[derive(Debug, Clone, Default)]
pub struct PromptOutput {
    /// Per prompt token, if asked for; the first is `None`, for nothing predicts it.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// Per MoE layer, if asked for; rows are the prompt's tokens.
    pub experts: Vec<LayerExperts>,
    /// Tokens that did not have to be read, for they were kept from a prompt before.
    pub cached_tokens: usize,
}

/// A token drawn for a continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub token_id: u32,
    /// Whether it is a stop token and so ends the sequence.
    pub is_stop: bool,
    /// Its log-probability and the alternatives, if asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Whether a sequence goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Generate the next token.
    Continue,
    /// End the sequence, [`FinishReason::Stop`].
    Stop,
}

/// Receives what a job produces, in order for each continuation, on the engine's thread. Implementations must not block.
pub trait Listener: Send {
    /// A prompt was read. Its continuations follow, among those of other prompts.
    fn prompt(&mut self, prompt_index: usize, output: PromptOutput);
    /// A token was sampled for continuation `choice`.
    fn token(&mut self, choice: usize, token: SampledToken) -> Flow;
    /// The experts of the token last reported for `choice`, one row per layer; only if the job asked for them.
    fn experts(&mut self, choice: usize, experts: Vec<LayerExperts>);
    /// Continuation `choice` ended.
    fn finished(&mut self, choice: usize, reason: FinishReason);
    /// The job is over; nothing follows.
    fn done(&mut self, result: Result<()>);
}
