//! Mixture-of-experts language models: the PR-MoE GPT family of DeepSpeed-MoE, checkpoints the Hugging Face way, and
//! the trainer.

mod causal_lm;
mod error;
pub mod gpt;
pub mod hf;
pub mod train;

pub use causal_lm::{CausalLm, KvCache, LayerExperts, StepOutput};
pub use error::{Error, Result};
pub use moe_kernels::Precision;
