//! Writes a model folder for serving: configuration, weights and tokenizer, the Hugging Face way.

use super::files::{create_dir, create_dir_atomically};
use super::folder_files::FolderFiles;
use crate::{Error, Family, Model, Result};
use candle_core::DType;
use std::path::Path;

/// Refuses a target that could not be written later, so that a long run does not end in vain.
///
/// # Errors
/// [`Error::Argument`] if `dir` exists and is not an empty folder, [`Error::Io`] if its parent cannot be created.
pub fn check_target(dir: &Path) -> Result<()> {
    let empty_folder = || std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if dir.exists() && !empty_folder() {
        return Err(Error::Argument(format!(
            "{} exists and is not an empty folder; choose another export folder",
            dir.display()
        )));
    }
    dir.parent().filter(|p| !p.as_os_str().is_empty()).map_or(Ok(()), create_dir)
}

/// Writes a model that is here whole as `dtype` with `files` into the new folder `dir`: whole or not at all. From a
/// checkpoint of any ranks: [`super::shards::export`].
///
/// # Errors
/// As [`check_target`]; [`Error::Io`] and the model's own errors if a file cannot be written.
pub fn export<F: Family>(model: &Model<F>, files: &FolderFiles, dir: &Path, dtype: DType) -> Result<()> {
    fill_target(dir, |folder| {
        model.save(folder, dtype)?;
        files.write(model.decoder_config().max_seq_len, folder)
    })
}

/// Makes the folder `dir`, filled by `fill`: whole or not at all.
///
/// # Errors
/// As [`check_target`]; those of `fill`.
pub(crate) fn fill_target(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    check_target(dir)?;
    if dir.exists() {
        std::fs::remove_dir(dir).map_err(|e| Error::io(dir, e))?;
    }
    create_dir_atomically(dir, fill)
}
