//! [`GgufTensors`]: the tensors of a GGUF file as those that a checkpoint asks for, by the names of [`NAMES`].
//!
//! Most are there as they are asked for. Experts lie in stacks and are given one by one; rows of queries and keys that the file has in
//! another order are put back; the matrices of latent attention's heads come from one tensor or from two.

use super::file::GgufFile;
use super::form::{TensorForm, q4_0_integers};
use super::header::TensorAt;
use crate::hf::{FilePart, NameTable, TensorFiles};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use moe_kernels::quantized::QuantFormat;
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// From the names of parameters to those of GGUF; an expert's is `blk.N.ffn_exps.EXPERT.gate.weight`, a part of `blk.N.ffn_gate_exps.weight`.
pub(super) const NAMES: NameTable = NameTable::new(&[
    ("model.embed_tokens.", &["token_embd."]),
    ("model.norm.", &["output_norm."]),
    ("lm_head.", &["output."]),
    ("model.layers.", &["blk."]),
    ("input_layernorm.", &["attn_norm."]),
    ("post_attention_layernorm.", &["ffn_norm."]),
    ("self_attn.q_proj.", &["attn_q."]),
    ("self_attn.k_proj.", &["attn_k."]),
    ("self_attn.v_proj.", &["attn_v."]),
    ("self_attn.o_proj.", &["attn_output."]),
    ("self_attn.sinks", &["attn_sinks.weight"]),
    ("self_attn.q_norm.", &["attn_q_norm."]),
    ("self_attn.k_norm.", &["attn_k_norm."]),
    ("self_attn.q_a_proj.", &["attn_q_a."]),
    ("self_attn.q_a_layernorm.", &["attn_q_a_norm."]),
    ("self_attn.q_b_proj.", &["attn_q_b."]),
    ("self_attn.kv_a_proj_with_mqa.", &["attn_kv_a_mqa."]),
    ("self_attn.kv_a_layernorm.", &["attn_kv_a_norm."]),
    ("self_attn.kv_b_proj.", &["attn_kv_b."]),
    ("mlp.gate.selection_bias", &["exp_probs_b.bias"]),
    ("mlp.gate.", &["ffn_gate_inp."]),
    ("mlp.shared_expert_gate.", &["ffn_gate_inp_shexp."]),
    ("mlp.shared_expert.fc_in.weight", &["ffn_gate_shexp.weight", "ffn_up_shexp.weight"]),
    ("mlp.shared_expert.fc_out.weight", &["ffn_down_shexp.weight"]),
    ("mlp.experts.", &["ffn_exps."]),
    ("mlp.fc_in.weight", &["ffn_gate.weight", "ffn_up.weight"]),
    ("mlp.fc_out.weight", &["ffn_down.weight"]),
    ("fc_in.weight", &["gate.weight", "up.weight"]),
    ("fc_out.weight", &["down.weight"]),
    ("fc_in.bias", &["gate.bias", "up.bias"]),
    ("fc_out.bias", &["down.bias"]),
]);

/// How an architecture's files order what this project has in another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Layout {
    /// Heads of queries and of keys, if in each the rows that turn together are neighbours in the file, and half a head apart here.
    pub(super) neighbours_turn: Option<[usize; 2]>,
    /// Latent attention's heads.
    pub(super) latent: Option<LatentHeads>,
    /// Whether the norm before the feed-forward network is named after the attention that it follows.
    pub(super) norm_after_attention: bool,
    /// Whether the configuration is made of the factors on rotary frequencies too.
    pub(super) reads_rope_freqs: bool,
}

/// Latent attention's matrices: of each head that of its keys and below it that of its values here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LatentHeads {
    pub(super) heads: usize,
    pub(super) nope_dim: usize,
    pub(super) value_dim: usize,
}

/// Where a tensor that is asked for lies.
enum Found<'a> {
    /// Rows of a tensor, in the order of the heads of so many that neighbours turn in, or in the file's.
    Rows { name: String, tensor: &'a TensorAt, rows: Range<usize>, heads: Option<usize> },
    /// Matrices of keys, transposed, and of values, head by head.
    Heads { keys: (String, &'a TensorAt), values: (String, &'a TensorAt), heads: LatentHeads },
}

