//! Writing weights: per expert, in one file or in shards with an index.

use super::{expert_name, write_atomically};
use crate::gpt::Gpt;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::Path;

/// Most bytes of tensors in one file, as in `transformers`.
const SHARD_BYTES: usize = 5_000_000_000;

struct Entry {
    name: String,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

pub(crate) fn save(model: &Gpt, dir: &Path, dtype: DType) -> Result<()> {
    save_sharded(model, dir, dtype, SHARD_BYTES)
}

/// [`save`] with a given size of shards.
pub(super) fn save_sharded(model: &Gpt, dir: &Path, dtype: DType, shard_bytes: usize) -> Result<()> {
    let mut shards: Vec<Vec<Entry>> = vec![vec![]];
    let mut held = 0;
    for entry in entries(model, dtype)? {
        if held > 0 && held + entry.bytes.len() > shard_bytes {
            shards.push(vec![]);
            held = 0;
        }
        held += entry.bytes.len();
        if let Some(shard) = shards.last_mut() {
            shard.push(entry);
        }
    }
    write_shards(dir, &shards)?;
    write_json(&dir.join("generation_config.json"), &generation_config(model))?;
    let config = model.config().to_json()?;
    write_atomically(&dir.join("config.json"), |out| out.write_all(config.as_bytes()))
}

fn generation_config(model: &Gpt) -> serde_json::Value {
    let mut json = serde_json::json!({
        "do_sample": true, "temperature": 0.8, "top_p": 0.95, "max_length": model.config().max_seq_len,
    });
    if let Some(eos) = model.config().eos_token_id {
        json["bos_token_id"] = eos.into();
        json["eos_token_id"] = eos.into();
    }
    json
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, json)?;
        out.write_all(b"\n")
    })
}

fn write_shards(dir: &Path, shards: &[Vec<Entry>]) -> Result<()> {
    if let [only] = shards {
        write_shard(&dir.join("model.safetensors"), only)?;
        let stale = dir.join("model.safetensors.index.json");
        return match std::fs::remove_file(&stale) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(stale, e)),
            _ => Ok(()),
        };
    }
    let mut weight_map = BTreeMap::new();
    let mut total = 0;
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write_shard(&dir.join(&name), shard)?;
        for entry in shard {
            total += entry.bytes.len();
            weight_map.insert(entry.name.clone(), name.clone());
        }
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_json(&dir.join("model.safetensors.index.json"), &index)
}

fn write_shard(path: &Path, entries: &[Entry]) -> Result<()> {
    let views = entries
        .iter()
        .map(|e| Ok((e.name.as_str(), TensorView::new(e.dtype, e.shape.clone(), &e.bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| Error::format(path, e.to_string()))?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let bytes = safetensors::serialize(views, metadata).map_err(|e| Error::format(path, e.to_string()))?;
    write_atomically(path, |out| out.write_all(&bytes))
}

/// Every tensor under its name in the file.
fn entries(model: &Gpt, dtype: DType) -> Result<Vec<Entry>> {
    let mut out = Vec::new();
    for (name, var) in model.params() {
        let tensor = var.as_tensor().detach();
        if expert_name(name, 0).is_none() {
            out.push(entry(name.clone(), &tensor, dtype)?);
            continue;
        }
        for expert in 0..tensor.dim(0)? {
            if let Some(name) = expert_name(name, expert) {
                out.push(entry(name, &tensor.get(expert)?, dtype)?);
            }
        }
    }
    Ok(out)
}

fn entry(name: String, tensor: &Tensor, dtype: DType) -> Result<Entry> {
    let shape = tensor.dims().to_vec();
    let flat = tensor.flatten_all()?;
    let (dtype, bytes) = match dtype {
        DType::F32 => (safetensors::Dtype::F32, flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect()),
        DType::BF16 => {
            let values = flat.to_dtype(DType::BF16)?.to_vec1::<half::bf16>()?;
            (safetensors::Dtype::BF16, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::F16 => {
            let values = flat.to_dtype(DType::F16)?.to_vec1::<half::f16>()?;
            (safetensors::Dtype::F16, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        other => return Err(Error::Argument(format!("weights are saved as f32, bf16 or f16, not {other:?}"))),
    };
    Ok(Entry { name, dtype, shape, bytes })
}
