//! Checkpoints the Hugging Face way: `config.json`, `model.safetensors` (or shards with an index), one tensor per expert.
//!
//! In memory the experts of a layer are stacked, `mlp.experts.fc_in.weight` `[experts, d_ff, d_model]`; files hold
//! `mlp.experts.{e}.fc_in.weight` `[d_ff, d_model]`, so that any layout of ranks can read its own.

mod config;
mod file;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use file::write_atomically;
pub(crate) use read::{from_bytes, load};
pub(crate) use write::save;

/// `prefix.experts.rest` to the name of expert `e` in a file.
fn expert_name(stacked: &str, expert: usize) -> Option<String> {
    let (prefix, rest) = stacked.split_once(".experts.")?;
    Some(format!("{prefix}.experts.{expert}.{rest}"))
}