/// The tensors of a GGUF file.
#[derive(Debug)]
pub(super) struct GgufTensors {
    file: Arc<GgufFile>,
    layout: Layout,
}

impl GgufTensors {
    pub(super) fn new(file: Arc<GgufFile>, layout: Layout) -> Self {
        Self { file, layout }
    }

    fn find(&self, name: &str) -> Option<Found<'_>> {
        let whole = |name: String, heads| {
            let tensor = self.file.tensor(&name)?;
            let rows = 0..tensor.shape[..tensor.shape.len() - 1].iter().product();
            Some(Found::Rows { name, tensor, rows, heads })
        };
        if let Some((layer, expert)) = name.split_once("ffn_exps.") {
            let (expert, part) = expert.split_once('.')?;
            let (kind, end) = part.split_once('.')?;
            let (name, expert) = (format!("{layer}ffn_{kind}_exps.{end}"), expert.parse::<usize>().ok()?);
            let tensor = self.file.tensor(&name)?;
            let (&experts, one) = tensor.shape.split_first()?;
            // A bias is one row.
            let rows: usize = one.split_last()?.1.iter().product();
            let rows = (expert < experts).then_some(expert * rows..(expert + 1) * rows)?;
            return Some(Found::Rows { name, tensor, rows, heads: None });
        }
        if let Some(layer) = name.strip_suffix("attn_kv_b.weight")
            && let Some(heads) = self.layout.latent
            && let Some(found) = self.heads(layer, heads)
        {
            return Some(found);
        }
        let heads = self.layout.neighbours_turn.and_then(|[queries, keys]| match name.rsplit('.').nth(1) {
            Some("attn_q") => Some(queries),
            Some("attn_k") => Some(keys),
            _ => None,
        });
        match name.strip_suffix("ffn_norm.weight") {
            Some(layer) if self.layout.norm_after_attention => {
                whole(format!("{layer}post_attention_norm.weight"), heads)
            }
            _ => whole(name.to_owned(), heads),
        }
    }

    fn heads(&self, layer: &str, heads: LatentHeads) -> Option<Found<'_>> {
        let [keys, values] = ["attn_k_b", "attn_v_b"].map(|part| {
            let name = format!("{layer}{part}.weight");
            self.file.tensor(&name).map(|tensor| (name, tensor))
        });
        Some(Found::Heads { keys: keys?, values: values?, heads })
    }

    fn found(&self, part: &FilePart) -> Result<Found<'_>> {
        let found = self.find(&part.name).ok_or_else(|| self.missing(part))?;
        found.check(&part.shape).map_err(|reason| self.file.refused(reason))?;
        Ok(found)
    }

    fn missing(&self, part: &FilePart) -> Error {
        self.file.refused(format!("tensor {} is missing", part.name))
    }

    /// The blocks of a tensor in the order in which it is asked for.
    fn bytes(&self, tensor: &TensorAt, rows: &Range<usize>, heads: Option<usize>) -> Cow<'_, [u8]> {
        match heads {
            // A bias is one row of as many values as there are rows elsewhere.
            Some(heads) if tensor.shape.len() == 1 => {
                let size = tensor.form.block().1;
                let data = self.file.data(tensor);
                let value = |at: usize| &data[at * size..][..size];
                Cow::Owned(halves_apart(tensor.columns(), heads).flat_map(value).copied().collect())
            }
            Some(heads) => self.file.rows(tensor, halves_apart(rows.len(), heads)),
            None => {
                let size = tensor.row_bytes();
                Cow::Borrowed(&self.file.data(tensor)[rows.start * size..rows.end * size])
            }
        }
    }

    /// What blocks of a tensor stand for, in their own type if they are floats, else in f32.
    fn floats(&self, of: (&str, &TensorAt), blocks: &[u8], shape: &[usize], device: &Device) -> Result<Tensor> {
        match of.1.form {
            TensorForm::F16 => Ok(Tensor::from_raw_buffer(blocks, DType::F16, shape, device)?),
            TensorForm::Bf16 => Ok(Tensor::from_raw_buffer(blocks, DType::BF16, shape, device)?),
            _ => Ok(Tensor::from_vec(self.values(of, blocks)?, shape, device)?),
        }
    }

    /// What blocks of a tensor stand for. Refuses scales that are no numbers, or too large for their values.
    fn values(&self, (name, tensor): (&str, &TensorAt), blocks: &[u8]) -> Result<Vec<f32>> {
        let values = tensor.form.values(blocks);
        match values.iter().find(|value| !value.is_finite()).filter(|_| tensor.form.is_quantized()) {
            Some(value) => {
                let form = tensor.form.name();
                Err(self
                    .file
                    .refused(format!("tensor {name} has {form} blocks that stand for {value}; copy the file again")))
            }
            None => Ok(values),
        }
    }

    /// Q4_0 of rows as they are asked for: its blocks are those of [`QuantFormat::INT4`], but for a scale of f16.
    fn blocks(&self, part: &FilePart) -> Result<Cow<'_, [u8]>> {
        match self.found(part)? {
            Found::Rows { tensor, rows, heads, .. } if tensor.form == TensorForm::Q4_0 => {
                Ok(self.bytes(tensor, &rows, heads))
            }
            _ => Err(self.file.refused(format!("tensor {} is not stored as integers of 4 bits", part.name))),
        }
    }
}

