//! Reading weights: one file or shards with an index; every name and shape is checked.

use super::expert_name;
use crate::gpt::{Gpt, GptConfig, ParamSpec, param_specs};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The bytes of one safetensors file with its name for messages.
struct Shard<'a> {
    path: PathBuf,
    tensors: SafeTensors<'a>,
}

impl<'a> Shard<'a> {
    fn new(path: PathBuf, bytes: &'a [u8]) -> Result<Self> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
            Error::format(&path, format!("not a whole safetensors file: {e}; the file may be truncated, copy it again"))
        })?;
        Ok(Self { path, tensors })
    }
}

pub(crate) fn from_bytes(config_json: &[u8], weights: &[u8], device: &Device) -> Result<Gpt> {
    let config = GptConfig::from_json(config_json, Path::new("config.json"))?;
    build(config, &[Shard::new("model.safetensors".into(), weights)?], device)
}

pub(crate) fn load(dir: &Path, device: &Device) -> Result<Gpt> {
    let config = GptConfig::from_json_file(&dir.join("config.json"))?;
    let files = weight_files(dir)?;
    let contents: Vec<Vec<u8>> =
        files.iter().map(|f| std::fs::read(f).map_err(|e| Error::io(f, e))).collect::<Result<_>>()?;
    let shards: Vec<Shard<'_>> =
        files.into_iter().zip(&contents).map(|(f, bytes)| Shard::new(f, bytes)).collect::<Result<_>>()?;
    build(config, &shards, device)
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

fn build(config: GptConfig, shards: &[Shard<'_>], device: &Device) -> Result<Gpt> {
    let mut source = Source { shards, by_name: BTreeMap::new(), used: BTreeSet::new(), device };
    for (index, shard) in shards.iter().enumerate() {
        for name in shard.tensors.names() {
            if source.by_name.insert(name.to_owned(), index).is_some() {
                return Err(Error::format(&shard.path, format!("tensor {name} is in two files")));
            }
        }
    }
    // A layer has tensors of its own: a number of layers beyond theirs would fill the memory with names that no file has.
    if config.num_layers > source.by_name.len() {
        let (layers, tensors) = (config.num_layers, source.by_name.len());
        let reason = format!("num_hidden_layers is {layers} in config.json, but the files hold only {tensors} tensors");
        return Err(Error::format(&shards[0].path, reason));
    }
    // Names first, so that a file of another model is refused before anything is built.
    for spec in param_specs(&config) {
        source.expect(&spec)?;
    }
    if let Some((name, &shard)) = source.by_name.iter().find(|(name, _)| !source.used.contains(*name)) {
        return Err(Error::format(
            &shards[shard].path,
            format!("tensor {name} does not belong to the configured model"),
        ));
    }
    Gpt::from_fn(config, device, |spec| source.tensor(spec))
}

struct Source<'a> {
    shards: &'a [Shard<'a>],
    by_name: BTreeMap<String, usize>,
    used: BTreeSet<String>,
    device: &'a Device,
}

impl Source<'_> {
    /// The names that hold a parameter, with the shape each must have.
    fn parts(&self, spec: &ParamSpec) -> Vec<(String, Vec<usize>)> {
        match expert_name(&spec.name, 0) {
            Some(first) if self.by_name.contains_key(&first) || !self.by_name.contains_key(&spec.name) => (0..spec
                .shape[0])
                .filter_map(|e| expert_name(&spec.name, e).map(|name| (name, spec.shape[1..].to_vec())))
                .collect(),
            _ => vec![(spec.name.clone(), spec.shape.clone())],
        }
    }

    fn expect(&mut self, spec: &ParamSpec) -> Result<()> {
        for (name, shape) in self.parts(spec) {
            let Some(&shard) = self.by_name.get(&name) else {
                return Err(Error::format(&self.shards[0].path, format!("tensor {name} is missing")));
            };
            let shard = &self.shards[shard];
            let view = shard.tensors.tensor(&name).map_err(|e| Error::format(&shard.path, e.to_string()))?;
            if view.shape() != shape {
                let got = view.shape();
                return Err(Error::format(
                    &shard.path,
                    format!("tensor {name} must have shape {shape:?}, got {got:?}"),
                ));
            }
            self.used.insert(name);
        }
        Ok(())
    }

    fn tensor(&self, spec: &ParamSpec) -> Result<Tensor> {
        let parts = self
            .parts(spec)
            .into_iter()
            .map(|(name, shape)| {
                let shard = &self.shards[self.by_name[&name]];
                let view = shard.tensors.tensor(&name).map_err(|e| Error::format(&shard.path, e.to_string()))?;
                let dtype = match view.dtype() {
                    Dtype::F32 => DType::F32,
                    Dtype::BF16 => DType::BF16,
                    Dtype::F16 => DType::F16,
                    other => {
                        let reason = format!("tensor {name} must be f32, bf16 or f16, got {other:?}");
                        return Err(Error::format(&shard.path, reason));
                    }
                };
                Ok(Tensor::from_raw_buffer(view.data(), dtype, &shape, self.device)?.to_dtype(DType::F32)?)
            })
            .collect::<Result<Vec<_>>>()?;
        match parts.as_slice() {
            [one] if one.dims() == spec.shape => Ok(one.clone()),
            many => Ok(Tensor::stack(many, 0)?),
        }
    }
}
