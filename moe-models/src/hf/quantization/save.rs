//! [`save`]: from a folder of floats to one of integers, matrix by matrix.

use super::config::{FIELD, QuantizationConfig};
use super::stored::StoredMatrix;
use super::{as_integers, is_product, refuse_stacks};
use crate::hf::checkpoint::{Checkpoint, WEIGHTS_FILE};
use crate::hf::file::write_atomically;
use crate::hf::tensor_file::{TensorHeader, write_header};
use crate::hf::write::{FileTensor, SHARD_BYTES, file_tensors, write_json, write_weight_index};
use crate::params::ParamTable;
use crate::train::export::{check_target, fill_target};
use crate::{DecoderConfig, Error, Family, ModelSource, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ops::host::to_f32_vec;
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Files beside the weights that a folder may have, and that stay as they are.
const OTHER_FILES: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// What a quantizer is asked for: one tensor of the files, of an expert one of its own.
#[derive(Debug, Clone, Copy)]
pub struct MatrixToQuantize<'a> {
    /// What is wanted.
    pub format: QuantFormat,
    /// Its name in files.
    pub name: &'a str,
    /// The parameter of the model that it is, or is rows of; of a stack of experts this one's own name.
    pub parameter: &'a str,
    /// Which of the parameter's rows it is: the first, counted from 0.
    pub first_row: usize,
    /// Which expert of its layer it belongs to.
    pub expert: Option<usize>,
    /// `[out, in]`
    pub shape: [usize; 2],
    /// Row-major.
    pub values: &'a [f32],
}

/// A quantizer that looks at nothing but the matrix: [`IntegerMatrix::nearest`].
///
/// # Errors
/// As there.
pub fn nearest(matrix: &MatrixToQuantize<'_>) -> Result<IntegerMatrix> {
    Ok(IntegerMatrix::nearest(matrix.format, matrix.values, matrix.shape)?)
}

