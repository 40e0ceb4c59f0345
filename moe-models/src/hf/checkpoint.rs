//! [`Checkpoint`]: the tensors of one safetensors file, or of shards with an index, each found by a parameter of a model.
//!
//! Files are mapped; a tensor is copied when it is asked for, an expert alone. Names and shapes are checked for the whole model
//! before anything is built.

use super::file::is_plain_name;
use super::map::Bytes;
use super::names::NameTable;
use super::tensor_file::TensorFile;
use crate::params::ParamTable;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::ParamSpec;
use moe_parallel::Placement;
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
            "these weights were saved by ranks that split matrices (tp or expert_slices above 1), each its part; export the \
             checkpoint to a folder of whole tensors first (moe_models::train::shards::export) and open that",
        )),
        _ => Ok(()),
    }
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
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
                    return Err(Error::format(self.shards[0].path(), format!("tensor {name} is missing")));
                };
                let shard = &self.shards[shard];
                let info = shard.info(&name);
                let got = info.map_or(&[][..], |info| &info.shape);
                if got != shape {
                    let reason = format!("tensor {name} must have shape {shape:?}, got {got:?}");
                    return Err(Error::format(shard.path(), reason));
                }
                if let Some(info) = info {
                    shard.dtype(&name, info.dtype)?;
                }
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

    /// Whether a stack of experts lies in the files under its own name, whole.
    fn is_whole(&self, spec: &ParamSpec) -> bool {
        spec.is_stacked() && self.by_name.contains_key(&spec.name)
    }

    /// The tensors that hold a parameter, with the shape each must have.
    fn parts(&self, spec: &ParamSpec) -> Result<Vec<(String, Vec<usize>)>> {
        if self.is_whole(spec) {
            return Ok(vec![(spec.name.clone(), spec.shape.clone())]);
        }
        let mut parts = Vec::new();
        for unit in Placement::WHOLE.extents(spec) {
            parts.extend(self.names.tensors(&unit.name, &unit.shape)?);
        }
        Ok(parts)
    }

    fn one(&self, name: &str, device: &Device) -> Result<Tensor> {
        match self.by_name.get(name) {
            Some(&shard) => self.shards[shard].tensor(name, device),
            None => Err(Error::format(self.shards[0].path(), format!("tensor {name} is missing"))),
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
