//! The parts of a decoder, one file each. Every part is built from a `VarBuilder` and the backend's operations, and described
//! by its part of [`crate::config`].

mod attention;
mod embedding;
mod feed_forward;
mod linear;
mod norm;
mod output_head;

pub use attention::{Attention, Rotaries};
pub use embedding::Embedding;
pub use feed_forward::FeedForward;
pub use linear::Linear;
pub use norm::Norm;
pub use output_head::OutputHead;
