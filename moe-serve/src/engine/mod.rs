//! The engine: token ids in, token ids out. It knows neither text nor HTTP.
//!
//! One OS thread owns the generation loop and runs one [`Job`] at a time; a bounded queue holds the rest.
//! What it produces goes to the job's [`Listener`], on the engine's thread.

mod generation;
mod logprobs;
mod queue;
mod request;
mod runner;
mod sampler;

pub use logprobs::{TokenLogprob, TokenLogprobs};
pub use queue::CancelFlag;
pub use request::{FinishReason, Flow, Job, Listener, PromptOutput, SampledToken, SamplingParams, StopParams};
pub use runner::{Engine, EngineConfig, Observer, Outcome};
pub use sampler::{Sampler, sample_index};
