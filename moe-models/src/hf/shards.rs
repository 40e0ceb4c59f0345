//! [`Shards`]: the tensors of one safetensors file, or of several with an index.

use super::file::is_plain_name;
use super::files::TensorFiles;
use super::layout::Layout;
use super::map::Bytes;
use super::mxfp4::{self, BlockedStack};
use super::names::{FilePart, StackPlace};
use super::quantization::StoredMatrix;
use super::tensor_file::{TensorFile, TensorHeader};
use super::{RANKS_INDEX, WEIGHTS_FILE, WEIGHTS_INDEX, WeightForm};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::ops::host::to_f32_vec;
use moe_kernels::quantized::QuantFormat;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Safetensors files, mapped, and which holds what.
#[derive(Debug)]
pub(super) struct Shards {
    shards: Vec<TensorFile>,
    by_name: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Refuses weights that were written in parts.
fn refuse_parts(dir: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Form {
        weights: WeightForm,
    }
    let path = dir.join(RANKS_INDEX);
    let Ok(json) = std::fs::read(&path) else { return Ok(()) };
    match serde_json::from_slice(&json) {
        Ok(Form { weights: WeightForm::Parts }) => Err(Error::format(
            path,
            "these weights were saved by ranks that split matrices (tp or expert_slices above 1), or that hold some of the experts \
             each of a family that publishes them as one tensor (ep above 1), each its part; export the checkpoint to a folder of \
             whole tensors first (moe_models::train::shards::export) and open that",
        )),
        _ => Ok(()),
    }
}

/// Refuses a folder with an adapter, without which the model would not be the one that is meant.
pub(crate) fn refuse_adapters(dir: &Path) -> Result<()> {
    let path = dir.join("adapter_config.json");
    match path.exists() {
        true => Err(Error::format(
            path,
            "adapters (LoRA) are not implemented: merge this one into the model it was made for, or take it out of the folder",
        )),
        false => Ok(()),
    }
}

/// `model.safetensors`, or, where that is not there, the shards that `model.safetensors.index.json` names: as transformers has it.
pub(crate) fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    refuse_adapters(dir)?;
    let (file, index_path) = (dir.join(WEIGHTS_FILE), dir.join(WEIGHTS_INDEX));
    if file.exists() || !index_path.exists() {
        refuse_parts(dir)?;
        return Ok(vec![file]);
    }
    let json = std::fs::read(&index_path).map_err(|e| Error::io(&index_path, e))?;
    let index: Index = serde_json::from_slice(&json).map_err(|e| Error::format(&index_path, e.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if names.is_empty() {
        return Err(Error::format(&index_path, "weight_map names no file; copy the index again, or remove it"));
    }
    names
        .into_iter()
        .map(|name| {
            if !is_plain_name(name) {
                return Err(Error::format(&index_path, format!("{name:?} is not the name of a file in this folder")));
            }
            Ok(dir.join(name))
        })
        .collect()
}

impl Shards {
    /// Those of a folder.
    ///
    /// # Errors
    /// If a file is missing, cannot be read, or is damaged, or a tensor is in two files.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        Self::new(weight_files(dir)?.into_iter().map(TensorFile::open).collect::<Result<_>>()?)
    }

    /// The content of one file.
    ///
    /// # Errors
    /// If it is damaged.
    pub(super) fn from_bytes(bytes: Cow<'static, [u8]>) -> Result<Self> {
        Self::new(vec![TensorFile::new(WEIGHTS_FILE.into(), Bytes::Held(bytes))?])
    }

    fn new(shards: Vec<TensorFile>) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if by_name.contains_key(&name) {
                    return Err(Error::format(shard.path(), format!("tensor {name} is in two files")));
                }
                by_name.insert(name, index);
            }
        }
        Ok(Self { shards, by_name })
    }

    /// Without the tensors that `is_extra` names.
    #[must_use]
    pub(super) fn without(mut self, is_extra: impl Fn(&str) -> bool) -> Self {
        self.by_name.retain(|name, _| !is_extra(name));
        self
    }

    fn missing(&self, name: &str) -> Error {
        Error::format(self.path(), format!("tensor {name} is missing"))
    }

    /// A tensor that must be there in this shape.
    fn found(&self, name: &str, shape: &[usize]) -> Result<(&TensorFile, &TensorInfo)> {
        let shard = self.by_name.get(name).map(|&shard| &self.shards[shard]);
        let Some((shard, info)) = shard.and_then(|shard| Some((shard, shard.info(name)?))) else {
            return Err(self.missing(name));
        };
        if info.shape != shape {
            let reason = format!("tensor {name} must have shape {shape:?}, got {:?}", info.shape);
            return Err(Error::format(shard.path(), reason));
        }
        Ok((shard, info))
    }

    /// The matrix of this name, if it is there as integers, or some of its tensors are.
    fn stored(&self, name: &str, shape: &[usize], format: QuantFormat) -> Option<StoredMatrix> {
        let &[out, inner] = shape else { return None };
        let stored = StoredMatrix { name: name.to_owned(), format, shape: [out, inner] };
        let is_integer = |name: &str| {
            let info = self.by_name.get(name).and_then(|&shard| self.shards[shard].info(name));
            info.is_some_and(|info| matches!(info.dtype, Dtype::I8 | Dtype::I32))
        };
        let has = |name: &String| self.by_name.contains_key(name);
        let is_there = is_integer(&stored.integers_name())
            || has(&stored.scales_name())
            || stored.shape_name().as_ref().is_some_and(has);
        is_there.then_some(stored)
    }

    fn must_be_stored(&self, part: &FilePart, format: QuantFormat) -> Result<StoredMatrix> {
        let refused = || Error::format(self.path(), format!("{} is not stored as integers", part.name));
        self.stored(&part.name, &part.shape, format).filter(|_| part.place.is_none()).ok_or_else(refused)
    }

    /// Refuses a matrix of integers whose tensors do not fit each other; their names.
    fn check_stored(&self, stored: &StoredMatrix) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for TensorHeader { name, dtype, shape } in stored.tensors() {
            let (shard, info) = self.found(&name, &shape)?;
            let is_scale = name == stored.scales_name();
            if is_scale {
                shard.dtype(&name, info.dtype)?;
            } else if info.dtype != dtype {
                let reason = format!("tensor {name} must be {dtype:?}, got {:?}", info.dtype);
                return Err(Error::format(shard.path(), reason));
            }
            if Some(&name) == stored.shape_name().as_ref() {
                let sizes: Vec<i64> =
                    shard.data(info).chunks_exact(8).flat_map(<[u8; 8]>::try_from).map(i64::from_le_bytes).collect();
                if sizes.iter().ne(stored.shape.map(|size| size as i64).iter()) {
                    let reason = format!("tensor {name} must be {:?}, got {sizes:?}", stored.shape);
                    return Err(Error::format(shard.path(), reason));
                }
            }
            names.push(name);
        }
        Ok(names)
    }

    /// The file that has a tensor.
    fn shard(&self, name: &str) -> Result<&TensorFile> {
        self.by_name.get(name).map(|&shard| &self.shards[shard]).ok_or_else(|| self.missing(name))
    }

    /// What is in the place of a stack, if its matrices are there as blocks.
    fn blocked(&self, part: &FilePart) -> Option<BlockedStack> {
        BlockedStack::of(part).filter(|blocked| {
            !self.by_name.contains_key(&part.name) && self.by_name.contains_key(&blocked.blocks_name())
        })
    }

    /// Refuses blocks whose tensors do not fit each other; their names.
    fn check_blocked(&self, blocked: &BlockedStack) -> Result<Vec<String>> {
        let tensors = blocked.tensors().map_err(|reason| Error::format(self.path(), reason))?;
        let check = |TensorHeader { name, dtype, shape }: TensorHeader| {
            let (shard, info) = self.found(&name, &shape)?;
            match info.dtype == dtype {
                true => Ok(name),
                false => {
                    let reason = format!("tensor {name} must be {dtype:?}, got {:?}", info.dtype);
                    Err(Error::format(shard.path(), reason))
                }
            }
        };
        tensors.into_iter().map(check).collect()
    }

    /// One expert of a stack of blocks, f32.
    fn decoded(&self, blocked: &BlockedStack, place: StackPlace, device: &Device) -> Result<Tensor> {
        let [blocks, scales] = [blocked.blocks_name(), blocked.scales_name()];
        let (shard, scales_shard) = (self.shard(&blocks)?, self.shard(&scales)?);
        let blocks = shard.bytes_of(&blocks, place.index)?;
        let values = mxfp4::decode(blocks, scales_shard.bytes_of(&scales, place.index)?);
        shard.let_go(blocks);
        // A scale that is no number, or one that is too large for its values.
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            let reason =
                format!("tensor {scales} gives expert {} a weight of {value}; copy the file again", place.index);
            return Err(Error::format(scales_shard.path(), reason));
        }
        mxfp4::layout(place.layout).from_files(&Tensor::from_vec(values, &blocked.shape(), device)?)
    }
}

