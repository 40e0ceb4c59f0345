//! Writing weights: per expert, in one file or in shards with an index.

use super::{NameTable, write_atomically};
use crate::params::ParamTable;
use crate::{Error, Family, Model, Result};
use candle_core::{DType, Tensor, Var};
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

pub(crate) fn save<F: Family>(model: &Model<F>, dir: &Path, dtype: DType) -> Result<()> {
    save_sharded(model, dir, dtype, SHARD_BYTES)
}

/// [`save`] with a given size of shards.
pub(super) fn save_sharded<F: Family>(model: &Model<F>, dir: &Path, dtype: DType, shard_bytes: usize) -> Result<()> {
    let mut shards: Vec<Vec<Entry>> = vec![vec![]];
    let mut held = 0;
    for entry in entries(model.table(), model.params(), model.config().names(), dtype)? {
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
    let config = model.config().to_json(dtype)?;
    write_atomically(&dir.join("config.json"), |out| out.write_all(config.as_bytes()))
}

fn generation_config<F: Family>(model: &Model<F>) -> serde_json::Value {
    let mut json = serde_json::json!({
        "do_sample": true, "temperature": 0.8, "top_p": 0.95, "max_length": model.decoder_config().max_seq_len,
    });
    if let Some(eos) = model.decoder_config().eos_token_id {
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

/// Every tensor under its names in the file.
fn entries(table: &ParamTable, params: &[(String, Var)], names: NameTable, dtype: DType) -> Result<Vec<Entry>> {
    let mut out = Vec::new();
    for (spec, (_, var)) in table.specs().iter().zip(params) {
        let tensor = var.as_tensor().detach();
        let mut split = |expert: Option<usize>, tensor: &Tensor| -> Result<()> {
            let names = names.in_files(spec, expert);
            let rows = tensor.dim(0)? / names.len();
            for (index, name) in names.into_iter().enumerate() {
                out.push(entry(name, &tensor.narrow(0, index * rows, rows)?, dtype)?);
            }
            Ok(())
        };
        if spec.is_stacked() {
            (0..spec.shape[0]).try_for_each(|expert| split(Some(expert), &tensor.get(expert)?))?;
        } else {
            split(None, &tensor)?;
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
