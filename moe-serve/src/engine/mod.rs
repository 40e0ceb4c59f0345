//! The engine: token ids in, token ids out. It knows neither text nor HTTP.
//!
//! One OS thread works on many [`Job`]s at a time. Step by step the scheduler says which sequences read how many tokens, the
//! model's replicas run that, tokens are drawn, and what came out goes to the jobs' [`Listener`]s, on the engine's thread. The
//! tokens of a job depend on the job alone: not on its neighbours in a step, the cuts of its prompt, what was kept of earlier
//! prompts, lost pages or guesses.

mod active;
mod choice;
mod config;
mod handle;
mod inbox;
mod logprobs;
mod plain_draw;
mod ranks;
mod replicas;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod speculation;
mod watch;
mod worker;

pub use config::{EngineConfig, SchedulingConfig, SpeculationConfig};
pub use handle::{Engine, EngineThread};
pub use inbox::CancelFlag;
pub use logprobs::{TokenLogprob, TokenLogprobs};
pub use plain_draw::{PlainDraw, PlainDrawn};
pub use ranks::{RankReplicas, follow};
pub use replicas::{LocalReplica, ReplicaOutput, ReplicaStep, Replicas};
pub use request::{
    FinishReason, Flow, Grammar, GrammarState, Job, Listener, PromptOutput, SampledToken, SamplingParams, StopParams,
};
pub use sampler::{Sampler, TokenLimits};
pub use watch::{JobStats, Observer, Outcome, StepStats};