impl TensorFiles for Shards {
    fn path(&self) -> &Path {
        self.shards[0].path()
    }

    fn has_whole(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    fn check(&self, part: &FilePart, quantized: Option<QuantFormat>) -> Result<Vec<String>> {
        if let Some(blocked) = self.blocked(part) {
            return self.check_blocked(&blocked);
        }
        let FilePart { name, shape, .. } = part;
        if let Some(stored) = quantized.and_then(|format| self.stored(name, shape, format)) {
            return self.check_stored(&stored);
        }
        let (shard, info) = self.found(name, shape)?;
        shard.dtype(name, info.dtype)?;
        Ok(vec![name.to_owned()])
    }

    fn unused(&self, used: &BTreeSet<String>) -> Option<Error> {
        let (name, &shard) = self.by_name.iter().find(|(name, _)| !used.contains(*name))?;
        let reason = format!("tensor {name} does not belong to the configured model");
        Some(Error::format(self.shards[shard].path(), reason))
    }

    fn tensor(&self, part: &FilePart, device: &Device) -> Result<Tensor> {
        let FilePart { name, place, .. } = part;
        let Some(place) = *place else { return self.shard(name)?.tensor(name, device) };
        if let Some(blocked) = self.blocked(part) {
            return self.decoded(&blocked, place, device);
        }
        let shard = self.shard(name)?;
        let stored = shard.slice(name, place.index, device)?;
        shard.let_go(shard.bytes_of(name, place.index)?);
        place.layout.from_files(&stored)
    }

    fn dtype(&self, part: &FilePart) -> Result<Dtype> {
        let info = self.shard(&part.name)?.info(&part.name);
        info.map(|info| info.dtype).ok_or_else(|| self.missing(&part.name))
    }

    /// Those of what lies here row by row.
    fn has_rows(&self, part: &FilePart) -> bool {
        part.place.is_none_or(|place| place.layout == Layout::Rows)
    }

    fn rows(&self, part: &FilePart, rows: Range<usize>) -> Result<Tensor> {
        let FilePart { name, shape, place } = part;
        let (shard, info) = self.found(name, shape)?;
        let (whole, shape) = match *place {
            None => (shard.data(info), shape.as_slice()),
            Some(StackPlace { index, .. }) => (shard.bytes_of(name, index)?, &shape[1..]),
        };
        let inner = shape[1..].iter().product::<usize>();
        let bytes = info.dtype.bitsize() / 8 * inner;
        if rows.start == 0 {
            shard.will_need(whole);
        }
        let data = &whole[rows.start * bytes..rows.end * bytes];
        let dtype = shard.dtype(name, info.dtype)?;
        let tensor = Tensor::from_raw_buffer(data, dtype, &[rows.len(), inner], &Device::Cpu)?;
        shard.let_go(data);
        Ok(tensor)
    }

    fn holds_integers(&self, part: &FilePart, format: QuantFormat) -> bool {
        part.place.is_none() && self.stored(&part.name, &part.shape, format).is_some()
    }

    fn integers(&self, part: &FilePart, format: QuantFormat) -> Result<Vec<i8>> {
        let stored = self.must_be_stored(part, format)?;
        let header = stored.tensors().swap_remove(0);
        let (shard, info) = self.found(&header.name, &header.shape)?;
        Ok(stored.integers(shard.data(info)))
    }

    fn scales(&self, part: &FilePart, format: QuantFormat) -> Result<Vec<f32>> {
        let name = self.must_be_stored(part, format)?.scales_name();
        let shard = self.shard(&name)?;
        let scales = to_f32_vec(&shard.tensor(&name, &Device::Cpu)?)?;
        let needs_bf16 = format != QuantFormat::Int8;
        let fits = |scale: f32| scale.is_finite() && (!needs_bf16 || scale.to_bits() & 0xffff == 0);
        match scales.iter().find(|&&scale| !fits(scale)) {
            None => Ok(scales),
            Some(scale) => {
                let wanted = if needs_bf16 { "finite values of bf16" } else { "finite values" };
                let reason = format!("tensor {name} must have {wanted}, got {scale}");
                Err(Error::format(shard.path(), reason))
            }
        }
    }
}
