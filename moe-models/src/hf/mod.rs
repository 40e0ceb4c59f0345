//! Checkpoints the Hugging Face way: `config.json`, `model.safetensors` (or shards with an index), one tensor per expert.
//!
//! In memory the experts of a layer are stacked, `mlp.experts.fc_in.weight` `[experts, d_ff, d_model]`; files hold one tensor
//! per expert under the names their family publishes, or one for all of them ([`NameTable`], [`Layout`]), of which one expert is
//! read at a time, so that any layout of ranks can read its own. A folder may hold its matrices as integers ([`quantization`]).

mod checkpoint;
mod file;
mod files;
mod kept;
mod layout;
pub(crate) mod map;
pub(crate) mod mxfp4;
mod names;
pub mod quantization;
mod rows;
mod shards;
pub mod size;
mod tensor_file;
#[cfg(test)]
mod tests;
mod write;

pub use checkpoint::{Checkpoint, WeightForm};
pub(crate) use checkpoint::{RANKS_INDEX, WEIGHTS_FILE, WEIGHTS_INDEX};
pub use file::write_atomically;
pub(crate) use file::{TEMPORARY_PREFIX, Unfinished, copy_if_there, is_plain_name, remove_abandoned};
pub(crate) use files::TensorFiles;
pub(crate) use kept::KeptPath;
pub use layout::Layout;
pub(crate) use map::Bytes;
pub use names::{FilePart, NameRule, NameTable, StackPlace, StackRule};
pub(crate) use shards::{refuse_adapters, weight_files};
pub(crate) use tensor_file::{TensorFile, TensorHeader, write_header, write_values};
pub(crate) use write::{SHARD_BYTES, file_tensors, save, write_config, write_weight_index, write_weights};
