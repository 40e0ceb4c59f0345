//! What a transformer is made of besides its experts: norm, attention, loss, each one graph node with its own gradient.

mod attention;
mod cross_entropy;
mod layer_norm;
#[cfg(test)]
mod tests;

pub use attention::{causal_attention, causal_attention_cached};
pub use cross_entropy::{IGNORED, cross_entropy};
pub use layer_norm::layer_norm;
