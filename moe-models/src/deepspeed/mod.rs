//! Checkpoints of Megatron-DeepSpeed: a GPT, dense or with DeepSpeed's MoE layers, becomes a folder of the `moe_gpt` family.
//!
//! ```text
//! latest                                               the newest checkpoint's folder
//! global_step1000/mp_rank_00_model_states.pt           what is no expert, of each tensor slice; Megatron's arguments
//!                 layer_0_expert_0_mp_rank_00_model_states.pt      an expert, of each slice, or of the one that wrote it whole
//! ```
//!
//! Files are mapped (`torch_file.rs`), and their pickles read without running what they name (`pickle.rs`). `folder.rs` finds the
//! files, `arguments.rs` and `shape.rs` make the configuration, `names.rs`, `plan.rs` and `source.rs` say where each parameter is; one
//! tensor is in memory at a time while the new folder is written. Optimizer states are not read. What this family's model cannot be
//! is refused by its name.
//!
//! # Source
//! DeepSpeed 0.19.8 `runtime/engine.py` (names of files and of experts), Megatron-DeepSpeed f4157bea `megatron/checkpointing.py`,
//! `megatron/model` (names of tensors, orders of queries, keys and values).

mod arguments;
mod folder;
mod names;
mod pickle;
mod plan;
mod shape;
mod source;
#[cfg(test)]
mod tests;
mod tokenizer;
mod torch_file;

pub use tokenizer::gpt2_tokenizer;

use crate::gpt::GptConfig;
use crate::hf::{SHARD_BYTES, file_tensors, write_config, write_weights};
use crate::train::FolderFiles;
use crate::train::export::{check_target, fill_target};
use crate::train::tokenizer::{check_fits, eos_id, to_json};
use crate::{Family, Result};
use arguments::{Arguments, refuse_for_dense};
use candle_core::DType;
use folder::Folder;
use plan::Plan;
use serde_json::{Map, Value};
use shape::Shape;
use std::path::Path;
use tokenizers::Tokenizer;

/// What is imported, and how.
#[derive(Debug, Clone)]
pub struct Import<'a> {
    /// The folder with `latest` in it, or that of one checkpoint.
    pub from: &'a Path,
    /// Which checkpoint; the one that `latest` names, or `from` itself, if `None`.
    pub tag: Option<&'a str>,
    /// Arguments of Megatron that the checkpoint does not hold, by name (`num_attention_heads`, `checkpoint_version`, `topk`, ...).
    pub arguments: &'a Map<String, Value>,
    /// Type of the weights; theirs if `None`, or f32 if they have several.
    pub dtype: Option<DType>,
    /// The tokenizer that the model was trained with.
    pub tokenizer: &'a Tokenizer,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// The model.
    pub config: GptConfig,
    /// Type of its weights.
    pub dtype: DType,
    /// Tensor slices that were put together.
    pub slices: usize,
}

/// Writes the model of a checkpoint into the new folder `out`, with its tokenizer: whole or not at all.
///
/// # Errors
/// As [`crate::train::export::check_target`] for `out`; [`crate::Error::Format`] naming the file that is missing or damaged, or the
/// tensor or argument that no model of this family has; [`crate::Error::Argument`] for an argument that is unknown or contradicts the
/// checkpoint; [`crate::Error::Config`] if the tokenizer has more tokens than the model; [`crate::Error::Io`].
pub fn import(import: &Import<'_>, out: &Path) -> Result<Imported> {
    check_target(out)?;
    let folder = Folder::open(import.from, import.tag)?;
    let arguments = Arguments::read(&folder.slices[0].file, import.arguments)?;
    let mut shape = Shape::of(&folder, &arguments)?;
    if shape.config.moe.is_none() {
        refuse_for_dense(import.arguments)?;
    }
    check_fits(import.tokenizer, shape.config.vocab_size)?;
    shape.config.eos_token_id = Some(eos_id(import.tokenizer)?);
    let table = shape.config.decoder()?.params();
    let slices = folder.slices.len();
    let plan = Plan::new(folder, &shape, &table, arguments.qkv)?;
    let dtype = import.dtype.unwrap_or_else(|| plan.dtype());
    let tokenizer_json = to_json(import.tokenizer)?;
    fill_target(out, |dir| {
        write_weights(dir, file_tensors(&table, shape.config.names(), dtype)?, SHARD_BYTES, |spec, piece| {
            let mut values = plan.values(spec, piece.expert)?;
            values.truncate(piece.elements.end);
            values.drain(..piece.elements.start);
            Ok(values)
        })?;
        write_config(&shape.config, dir, dtype)?;
        FolderFiles::from(tokenizer_json).write(shape.config.max_seq_len, dir)
    })?;
    Ok(Imported { config: shape.config, dtype, slices })
}
