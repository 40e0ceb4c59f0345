//! [`Checkpoint`]: the tensors of one safetensors file, or of shards with an index, each found by a parameter of a model.
//!
//! Files are mapped; a tensor is copied when it is asked for, an expert alone. Names and shapes are checked for the whole model
//! before anything is built.

use super::map::Bytes;
use super::names::NameTable;
use crate::params::ParamTable;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ParamSpec;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors};
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One safetensors file, its header read.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: Bytes,
    /// Where the tensors begin.
    start: usize,
    header: Metadata,
}

impl Shard {
    fn new(path: PathBuf, bytes: Bytes) -> Result<Self> {
        let damaged = |reason: String| {
            let reason = format!("not a whole safetensors file: {reason}; the file may be truncated, copy it again");
            Error::format(&path, reason)
        };
        // Checks that the header and all tensors lie inside the file, before anything of a size it names is allocated.
        SafeTensors::deserialize(bytes.as_ref()).map_err(|e| damaged(e.to_string()))?;
        let (len, header) = SafeTensors::read_metadata(bytes.as_ref()).map_err(|e| damaged(e.to_string()))?;
        Ok(Self { path, start: len + size_of::<u64>(), bytes, header })
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(info) = self.header.info(name) else {
            return Err(Error::format(&self.path, format!("tensor {name} is missing")));
        };
        let (from, to) = info.data_offsets;
        let data = &self.bytes.as_ref()[self.start + from..self.start + to];
        Ok(Tensor::from_raw_buffer(data, self.dtype(name, info.dtype)?, &info.shape, device)?)
    }

    fn dtype(&self, name: &str, dtype: Dtype) -> Result<DType> {
        match dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::BF16 => Ok(DType::BF16),
            Dtype::F16 => Ok(DType::F16),
            other => Err(Error::format(&self.path, format!("tensor {name} must be f32, bf16 or f16, got {other:?}"))),
        }
    }
}

/// The tensors of a model in files.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    by_name: BTreeMap<String, usize>,
    names: NameTable,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let index_path = dir.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(vec![dir.join("model.safetensors")]);
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
            let plain = Path::new(name).file_name().is_some_and(|f| f == name.as_str());
            if !plain {
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
        let shard = |path: PathBuf| Shard::new(path.clone(), Bytes::map(&path)?);
        Self::new(weight_files(dir)?.into_iter().map(shard).collect::<Result<_>>()?, names)
    }

    /// The weights in the content of one safetensors file.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn from_bytes(bytes: Cow<'static, [u8]>, names: NameTable) -> Result<Self> {
        Self::new(vec![Shard::new("model.safetensors".into(), Bytes::Held(bytes))?], names)
    }

    fn new(shards: Vec<Shard>, names: NameTable) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for name in shard.header.tensors().into_keys() {
                if by_name.contains_key(&name) {
                    return Err(Error::format(&shard.path, format!("tensor {name} is in two files")));
                }
                by_name.insert(name, index);
            }
        }
        Ok(Self { shards, by_name, names })
    }

    /// Refuses files of another model: a parameter that is missing or has another shape, or a tensor that is none.
    ///
    /// # Errors
    /// [`Error::Format`] naming file and tensor.
    pub fn check(&self, table: &ParamTable) -> Result<()> {
        let mut used = BTreeSet::new();
        for spec in table.specs() {
            for (name, shape) in self.parts(spec)? {
                let Some(&shard) = self.by_name.get(&name) else {
                    return Err(Error::format(&self.shards[0].path, format!("tensor {name} is missing")));
                };
                let shard = &self.shards[shard];
                let got = shard.shape(&name).unwrap_or_default();
                if got != shape {
                    let reason = format!("tensor {name} must have shape {shape:?}, got {got:?}");
                    return Err(Error::format(&shard.path, reason));
                }
                if let Some(info) = shard.header.info(&name) {
                    shard.dtype(&name, info.dtype)?;
                }
                used.insert(name);
            }
        }
        match self.by_name.iter().find(|(name, _)| !used.contains(*name)) {
            Some((name, &shard)) => Err(Error::format(
                &self.shards[shard].path,
                format!("tensor {name} does not belong to the configured model"),
            )),
            None => Ok(()),
        }
    }

    /// Whether a stack of experts lies in the files under its own name, whole.
    fn is_whole(&self, spec: &ParamSpec) -> bool {
        spec.is_stacked() && self.by_name.contains_key(&spec.name)
    }

    /// The tensors that hold a parameter, with the shape each must have.
    fn parts(&self, spec: &ParamSpec) -> Result<Vec<(String, Vec<usize>)>> {
        if self.is_whole(spec) {
            return Ok(vec![(spec.name.clone(), spec.shape.clone())]);
        }
        let (experts, shape) =
            if spec.is_stacked() { (spec.shape[0], &spec.shape[1..]) } else { (1, spec.shape.as_slice()) };
        let mut parts = Vec::new();
        for expert in 0..experts {
            let names = self.names.in_files(spec, spec.is_stacked().then_some(expert));
            let mut shape = shape.to_vec();
            if shape.is_empty() || !shape[0].is_multiple_of(names.len()) {
                let count = names.len();
                return Err(Error::Config(format!("{} {shape:?} cannot lie in {count} equal tensors", spec.name)));
            }
            shape[0] /= names.len();
            parts.extend(names.into_iter().map(|name| (name, shape.clone())));
        }
        Ok(parts)
    }

    fn one(&self, name: &str, device: &Device) -> Result<Tensor> {
        match self.by_name.get(name) {
            Some(&shard) => self.shards[shard].tensor(name, device),
            None => Err(Error::format(&self.shards[0].path, format!("tensor {name} is missing"))),
        }
    }

    fn joined(&self, names: &[String], device: &Device) -> Result<Tensor> {
        let parts = names.iter().map(|name| self.one(name, device)).collect::<Result<Vec<_>>>()?;
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            many => Ok(Tensor::cat(many, 0)?),
        }
    }

    /// A parameter, whole, in the type of the files.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing.
    pub fn tensor(&self, spec: &ParamSpec, device: &Device) -> Result<Tensor> {
        if self.is_whole(spec) {
            return self.one(&spec.name, device);
        }
        if !spec.is_stacked() {
            return self.joined(&self.names.in_files(spec, None), device);
        }
        let experts = (0..spec.shape[0]).map(|index| self.expert(spec, index, device)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&experts, 0)?)
    }

    /// One expert of a stacked parameter.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing.
    pub fn expert(&self, spec: &ParamSpec, index: usize, device: &Device) -> Result<Tensor> {
        if self.is_whole(spec) {
            return Ok(self.one(&spec.name, device)?.get(index)?);
        }
        self.joined(&self.names.in_files(spec, Some(index)), device)
    }
}
