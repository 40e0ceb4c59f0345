//! [`Checkpoint`]: the tensors of a model in files, each found by a parameter.
//!
//! Files are mapped; a tensor is copied when it is asked for, an expert alone. Names and shapes are checked for the whole model
//! before anything is built. What the files are, safetensors or another, is behind [`TensorFiles`].

use super::files::TensorFiles;
use super::layout::Layout;
use super::names::{FilePart, NameTable, StackPlace};
use super::shards::Shards;
use crate::params::ParamTable;
use crate::{Error, Family, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ParamSpec;
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

/// The tensors of a model in files.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) files: Box<dyn TensorFiles>,
    names: NameTable,
    /// How matrices are stored that are there as integers.
    pub(super) quantized: Option<QuantFormat>,
}

/// Where the only file of weights lies.
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
/// What names the files of weights where there are several.
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// What ranks write beside weights that each has written its part of.
pub(crate) const RANKS_INDEX: &str = "checkpoint.index.json";

/// In what form ranks have written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightForm {
    /// Every tensor whole and under its name in published files, as anyone reads them.
    Whole,
    /// Parts of matrices that ranks split.
    Parts,
}

impl Checkpoint {
    /// The weights in a folder.
    ///
    /// # Errors
    /// If a file is missing, cannot be read, or is damaged, or a tensor is in two files.
    pub fn open(dir: &Path, names: NameTable) -> Result<Self> {
        Ok(Self::over(Box::new(Shards::open(dir)?), names))
    }

    /// The weights in a folder of a model of `family`, without tensors that its decoder has no use for.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of_family<F: Family + ?Sized>(dir: &Path, family: &F) -> Result<Self> {
        let shards = Shards::open(dir)?.without(|name| family.is_extra(name));
        Ok(Self::over(Box::new(shards), family.names()))
    }

    /// The weights in the content of one safetensors file, likewise.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn from_bytes<F: Family + ?Sized>(bytes: Cow<'static, [u8]>, family: &F) -> Result<Self> {
        let shards = Shards::from_bytes(bytes)?.without(|name| family.is_extra(name));
        Ok(Self::over(Box::new(shards), family.names()))
    }

    /// The weights in `files`, whose names follow from those of parameters by `names`.
    pub(crate) fn over(files: Box<dyn TensorFiles>, names: NameTable) -> Self {
        Self { files, names, quantized: None }
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
                used.extend(self.files.check(&part, self.quantized)?);
            }
        }
        self.files.unused(&used).map_or(Ok(()), Err)
    }

    /// How matrices are stored that are there as integers, if some may be.
    pub(crate) fn integer_format(&self) -> Option<QuantFormat> {
        self.quantized
    }

    /// Whether a parameter or one expert of it is there as integers, all of it.
    pub(crate) fn holds_integers(&self, spec: &ParamSpec, expert: Option<usize>) -> bool {
        let Some(format) = self.quantized.filter(|_| expert.is_none() || !self.is_whole(spec)) else { return false };
        let holds = |part: &FilePart| self.files.holds_integers(part, format);
        self.parts_of(spec, expert).is_ok_and(|parts| parts.iter().all(holds))
    }

    /// The integers of a parameter that is one matrix, or of one expert: `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not there as integers, or a tensor is missing or has another shape.
    pub(crate) fn integers_of(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<i8>> {
        self.joined_integers(spec, expert, |part, format| self.files.integers(part, format))
    }

    /// The scales of the same: `[out, groups]`.
    ///
    /// # Errors
    /// As there; [`Error::Format`] for a scale that products cannot have.
    pub(crate) fn scales_of(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<f32>> {
        self.joined_integers(spec, expert, |part, format| self.files.scales(part, format))
    }

    fn joined_integers<T>(
        &self,
        spec: &ParamSpec,
        expert: Option<usize>,
        read: impl Fn(&FilePart, QuantFormat) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let Some(format) = self.quantized else {
            return Err(Error::format(self.files.path(), format!("{} is not stored as integers", spec.name)));
        };
        let parts = self.parts_of(spec, expert)?;
        let parts = parts.iter().map(|part| read(part, format)).collect::<Result<Vec<_>>>()?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// The type in which tensor `part` of those that hold a parameter, or one expert of it, gives its floats.
    ///
    /// # Errors
    /// [`Error::Format`] if it is missing.
    pub(crate) fn file_dtype(&self, spec: &ParamSpec, expert: Option<usize>, part: usize) -> Result<Dtype> {
        if self.is_whole(spec) {
            return self.files.dtype(&Self::whole(spec, None));
        }
        match self.parts_of(spec, expert)?.get(part) {
            Some(part) => self.files.dtype(part),
            None => Err(Error::Config(format!("{} does not lie in {} tensors", spec.name, part + 1))),
        }
    }

    /// Whether a stack of experts lies in the files under its own name, whole.
    pub(super) fn is_whole(&self, spec: &ParamSpec) -> bool {
        spec.is_stacked() && self.files.has_whole(&spec.name)
    }

    /// A stack under its own name, or one expert of it.
    fn whole(spec: &ParamSpec, expert: Option<usize>) -> FilePart {
        let place = expert.map(|index| StackPlace { index, layout: Layout::Rows });
        FilePart { name: spec.name.clone(), shape: spec.shape.clone(), place }
    }

    /// The tensors that hold a parameter, with the shape each must have.
    fn parts(&self, spec: &ParamSpec) -> Result<Vec<FilePart>> {
        if self.is_whole(spec) {
            return Ok(vec![Self::whole(spec, None)]);
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

    /// A tensor or one expert of it, or what the integers in its place stand for, f32.
    fn floats(&self, part: &FilePart, device: &Device) -> Result<Tensor> {
        let format = self.quantized.filter(|format| self.files.holds_integers(part, *format));
        let (Some(format), &[out, inner]) = (format, part.shape.as_slice()) else {
            return self.files.tensor(part, device);
        };
        let refused = |e: moe_kernels::Error| Error::format(self.files.path(), format!("tensor {}: {e}", part.name));
        let (integers, scales) = (self.files.integers(part, format)?, self.files.scales(part, format)?);
        let matrix = IntegerMatrix::new(format, [out, inner], integers, scales).map_err(refused)?;
        Ok(Tensor::from_vec(matrix.dequantize(), (out, inner), device)?)
    }

    fn joined(&self, spec: &ParamSpec, expert: Option<usize>, device: &Device) -> Result<Tensor> {
        let parts = self.parts_of(spec, expert)?;
        let parts: Vec<Tensor> = parts.iter().map(|part| self.floats(part, device)).collect::<Result<_>>()?;
        joined(&parts)
    }

    /// A parameter, whole, in the type of the files; what is stored as integers is f32.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing.
    pub fn tensor(&self, spec: &ParamSpec, device: &Device) -> Result<Tensor> {
        if self.is_whole(spec) {
            return self.files.tensor(&Self::whole(spec, None), device);
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
            return self.files.tensor(&Self::whole(spec, Some(index)), device);
        }
        self.joined(spec, Some(index), device)
    }
}

/// Parts one below the other, in f32 if they are not of one type.
pub(super) fn joined(parts: &[Tensor]) -> Result<Tensor> {
    match parts {
        [one] => Ok(one.clone()),
        many if many.iter().all(|part| part.dtype() == many[0].dtype()) => Ok(Tensor::cat(many, 0)?),
        mixed => {
            let wide = mixed.iter().map(|part| part.to_dtype(DType::F32)).collect::<candle_core::Result<Vec<_>>>()?;
            Ok(Tensor::cat(&wide, 0)?)
        }
    }
}