/// Row `i` of the first half of a head is row `2 i` of the file, of the second half `2 i + 1`.
fn halves_apart(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let dim = rows / heads.max(1);
    (0..rows).map(move |row| {
        let (head, at) = (row / dim, row % dim);
        head * dim + if at < dim / 2 { 2 * at } else { 2 * (at - dim / 2) + 1 }
    })
}

/// Dimensions of 1 say nothing, and are left out in some files.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    a.iter().filter(|&&size| size != 1).eq(b.iter().filter(|&&size| size != 1))
}

impl Found<'_> {
    fn check(&self, wanted: &[usize]) -> std::result::Result<(), String> {
        let refused = |name: &str, wanted: &[usize], got: &[usize]| {
            Err(format!("tensor {name} must have shape {wanted:?}, got {got:?}"))
        };
        match self {
            Self::Rows { name, tensor, rows, heads } => {
                // An expert's part has the shape of its tensor without the first dimension.
                let got = if rows.len() * tensor.columns() == tensor.shape.iter().product::<usize>() {
                    tensor.shape.as_slice()
                } else {
                    &tensor.shape[1..]
                };
                // Blocks cannot be taken apart, and a bias's values are put in order one by one.
                if heads.is_some() && tensor.shape.len() == 1 && tensor.form.is_quantized() {
                    return Err(format!("tensor {name} must be of floats, got {}", tensor.form.name()));
                }
                let fits = match heads {
                    None => same_shape(got, wanted),
                    Some(heads) => got == wanted && got[0].is_multiple_of(2 * heads.max(&1)),
                };
                if !fits {
                    return refused(name, wanted, got);
                }
            }
            Self::Heads { keys, values, heads: LatentHeads { heads, nope_dim, value_dim } } => {
                let rank = wanted.last().copied().unwrap_or(0);
                let parts = [(keys, [*heads, rank, *nope_dim]), (values, [*heads, *value_dim, rank])];
                for ((name, tensor), wanted) in parts {
                    if !same_shape(&tensor.shape, &wanted) {
                        return refused(name, &wanted, &tensor.shape);
                    }
                }
            }
        }
        Ok(())
    }

    /// The type in which values are given, and in which one that writes the tensor keeps them.
    fn dtype(&self) -> Dtype {
        match self {
            Self::Rows { tensor: TensorAt { form: TensorForm::F16, .. }, .. } => Dtype::F16,
            Self::Rows { tensor: TensorAt { form: TensorForm::Bf16, .. }, .. } => Dtype::BF16,
            _ => Dtype::F32,
        }
    }
}

impl TensorFiles for GgufTensors {
    fn path(&self) -> &Path {
        self.file.path()
    }

    /// Stacks have names of their own here, whatever the parameter's.
    fn has_whole(&self, _: &str) -> bool {
        false
    }

    fn check(&self, part: &FilePart, _: Option<QuantFormat>) -> Result<Vec<String>> {
        Ok(match self.found(part)? {
            Found::Rows { name, .. } => vec![name],
            Found::Heads { keys, values, .. } => vec![keys.0, values.0],
        })
    }

    fn unused(&self, used: &BTreeSet<String>) -> Option<Error> {
        let is_read = |name: &String| self.layout.reads_rope_freqs && name == super::ROPE_FREQS;
        let left = self.file.tensors().keys().find(|name| !used.contains(*name) && !is_read(name))?;
        Some(self.file.refused(format!("tensor {left} does not belong to the configured model")))
    }

