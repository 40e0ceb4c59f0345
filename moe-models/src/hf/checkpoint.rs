//! [`Checkpoint`]: the tensors of one safetensors file, or of shards with an index, each found by a parameter of a model.
//!
//! Files are mapped; a tensor is copied when it is asked for, an expert alone. Names and shapes are checked for the whole model
//! before anything is built.

use super::file::is_plain_name;
use super::map::Bytes;
use super::mxfp4::{self, BlockedStack};
use super::names::{FilePart, NameTable, StackPlace};
use super::quantization::StoredMatrix;
use super::tensor_file::{TensorFile, TensorHeader};
use crate::params::ParamTable;
use crate::{Error, Family, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ParamSpec;
use moe_core::ops::host::to_f32_vec;
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The tensors of a model in files.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<TensorFile>,
    by_name: BTreeMap<String, usize>,
    names: NameTable,
    /// How matrices are stored that are there as integers.
    quantized: Option<QuantFormat>,
}

/// Where the only file of weights lies.
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
/// What names the files of weights where there are several.
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// What ranks write beside weights that each has written its part of.
pub(crate) const RANKS_INDEX: &str = "checkpoint.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// In what form ranks have written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightForm {
    /// Every tensor whole and under its name in published files, as anyone reads them.
    Whole,
    /// Parts of matrices that ranks split.
    Parts,
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

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
pub(super) fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let index_path = dir.join(WEIGHTS_INDEX);
    if !index_path.exists() {
        refuse_parts(dir)?;
        return Ok(vec![dir.join(WEIGHTS_FILE)]);
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

impl Checkpoint {
    /// The weights in a folder.
    ///
    /// # Errors
    /// If a file is missing, cannot be read, or is damaged, or a tensor is in two files.
    pub fn open(dir: &Path, names: NameTable) -> Result<Self> {
        Self::new(weight_files(dir)?.into_iter().map(TensorFile::open).collect::<Result<_>>()?, names)
    }

    /// The weights in a folder of a model of `family`, without tensors that its decoder has no use for.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of_family<F: Family + ?Sized>(dir: &Path, family: &F) -> Result<Self> {
        Ok(Self::open(dir, family.names())?.without_extra(family))
    }

    /// Without tensors that the decoder of `family` has no use for.
    #[must_use]
    pub(crate) fn without_extra<F: Family + ?Sized>(mut self, family: &F) -> Self {
        self.by_name.retain(|name, _| !family.is_extra(name));
        self
    }

    /// The weights in the content of one safetensors file.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn from_bytes(bytes: Cow<'static, [u8]>, names: NameTable) -> Result<Self> {
        Self::new(vec![TensorFile::new(WEIGHTS_FILE.into(), Bytes::Held(bytes))?], names)
    }

    fn new(shards: Vec<TensorFile>, names: NameTable) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if by_name.contains_key(&name) {
                    return Err(Error::format(shard.path(), format!("tensor {name} is in two files")));
                }
                by_name.insert(name, index);
            }
        }
        Ok(Self { shards, by_name, names, quantized: None })
    }

    /// The same files, in which some matrices are integers of `format`.
    #[must_use]
    pub fn with_integers(self, format: QuantFormat) -> Self {
        Self { quantized: Some(format), ..self }
    }

    /// Refuses files of another model: a parameter that is missing or has another shape, or a tensor that is none.
    ///
    /// # Errors
    /// [`Error::Format`] naming file and tensor.
    pub fn check(&self, table: &ParamTable) -> Result<()> {
        let mut used = BTreeSet::new();
        for spec in table.specs() {
            for part in self.parts(spec)? {
                if let Some(blocked) = self.blocked(&part) {
                    used.extend(self.check_blocked(&blocked)?);
                    continue;
                }
                let FilePart { name, shape, .. } = part;
                if let Some(stored) = self.stored(&name, &shape) {
                    used.extend(self.check_stored(&stored)?);
                    continue;
                }
                let (shard, info) = self.found(&name, &shape)?;
                shard.dtype(&name, info.dtype)?;
                used.insert(name);
            }
        }
        match self.by_name.iter().find(|(name, _)| !used.contains(*name)) {
            Some((name, &shard)) => Err(Error::format(
                self.shards[shard].path(),
                format!("tensor {name} does not belong to the configured model"),
            )),
            None => Ok(()),
        }
    }

    /// A tensor that must be there in this shape.
    pub(super) fn found(&self, name: &str, shape: &[usize]) -> Result<(&TensorFile, &TensorInfo)> {
        let shard = self.by_name.get(name).map(|&shard| &self.shards[shard]);
        let Some((shard, info)) = shard.and_then(|shard| Some((shard, shard.info(name)?))) else {
            return Err(Error::format(self.shards[0].path(), format!("tensor {name} is missing")));
        };
        if info.shape != shape {
            let reason = format!("tensor {name} must have shape {shape:?}, got {:?}", info.shape);
            return Err(Error::format(shard.path(), reason));
        }
        Ok((shard, info))
    }

    /// What is in the place of a stack, if its matrices are there as blocks.
    fn blocked(&self, part: &FilePart) -> Option<BlockedStack> {
        BlockedStack::of(part).filter(|blocked| {
            !self.by_name.contains_key(&part.name) && self.by_name.contains_key(&blocked.blocks_name())
        })
    }

    /// Refuses blocks whose tensors do not fit each other; their names.
    fn check_blocked(&self, blocked: &BlockedStack) -> Result<Vec<String>> {
        let tensors = blocked.tensors().map_err(|reason| Error::format(self.shards[0].path(), reason))?;
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
        let shard = self.shard(&blocks)?;
        let blocks = shard.bytes_of(&blocks, place.index)?;
        let values = mxfp4::decode(blocks, self.shard(&scales)?.bytes_of(&scales, place.index)?);
        shard.let_go(blocks);
        mxfp4::layout(place.layout).from_files(&Tensor::from_vec(values, &blocked.shape(), device)?)
    }

    /// The matrix of this name, if it is there as integers, or some of its tensors are.
    fn stored(&self, name: &str, shape: &[usize]) -> Option<StoredMatrix> {
        let (format, &[out, inner]) = (self.quantized?, shape) else { return None };
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

    /// The scales of a matrix of integers, `[out, groups]`.
    fn scales(&self, stored: &StoredMatrix) -> Result<Vec<f32>> {
        let name = stored.scales_name();
        let scales = to_f32_vec(&self.one(&name, &Device::Cpu)?)?;
        let needs_bf16 = stored.format != QuantFormat::Int8;
        let fits = |scale: f32| scale.is_finite() && (!needs_bf16 || scale.to_bits() & 0xffff == 0);
        match scales.iter().find(|&&scale| !fits(scale)) {
            None => Ok(scales),
            Some(scale) => {
                let wanted = if needs_bf16 { "finite values of bf16" } else { "finite values" };
                let reason = format!("tensor {name} must have {wanted}, got {scale}");
                Err(Error::format(self.shards[self.by_name[&name]].path(), reason))
            }
        }
    }

    fn integers(&self, stored: &StoredMatrix) -> Result<Vec<i8>> {
        let header = stored.tensors().swap_remove(0);
        let (shard, info) = self.found(&header.name, &header.shape)?;
        Ok(stored.integers(shard.data(info)))
    }

    /// The matrices of integers that make up a parameter or one expert of it, rows below rows; `None` if not all of it is integers.
    fn stored_parts(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Option<Vec<StoredMatrix>>> {
        if self.quantized.is_none() || (self.is_whole(spec) && expert.is_some()) {
            return Ok(None);
        }
        let stored = |part: FilePart| self.stored(&part.name, &part.shape).filter(|_| part.place.is_none());
        Ok(self.names.parts(spec, expert)?.into_iter().map(stored).collect())
    }

    /// Whether a parameter or one expert of it is there as integers.
    pub(crate) fn holds_integers(&self, spec: &ParamSpec, expert: Option<usize>) -> bool {
        self.stored_parts(spec, expert).is_ok_and(|parts| parts.is_some())
    }

    /// The integers of a parameter that is one matrix, or of one expert: `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not there as integers, or a tensor is missing or has another shape.
    pub(crate) fn integers_of(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<i8>> {
        self.joined_parts(spec, expert, |stored| self.integers(stored))
    }

    /// The scales of the same: `[out, groups]`.
    ///
    /// # Errors
    /// As there; [`Error::Format`] for a scale that products cannot have.
    pub(crate) fn scales_of(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<f32>> {
        self.joined_parts(spec, expert, |stored| self.scales(stored))
    }

    fn joined_parts<T>(
        &self,
        spec: &ParamSpec,
        expert: Option<usize>,
        read: impl Fn(&StoredMatrix) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let Some(parts) = self.stored_parts(spec, expert)? else {
            return Err(Error::format(self.shards[0].path(), format!("{} is not stored as integers", spec.name)));
        };
        Ok(parts.iter().map(read).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// The type of a tensor of floats in the files, or of the whole stack that holds it.
    pub(crate) fn file_dtype(&self, name: &str, spec: &ParamSpec) -> Result<Dtype> {
        let name = if self.is_whole(spec) { &spec.name } else { name };
        let info = self.by_name.get(name).and_then(|&shard| self.shards[shard].info(name));
        let missing = || Error::format(self.shards[0].path(), format!("tensor {name} is missing"));
        info.map(|info| info.dtype).ok_or_else(missing)
    }

    /// Whether a stack of experts lies in the files under its own name, whole.
    pub(super) fn is_whole(&self, spec: &ParamSpec) -> bool {
        spec.is_stacked() && self.by_name.contains_key(&spec.name)
    }

    /// The tensors that hold a parameter, with the shape each must have.
    fn parts(&self, spec: &ParamSpec) -> Result<Vec<FilePart>> {
        if self.is_whole(spec) {
            return Ok(vec![FilePart { name: spec.name.clone(), shape: spec.shape.clone(), place: None }]);
        }
        // Of a stack in the files one expert stands for all.
        let in_stack = spec.is_stacked() && self.names.stack(&spec.name).is_some();
        let experts = match spec.is_stacked() {
            true => (0..if in_stack { 1 } else { spec.shape[0] }).map(Some).collect(),
            false => vec![None],
        };
        let mut parts = Vec::new();
        for expert in experts {
            parts.extend(self.names.parts(spec, expert)?);
        }
        Ok(parts)
    }

    /// The parts of tensors that make up a parameter that is no stack, or one expert of one.
    pub(super) fn parts_of(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<FilePart>> {
        self.names.parts(spec, expert)
    }

    /// The file that has a tensor.
    fn shard(&self, name: &str) -> Result<&TensorFile> {
        match self.by_name.get(name) {
            Some(&shard) => Ok(&self.shards[shard]),
            None => Err(Error::format(self.shards[0].path(), format!("tensor {name} is missing"))),
        }
    }

    /// A tensor as it is in the files.
    fn one(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.shard(name)?.tensor(name, device)
    }

    /// A tensor or one expert of it, or what the integers in its place stand for, f32.
    fn floats(&self, part: &FilePart, device: &Device) -> Result<Tensor> {
        let FilePart { name, shape, place } = part;
        if let (Some(place), Some(blocked)) = (*place, self.blocked(part)) {
            return self.decoded(&blocked, place, device);
        }
        if let Some(StackPlace { index, layout }) = *place {
            let shard = self.shard(name)?;
            let stored = shard.slice(name, index, device)?;
            shard.let_go(shard.bytes_of(name, index)?);
            return layout.from_files(&stored);
        }
        let Some(stored) = self.stored(name, shape) else { return self.one(name, device) };
        let refused = |e: moe_kernels::Error| Error::format(self.shards[0].path(), format!("tensor {name}: {e}"));
        let (integers, scales) = (self.integers(&stored)?, self.scales(&stored)?);
        let matrix = IntegerMatrix::new(stored.format, stored.shape, integers, scales).map_err(refused)?;
        Ok(Tensor::from_vec(matrix.dequantize(), shape.as_slice(), device)?)
    }

    fn joined(&self, spec: &ParamSpec, expert: Option<usize>, device: &Device) -> Result<Tensor> {
        let parts = self.names.parts(spec, expert)?;
        let parts: Vec<Tensor> = parts.iter().map(|part| self.floats(part, device)).collect::<Result<_>>()?;
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            many if many.iter().all(|part| part.dtype() == many[0].dtype()) => Ok(Tensor::cat(many, 0)?),
            mixed => {
                let wide =
                    mixed.iter().map(|part| part.to_dtype(DType::F32)).collect::<candle_core::Result<Vec<_>>>()?;
                Ok(Tensor::cat(&wide, 0)?)
            }
        }
    }

    /// A parameter, whole, in the type of the files; what is stored as integers is f32.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing.
    pub fn tensor(&self, spec: &ParamSpec, device: &Device) -> Result<Tensor> {
        if self.is_whole(spec) {
            return self.one(&spec.name, device);
        }
        if !spec.is_stacked() {
            return self.joined(spec, None, device);
        }
        let experts = (0..spec.shape[0]).map(|index| self.expert(spec, index, device)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&experts, 0)?)
    }

    /// One expert of a stacked parameter, likewise.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing.
    pub fn expert(&self, spec: &ParamSpec, index: usize, device: &Device) -> Result<Tensor> {
        if self.is_whole(spec) {
            return self.shard(&spec.name)?.slice(&spec.name, index, device);
        }
        self.joined(spec, Some(index), device)
    }
}
