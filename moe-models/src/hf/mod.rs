//! Checkpoints the Hugging Face way: `config.json`, `model.safetensors` (or shards with an index), one tensor per expert.
//!
//! In memory the experts of a layer are stacked, `mlp.experts.fc_in.weight` `[experts, d_ff, d_model]`; files hold one tensor
//! per expert under the names their family publishes ([`NameTable`]), so that any layout of ranks can read its own.

mod checkpoint;
mod file;
mod map;
mod names;
mod tensor_file;
#[cfg(test)]
mod tests;
mod write;

pub use checkpoint::Checkpoint;
pub use file::write_atomically;
pub(crate) use map::Bytes;
pub use names::{NameRule, NameTable};
pub(crate) use write::save;
