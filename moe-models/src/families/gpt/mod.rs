//! The paper's GPT family: dense, MoE every n-th layer, Pyramid, Residual, PR-MoE.
//!
//! Pre-LayerNorm blocks, learned positions, GELU (tanh), output tied to the embedding (paper section 4, Megatron's GPT).

mod config;
mod json;
mod layers;
mod presets;
#[cfg(test)]
mod tests;

pub use crate::batch::{IGNORED, LayerLoad, LossOutput, Pass, TokenBatch};
pub use crate::config::ParameterCount;
pub use config::{GptConfig, GptMoeConfig};
pub(super) use json::MODEL_TYPE;

/// A model of the family.
pub type Gpt = crate::Model<GptConfig>;
