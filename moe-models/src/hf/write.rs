//! Writing weights: per expert or as the stacks that a family publishes, in one file or in shards with an index, piece by piece.

use super::checkpoint::{WEIGHTS_FILE, WEIGHTS_INDEX};
use super::file::try_write_atomically;
use super::layout::Layout;
use super::tensor_file::{TensorHeader, write_header, write_values};
use super::{NameTable, write_atomically};
use crate::params::ParamTable;
use crate::{Error, Family, Model, Result};
use candle_core::{DType, Tensor, Var};
use moe_core::ParamSpec;
use moe_parallel::{Extent, Placement};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

/// Most bytes of tensors in one file, as in `transformers`.
pub(crate) const SHARD_BYTES: usize = 5_000_000_000;

/// A tensor in files, and what of a model it holds.
#[derive(Debug, Clone)]
pub(crate) struct FileTensor<'a> {
    pub(crate) header: TensorHeader,
    /// The parameter.
    pub(super) spec: &'a ParamSpec,
    /// What it holds: one piece, or all experts one after the other.
    pub(super) pieces: Vec<FilePiece>,
    /// How each piece lies in it.
    layout: Layout,
}

/// What of a model lies together in a tensor.
#[derive(Debug, Clone)]
pub(crate) struct FilePiece {
    /// Which expert of a stack.
    pub(crate) expert: Option<usize>,
    /// The parameter or expert by the name that it has alone.
    pub(crate) unit: Extent,
    /// Elements of it.
    pub(crate) elements: Range<usize>,
}

pub(crate) fn save<F: Family>(model: &Model<F>, dir: &Path, dtype: DType) -> Result<()> {
    save_sharded(model, dir, dtype, SHARD_BYTES)
}

/// [`save`] with a given size of shards.
pub(super) fn save_sharded<F: Family>(model: &Model<F>, dir: &Path, dtype: DType, shard_bytes: usize) -> Result<()> {
    let vars: BTreeMap<&str, &Var> = model.params().iter().map(|(name, var)| (name.as_str(), var)).collect();
    let values = |spec: &ParamSpec, piece: &FilePiece| {
        let Some(var) = vars.get(spec.name.as_str()) else {
            return Err(Error::Config(format!("the model has no variable {}", spec.name)));
        };
        let whole = var.detach();
        let own: Tensor = piece.expert.map_or(Ok(whole.clone()), |expert| whole.get(expert))?;
        Ok(own.flatten_all()?.narrow(0, piece.elements.start, piece.elements.len())?.to_vec1::<f32>()?)
    };
    write_weights(dir, file_tensors(model.table(), model.config().names(), dtype)?, shard_bytes, values)?;
    write_config(model.config(), dir, dtype)
}

/// Writes `generation_config.json` and `config.json` of weights saved as `dtype`.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be written; the family's for values that no file can have.
pub(crate) fn write_config<F: Family + ?Sized>(family: &F, dir: &Path, dtype: DType) -> Result<()> {
    write_json(&dir.join("generation_config.json"), &family.generation_config()?)?;
    let config = family.to_json(dtype)?;
    write_atomically(&dir.join("config.json"), |out| out.write_all(config.as_bytes()))
}

pub(super) fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, json)?;
        out.write_all(b"\n")
    })
}

/// Every tensor of a model under its name in files, in the order of the model.
///
/// # Errors
/// [`Error::Argument`] for a type that weights do not have; [`Error::Config`] for a model whose bytes have no number; as
/// [`NameTable::tensors`].
pub(crate) fn file_tensors(table: &ParamTable, names: NameTable, dtype: DType) -> Result<Vec<FileTensor<'_>>> {
    let dtype = match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        other => return Err(Error::Argument(format!("weights are saved as f32, bf16 or f16, not {other:?}"))),
    };
    if table.checked_elem_count().and_then(|elements| elements.checked_mul(size_of::<f32>())).is_none() {
        return Err(Error::Config("the model has more parameters than any files hold; make its sizes smaller".into()));
    }
    let mut tensors = Vec::new();
    for spec in table.specs() {
        let dtype = if spec.trained { dtype } else { Dtype::F32 };
        let units = Placement::WHOLE.extents(spec).into_iter().enumerate();
        if let Some((name, layout)) = names.stack(&spec.name) {
            let shape = [&spec.shape[..1], &layout.in_files(&spec.shape[1..])].concat();
            let piece = |(index, unit): (usize, Extent)| {
                let elements = 0..unit.elements();
                FilePiece { expert: Some(index), unit, elements }
            };
            let (header, pieces) = (TensorHeader { name, dtype, shape }, units.map(piece).collect());
            tensors.push(FileTensor { header, spec, pieces, layout });
            continue;
        }
        for (index, unit) in units {
            let (expert, mut start) = (spec.is_stacked().then_some(index), 0);
            for (name, shape) in names.tensors(&unit.name, &unit.shape)? {
                let elements = start..start + shape.iter().product::<usize>();
                start = elements.end;
                let pieces = vec![FilePiece { expert, unit: unit.clone(), elements }];
                let header = TensorHeader { name, dtype, shape };
                tensors.push(FileTensor { header, spec, pieces, layout: Layout::Rows });
            }
        }
    }
    Ok(tensors)
}