    fn tensor(&self, part: &FilePart, device: &Device) -> Result<Tensor> {
        let shape = part.shape.as_slice();
        match self.found(part)? {
            Found::Rows { name, tensor, rows, heads } => {
                self.floats((&name, tensor), &self.bytes(tensor, &rows, heads), shape, device)
            }
            Found::Heads { keys, values, heads } => {
                let all = |(name, tensor): (String, &TensorAt)| self.values((&name, tensor), self.file.data(tensor));
                Ok(Tensor::from_vec(heads_joined(&all(keys)?, &all(values)?, heads), shape, device)?)
            }
        }
    }

    fn has_rows(&self, part: &FilePart) -> bool {
        let found = self.found(part);
        matches!(found, Ok(Found::Rows { tensor, rows, .. }) if part.shape == [rows.len(), tensor.columns()])
    }

    fn rows(&self, part: &FilePart, wanted: Range<usize>) -> Result<Tensor> {
        let Found::Rows { name, tensor, rows, heads } = self.found(part)? else {
            return Err(self.file.refused(format!("tensor {} is not there row by row", part.name)));
        };
        let size = tensor.row_bytes();
        let whole = &self.file.data(tensor)[rows.start * size..rows.end * size];
        if wanted.start == 0 {
            self.file.will_need(whole);
        }
        let shape = [wanted.len(), tensor.columns()];
        if let Some(heads) = heads {
            let order = halves_apart(rows.len(), heads).skip(wanted.start).take(wanted.len());
            let tensor = self.floats((&name, tensor), &self.file.rows(tensor, order), &shape, &Device::Cpu)?;
            if wanted.end == rows.len() {
                self.file.let_go(whole);
            }
            return Ok(tensor);
        }
        let data = &whole[wanted.start * size..wanted.end * size];
        let tensor = self.floats((&name, tensor), data, &shape, &Device::Cpu)?;
        self.file.let_go(data);
        Ok(tensor)
    }

    fn dtype(&self, part: &FilePart) -> Result<Dtype> {
        Ok(self.find(&part.name).ok_or_else(|| self.missing(part))?.dtype())
    }

    /// Of matrices that are multiplied with and nothing else; others are not rounded further, as from any source.
    fn holds_integers(&self, part: &FilePart, format: QuantFormat) -> bool {
        let is_product = part.name.starts_with("blk.") && !part.name.contains("ffn_gate_inp");
        format == QuantFormat::INT4 && is_product && self.blocks(part).is_ok()
    }

    fn integers(&self, part: &FilePart, _: QuantFormat) -> Result<Vec<i8>> {
        let blocks = self.blocks(part)?;
        Ok(blocks.chunks_exact(TensorForm::Q4_0.block().1).flat_map(|block| q4_0_integers(block).1).collect())
    }

    fn scales(&self, part: &FilePart, _: QuantFormat) -> Result<Vec<f32>> {
        let blocks = self.blocks(part)?;
        let scales = blocks.chunks_exact(TensorForm::Q4_0.block().1).map(|block| q4_0_integers(block).0);
        let scales: Vec<f32> = scales.map(|scale| bf16::from_f32(scale).to_f32()).collect();
        match scales.iter().find(|scale| !scale.is_finite()) {
            Some(scale) => Err(self.file.refused(format!("tensor {} has a scale of {scale}", part.name))),
            None => Ok(scales),
        }
    }
}

/// `keys` `[heads, rank, nope_dim]`, `values` `[heads, value_dim, rank]`; returns `[heads, nope_dim + value_dim, rank]`.
fn heads_joined(keys: &[f32], values: &[f32], LatentHeads { heads, nope_dim, value_dim }: LatentHeads) -> Vec<f32> {
    let rank = values.len() / (heads * value_dim).max(1);
    let mut out = Vec::with_capacity(keys.len() + values.len());
    for (keys, values) in keys.chunks_exact(rank * nope_dim).zip(values.chunks_exact(value_dim * rank)) {
        out.extend((0..nope_dim).flat_map(|row| (0..rank).map(move |column| keys[column * nope_dim + row])));
        out.extend_from_slice(values);
    }
    out
}
