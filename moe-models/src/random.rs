//! [`write_random`]: a model folder of initial weights, of any family and size, without the model in memory.

use crate::hf::{SHARD_BYTES, file_tensors, write_config, write_weights};
use crate::train::FolderFiles;
use crate::train::export::fill_target;
use crate::{Family, Result};
use candle_core::DType;
use rayon::prelude::*;
use std::path::Path;

/// What a folder of initial weights holds.
#[derive(Debug, Clone, Copy)]
pub struct RandomFolder<'a> {
    /// What the weights are drawn from: the same as [`crate::Model::new`] has for this seed.
    pub seed: u64,
    /// Number format of the weights.
    pub dtype: DType,
    /// The content of its `tokenizer.json`.
    pub tokenizer_json: &'a str,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Elements.
    pub parameters: usize,
    /// Tensors in files.
    pub tensors: usize,
    /// Their size.
    pub bytes: usize,
}

/// Elements that a thread draws at a time.
const DRAWN_AT_ONCE: usize = 1 << 16;

/// Writes a folder of initial weights: whole or not at all. One tensor, or one expert of one, is in memory at a time.
///
/// # Errors
/// As [`crate::train::export::check_target`]; [`crate::Error::Io`] if a file cannot be written; [`crate::Error::Argument`] for a
/// type that weights do not have.
pub fn write_random<F: Family + ?Sized>(family: &F, folder: &RandomFolder<'_>, dir: &Path) -> Result<Written> {
    let decoder = family.decoder()?;
    let table = decoder.params();
    let tensors = file_tensors(&table, family.names(), folder.dtype)?;
    let written = Written {
        parameters: table.elem_count(),
        tensors: tensors.len(),
        bytes: tensors.iter().map(|tensor| tensor.header.bytes()).sum(),
    };
    fill_target(dir, |dir| {
        write_weights(dir, tensors, SHARD_BYTES, |spec, piece| {
            let (index, elements) = (piece.expert.unwrap_or(0), piece.elements.clone());
            let parts = elements.clone().step_by(DRAWN_AT_ONCE).collect::<Vec<_>>();
            let draw = |&start: &usize| {
                let end = elements.end.min(start + DRAWN_AT_ONCE);
                spec.initial_range(folder.seed, index, start..end)
            };
            Ok(parts.par_iter().flat_map_iter(draw).collect())
        })?;
        write_config(family, dir, folder.dtype)?;
        FolderFiles::from(folder.tokenizer_json.to_owned()).write(decoder.max_seq_len, dir)
    })?;
    Ok(written)
}