/// Writes the model in the folder or GGUF file `from` with its matrices in `format` into the new folder `to`, with its tokenizer and what it says
/// of generation: whole or not at all. `quantize` gives the integers of one matrix after the other ([`nearest`], or what has been
/// calibrated), in the order of the model; one tensor is in memory at a time. Everything else stays in the type it has.
///
/// The last group of a row may be shorter than the others here; the `compressed-tensors` library reads no such matrix, so for other
/// readers choose a size that divides the inputs.
///
/// A model loaded from the new folder has the bits of one loaded from the old with [`moe_kernels::PackedForms`] that ask for the same
/// format, if `quantize` is [`nearest`]. Not so with latent attention, whose `kv_b_proj` is multiplied with in two halves that loading
/// rounds each by itself, and a folder as the one matrix that it is in files.
///
/// # Errors
/// [`Error::Argument`] if `to` exists and is not an empty folder; [`Error::Format`] if `from` is damaged, quantized already, or of a
/// family whose experts lie in stacks;
/// those of `quantize`, and [`Error::Argument`] for integers that are not as was asked; [`Error::Io`].
pub fn save(
    from: &Path,
    to: &Path,
    format: QuantFormat,
    quantize: impl FnMut(&MatrixToQuantize<'_>) -> Result<IntegerMatrix>,
) -> Result<()> {
    save_sharded(from, to, format, SHARD_BYTES, quantize)
}

/// [`save`] with a given size of shards.
pub(super) fn save_sharded(
    from: &Path,
    to: &Path,
    format: QuantFormat,
    shard_bytes: usize,
    mut quantize: impl FnMut(&MatrixToQuantize<'_>) -> Result<IntegerMatrix>,
) -> Result<()> {
    check_target(to)?;
    format.check_groups()?;
    let source = ModelSource::open(from)?;
    let (path, json) = (source.config_path(), source.required("config.json")?);
    let (family, quantization) = source.family::<Box<dyn Family>>()?;
    refuse_quantized(source.quantized_form(quantization.as_ref()), &path)?;
    refuse_stacks(family.names()).map_err(|reason| Error::format(&path, reason))?;
    let decoder = family.decoder()?;
    let (table, checkpoint) = (decoder.params(), source.checkpoint(&family)?);
    checkpoint.check(&table)?;
    let tensors = file_tensors(&table, family.names(), DType::F32)?;
    let units = tensors.iter().map(|tensor| Unit::new(tensor, format, &checkpoint)).collect::<Result<Vec<_>>>()?;
    let config = QuantizationConfig::new(format, ignored(&decoder, &table, &*family));
    fill_target(to, |dir| {
        write_units(dir, units, shard_bytes, |unit| unit.content(&checkpoint, &mut quantize))?;
        let mut fields: Map<String, Value> =
            serde_json::from_slice(&json).map_err(|e| Error::format(&path, e.to_string()))?;
        fields.insert(FIELD.to_owned(), config.to_json());
        write_json(&dir.join("config.json"), &fields.into())?;
        OTHER_FILES.iter().try_for_each(|name| match source.content(name)? {
            Some(bytes) => write_atomically(&dir.join(name), |out| out.write_all(&bytes)),
            None => Ok(()),
        })
    })
}

/// Refuses a folder whose matrices are to become integers and are.
pub(crate) fn refuse_quantized(form: Option<String>, path: &Path) -> Result<()> {
    match form {
        None => Ok(()),
        Some(form) => Err(Error::format(
            path,
            format!("the weights are quantized already, in {form}; start from those they were made of"),
        )),
    }
}

/// Modules of linear maps that are not quantized, as other readers must know.
fn ignored(decoder: &DecoderConfig, table: &ParamTable, family: &dyn Family) -> Vec<String> {
    let is_linear = |name: &str, dims: usize| dims == 2 && name.ends_with(".weight") && !name.contains(".embed_");
    let plain = table.specs().iter().filter(|spec| is_linear(&spec.name, spec.shape.len()) && !is_product(spec));
    let modules = plain.flat_map(|spec| family.names().in_files(&spec.name));
    let tied = decoder.tie_embeddings.then(|| "lm_head.weight".to_owned());
    modules.chain(tied).map(|name| name.trim_end_matches(".weight").to_owned()).collect()
}

/// What of the old folder becomes what of the new one.
struct Unit<'a> {
    from: &'a FileTensor<'a>,
    form: Form,
    headers: Vec<TensorHeader>,
}

enum Form {
    AsItIs,
    Integers(StoredMatrix),
}

impl<'a> Unit<'a> {
    fn new(from: &'a FileTensor<'a>, format: QuantFormat, checkpoint: &Checkpoint) -> Result<Self> {
        let (form, headers) = match as_integers(from, format) {
            Some(stored) => {
                let headers = stored.tensors();
                (Form::Integers(stored), headers)
            }
            None => {
                let (name, shape) = (from.header.name.clone(), from.header.shape.clone());
                // Tensors of several pieces are stacks, which have been refused.
                let piece = &from.pieces[0];
                let part = piece.elements.start / piece.elements.len().max(1);
                let dtype = checkpoint.file_dtype(from.spec, piece.expert, part)?;
                (Form::AsItIs, vec![TensorHeader { name, dtype, shape }])
            }
        };
        Ok(Self { from, form, headers })
    }

    fn bytes(&self) -> usize {
        self.headers.iter().map(TensorHeader::bytes).sum()
    }

    /// The content of its tensors.
    fn content(
        &self,
        checkpoint: &Checkpoint,
        quantize: &mut impl FnMut(&MatrixToQuantize<'_>) -> Result<IntegerMatrix>,
    ) -> Result<Vec<Vec<u8>>> {
        let spec = self.from.spec;
        // Tensors of several pieces are stacks, which have been refused.
        let from = &self.from.pieces[0];
        let own = match from.expert {
            Some(expert) => checkpoint.expert(spec, expert, &Device::Cpu)?,
            None => checkpoint.tensor(spec, &Device::Cpu)?,
        };
        let own = own.flatten_all()?.narrow(0, from.elements.start, from.elements.len())?;
        let Form::Integers(stored) = &self.form else { return Ok(vec![raw_bytes(&own)?]) };
        let values = to_f32_vec(&own)?;
        let first_row = from.elements.start / stored.shape[1].max(1);
        let (name, parameter) = (&stored.name, &from.unit.name);
        let (format, shape, expert) = (stored.format, stored.shape, from.expert);
        let wanted = MatrixToQuantize { format, name, parameter, first_row, expert, shape, values: &values };
        let refused = |reason: String| Error::Argument(format!("tensor {name} {reason}"));
        let matrix = quantize(&wanted).map_err(|e| match e {
            Error::Kernel(e) => refused(format!("cannot be quantized: {e}")),
            other => other,
        })?;
        stored.content(&matrix).map_err(refused)
    }
}

/// Values in the type they have, little-endian.
fn raw_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(match tensor.dtype() {
        DType::BF16 => tensor.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => tensor.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => tensor.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
    })
}

/// Writes units into one file, or into several and an index, each unit whole in one of them.
fn write_units(
    dir: &Path,
    units: Vec<Unit<'_>>,
    shard_bytes: usize,
    mut content: impl FnMut(&Unit<'_>) -> Result<Vec<Vec<u8>>>,
) -> Result<()> {
    let mut shards: Vec<Vec<Unit<'_>>> = vec![vec![]];
    let mut held = 0;
    for unit in units {
        if held > 0 && held + unit.bytes() > shard_bytes {
            shards.push(vec![]);
            held = 0;
        }
        held += unit.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(unit);
        }
    }
    if let [only] = shards.as_slice() {
        return write_shard(&dir.join(WEIGHTS_FILE), only, &mut content);
    }
    let (mut weight_map, mut total_size, count) = (BTreeMap::new(), 0, shards.len());
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
        write_shard(&dir.join(&file), shard, &mut content)?;
        for header in shard.iter().flat_map(|unit| &unit.headers) {
            total_size += header.bytes();
            weight_map.insert(header.name.clone(), file.clone());
        }
    }
    write_weight_index(dir, &weight_map, total_size)
}

/// The tensors of a matrix are made together and do not lie together, so each is written at its place.
fn write_shard(
    path: &Path,
    units: &[Unit<'_>],
    content: &mut impl FnMut(&Unit<'_>) -> Result<Vec<Vec<u8>>>,
) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let mut headers: Vec<TensorHeader> = units.iter().flat_map(|unit| unit.headers.clone()).collect();
    headers.sort_by(TensorHeader::order);
    let mut file = File::create(path).map_err(failed)?;
    write_header(&mut file, &[("format", "pt".into())], &headers).map_err(failed)?;
    let mut end = file.stream_position().map_err(failed)?;
    let mut places = HashMap::new();
    for header in &headers {
        places.insert(header.name.as_str(), end);
        end += header.bytes() as u64;
    }
    for unit in units {
        for (header, bytes) in unit.headers.iter().zip(content(unit)?) {
            debug_assert_eq!(bytes.len(), header.bytes(), "{}", header.name);
            file.seek(SeekFrom::Start(places[header.name.as_str()])).map_err(failed)?;
            file.write_all(&bytes).map_err(failed)?;
        }
    }
    file.sync_all().map_err(failed)
}