/// Writes tensors, of whose pieces `values` has the values, into one file, or into several of at most `shard_bytes` (unless one
/// tensor is larger) and an index. One piece is in memory at a time. What is there in the other form is removed once the new one is
/// whole.
///
/// # Errors
/// [`Error::Io`] if a file cannot be written; those of `values`.
pub(crate) fn write_weights(
    dir: &Path,
    tensors: Vec<FileTensor<'_>>,
    shard_bytes: usize,
    mut values: impl FnMut(&ParamSpec, &FilePiece) -> Result<Vec<f32>>,
) -> Result<()> {
    let mut shards = in_shards(tensors, shard_bytes);
    let stale = indexed(dir);
    if let [only] = shards.as_mut_slice() {
        write_shard(&dir.join(WEIGHTS_FILE), only, &mut values)?;
        remove_stale(&dir.join(WEIGHTS_INDEX))?;
        return stale.iter().try_for_each(|file| remove_stale(&dir.join(file)));
    }
    // An index over shards of which some are new and some old would be read as a model.
    remove_stale(&dir.join(WEIGHTS_INDEX))?;
    let (mut weight_map, mut total_size) = (BTreeMap::new(), 0);
    let count = shards.len();
    for (index, shard) in shards.iter_mut().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
        write_shard(&dir.join(&file), shard, &mut values)?;
        for tensor in shard {
            total_size += tensor.header.bytes();
            weight_map.insert(tensor.header.name.clone(), file.clone());
        }
    }
    write_weight_index(dir, &weight_map, total_size)?;
    // Until now it was what a reader takes.
    remove_stale(&dir.join(WEIGHTS_FILE))?;
    let new: BTreeSet<&String> = weight_map.values().collect();
    stale.iter().filter(|file| !new.contains(file)).try_for_each(|file| remove_stale(&dir.join(file)))
}

/// The shards that an index in `dir` names; none where there is no index that can be read.
fn indexed(dir: &Path) -> BTreeSet<String> {
    let index = std::fs::read(dir.join(WEIGHTS_INDEX)).ok();
    let index: serde_json::Value = index.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
    let files = index["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    let names = files.filter_map(|file| file.as_str());
    // Whoever wrote the index may have named anything.
    names.filter(|name| name.starts_with("model-") && !name.contains(['/', '\\'])).map(str::to_owned).collect()
}

fn remove_stale(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

/// Writes the index of weights in several files: which is in which.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub(crate) fn write_weight_index(dir: &Path, weight_map: &BTreeMap<String, String>, total_size: usize) -> Result<()> {
    let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    write_json(&dir.join(WEIGHTS_INDEX), &index)
}

fn in_shards(tensors: Vec<FileTensor<'_>>, shard_bytes: usize) -> Vec<Vec<FileTensor<'_>>> {
    let (mut shards, mut held) = (vec![vec![]], 0);
    for tensor in tensors {
        let bytes = tensor.header.bytes();
        if held > 0 && held + bytes > shard_bytes {
            shards.push(vec![]);
            held = 0;
        }
        held += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}

fn write_shard(
    path: &Path,
    tensors: &mut [FileTensor<'_>],
    values: &mut impl FnMut(&ParamSpec, &FilePiece) -> Result<Vec<f32>>,
) -> Result<()> {
    tensors.sort_by(|a, b| a.header.order(&b.header));
    let headers: Vec<TensorHeader> = tensors.iter().map(|tensor| tensor.header.clone()).collect();
    try_write_atomically(path, |out| {
        let failed = |e| Error::io(path, e);
        write_header(out, &[("format", "pt".into())], &headers).map_err(failed)?;
        for tensor in tensors {
            for piece in &tensor.pieces {
                let stored = tensor.layout.to_files(values(tensor.spec, piece)?, &piece.unit.shape);
                write_values(out, &stored, tensor.header.dtype).map_err(failed)?;
            }
        }
        Ok(())
    })
}
