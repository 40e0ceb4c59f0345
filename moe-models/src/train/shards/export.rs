//! [`export`]: from the files of any ranks to a folder of whole tensors, as anyone reads them.

use super::super::export::{check_target, fill_target};
use super::super::folder_files::{BESIDE, TOKENIZER};
use super::index::{Kind, tensors};
use super::reader::Reader;
use crate::hf::{SHARD_BYTES, copy_if_there, file_tensors, write_config, write_weights};
use crate::{Family, ReadFamily, Result};
use candle_core::DType;
use std::path::Path;

/// Writes the weights of the checkpoint `folder`, as `dtype` and with its configuration, its tokenizer and what came with that, into the new folder `out`,
/// the Hugging Face way: whole or not at all. The bytes are those that a model of these weights saves itself, whatever the layout
/// of the ranks that wrote the checkpoint. One tensor is in memory at a time.
///
/// # Errors
/// As [`super::super::export::check_target`] for `out`; as [`Reader::open`] and [`Reader::verify`] for `folder`, also where its
/// configuration is another model's; [`crate::Error::Argument`] for a `dtype` that weights do not have; [`crate::Error::Io`].
pub fn export(folder: &Path, out: &Path, dtype: DType) -> Result<()> {
    check_target(out)?;
    let family = <Box<dyn Family>>::read_file(&folder.join("config.json"))?;
    let (table, reader) = (family.decoder()?.params(), Reader::open(folder)?);
    reader.check_shapes(&tensors(table.specs(), |_| true))?;
    reader.verify(0..reader.files().len())?;
    fill_target(out, |dir| {
        write_weights(dir, file_tensors(&table, family.names(), dtype)?, SHARD_BYTES, |_, piece| {
            let mut values = vec![0.0; piece.elements.len()];
            let (unit, elements) = (std::slice::from_ref(&piece.unit), std::slice::from_ref(&piece.elements));
            reader.read(Kind::Weight, unit, elements, &mut values)?;
            Ok(values)
        })?;
        write_config(&family, dir, dtype)?;
        [TOKENIZER].iter().chain(&BESIDE).try_for_each(|name| copy_if_there(&folder.join(name), &dir.join(name)))
    })
}
