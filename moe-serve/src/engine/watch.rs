//! [`Observer`]: who watches the engine.

use super::request::FinishReason;
use moe_models::LayerExperts;
use std::time::Duration;

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All continuations ended.
    Finished(FinishReason),
    /// Nobody wanted the result any more.
    Aborted,
    /// The model returned a logit that is not a number.
    Corrupted,
    /// It failed in another way.
    Failed,
}

/// What a job that started came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobStats {
    /// From submission to start.
    pub queued: Duration,
    /// From submission to the first token, if one came.
    pub first_token: Option<Duration>,
    /// From submission to the end.
    pub total: Duration,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens of all continuations.
    pub generated_tokens: usize,
    /// Between two tokens of a continuation, on the mean, if one had two.
    pub time_per_token: Option<Duration>,
}

/// What a step was.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepStats {
    /// Sequences that took part.
    pub sequences: usize,
    /// Tokens read, guesses among them.
    pub tokens: usize,
    /// Guesses read, and those among them that came true.
    pub drafts: (usize, usize),
    /// The whole step, and the part of it that the model took.
    pub seconds: (f64, f64),
    /// Sequences that are worked on.
    pub running: usize,
    /// Sequences that wait, those that were begun and lost their pages among them.
    pub waiting: usize,
    /// Share of the pages that sequences hold.
    pub page_usage: f64,
    /// Since the start: times that a sequence lost its pages.
    pub preemptions: u64,
    /// Since the start: prompt tokens looked for among what is kept, and those found.
    pub prefix: (u64, u64),
}

/// Watches the engine, for metrics. Called on the engine's thread; must not block. What is not overridden is not watched.
#[allow(unused_variables, reason = "the names document the arguments")]
pub trait Observer: Send + Sync {
    /// A job left the queue after waiting `queued`.
    fn started(&self, queued: Duration) {}
    /// A prompt of so many tokens was read, of which `cached` were known.
    fn prompt(&self, num_tokens: usize, cached: usize) {}
    /// A token was sampled, `elapsed` after the one before it (after submission for a continuation's first).
    fn token(&self, first_of_job: bool, first_of_choice: bool, elapsed: Duration) {}
    /// Experts one step used.
    fn experts(&self, experts: &[LayerExperts]) {}
    /// A step is over.
    fn step(&self, stats: &StepStats) {}
    /// A started job ended.
    fn finished(&self, outcome: Outcome, stats: &JobStats) {}
    /// A job was given up before it started.
    fn abandoned(&self) {}
    /// No job is left.
    fn drained(&self) {}
}

/// Nobody watches.
impl Observer for () {}
