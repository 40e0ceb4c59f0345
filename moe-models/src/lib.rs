//! Mixture-of-experts language models: the PR-MoE GPT family of DeepSpeed-MoE and families people have, checkpoints the
//! Hugging Face way, and the trainer.
//!
//! A family's configuration becomes a [`DecoderConfig`]; [`Decoder`] is built from it and runs; [`Model`] owns the variables of
//! a decoder that is trained.

mod batch;
pub mod blocks;
mod cache;
mod causal_lm;
pub mod cli;
pub mod config;
mod decoder;
pub mod deepspeed;
mod dropout;
mod error;
pub mod families;
mod fields;
mod gguf;
pub mod hf;
mod integer_part;
mod layer;
mod layerwise;
mod model;
mod opened;
mod params;
pub mod random;
mod source;
pub mod train;

pub use batch::{IGNORED, LayerLoad, LossOutput, LossParts, Pass, TokenBatch, TrainPass};
pub use cache::{CacheLayout, CachedSequence, KvPool, PagedStep, Pages, PoolConfig, PrefixCache};
pub use causal_lm::{CausalLm, LayerExperts, LogitsOf, SequenceStep, StepOutput};
pub use config::DecoderConfig;
pub use decoder::{Decoder, EvalRouting};
pub use dropout::DropoutConfig;
pub use error::{Error, Result};
pub use families::{Family, ReadFamily, gpt};
pub use layer::Recompute;
pub use layerwise::LayerwisePass;
pub use model::{Kept, Model};
pub use moe_kernels::quantized::QuantFormat;
pub use moe_kernels::{PackedForms, Precision};
pub use params::{ParamSource, ParamTable};
pub use source::ModelSource;

/// The layers' crate, in the version whose types are in these signatures.
pub use moe_core;

/// The example of the README, which runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
