//! [`Header`]: what a GGUF file says before its tensors, checked against the file's length.
//!
//! Read here, and not by `candle_core::quantized::gguf_file` (0.11): that checks lengths, but divides by an alignment of 0,
//! multiplies dimensions without a check for overflow, takes the second of two tensors or keys of one name, and does not see tensors
//! that overlap or lie askew; and it copies whole tensors, where experts are wanted one by one. A header is small, and everything
//! in it is checked once, here; nothing is allocated by a count or length that the file names, only by what it holds.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  pairs u64 | pairs: name, type u32, value | tensors: name, dimensions, form u32, offset u64 | padding | data
//! ```
//!
//! # Source
//! ggml's `docs/gguf.md`, version 3 (2 has the same layout).

use super::form::TensorForm;
use super::value::{Reader, Value};
use crate::fields::Checked;
use std::collections::BTreeMap;

/// What a header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorAt {
    pub(super) form: TensorForm,
    /// Rows first: the file's dimensions in reverse.
    pub(super) shape: Vec<usize>,
    /// The first byte, from the file's beginning.
    pub(super) start: usize,
    pub(super) bytes: usize,
}

impl TensorAt {
    /// Values of a row.
    pub(super) fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        let (values, bytes) = self.form.block();
        self.columns() / values * bytes
    }
}

/// Everything before the tensors.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorAt>,
}

const MAGIC: &[u8] = b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
/// Where tensors begin unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;
const MOST_ALIGNMENT: u64 = 1 << 20;
const MOST_DIMENSIONS: u32 = 4;

impl Header {
    pub(super) fn read(bytes: &[u8]) -> Checked<Self> {
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len() as u64)? != MAGIC {
            return Err("it does not begin with the letters GGUF".into());
        }
        match reader.u32()? {
            version if VERSIONS.contains(&version) => {}
            version if VERSIONS.contains(&version.swap_bytes()) => {
                return Err("its numbers are big-endian; convert it on a little-endian machine".into());
            }
            version => return Err(format!("version {version} is not implemented, only 2 and 3; convert it again")),
        }
        let (num_tensors, num_pairs) = (reader.u64()?, reader.u64()?);
        let mut metadata = BTreeMap::new();
        for _ in 0..num_pairs {
            let name = reader.text()?;
            let value = Value::read(&mut reader).map_err(|reason| format!("{name}: {reason}"))?;
            if metadata.insert(name.to_owned(), value).is_some() {
                return Err(format!("{name} is there twice"));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..num_tensors {
            let name = reader.text()?;
            let tensor = read_tensor(&mut reader).map_err(|reason| format!("tensor {name}: {reason}"))?;
            if tensors.insert(name.to_owned(), tensor).is_some() {
                return Err(format!("tensor {name} is there twice"));
            }
        }
        let alignment = alignment(&metadata)?;
        let start = (reader.at() as u64).next_multiple_of(alignment);
        Ok(Self { metadata, tensors: place(tensors, start, alignment, bytes.len() as u64)? })
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Checked<u64> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::Unsigned(alignment)) if (8..=MOST_ALIGNMENT).contains(alignment) && alignment.is_multiple_of(8) => {
            Ok(*alignment)
        }
        Some(other) => {
            Err(format!("general.alignment must be a multiple of 8 from 8 to {MOST_ALIGNMENT}, got {other:?}"))
        }
    }
}

/// A tensor's form, shape and bytes, and its offset among the data.
struct Described {
    form: TensorForm,
    shape: Vec<usize>,
    bytes: u64,
    offset: u64,
}

fn read_tensor(reader: &mut Reader<'_>) -> Checked<Described> {
    let dimensions = reader.u32()?;
    if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
        return Err(format!("it must have 1 to {MOST_DIMENSIONS} dimensions, got {dimensions}"));
    }
    let mut sizes = (0..dimensions).map(|_| reader.u64()).collect::<Checked<Vec<u64>>>()?;
    let form = TensorForm::of(reader.u32()?).map_err(|form| {
        format!("{form} is not implemented, only F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K and MXFP4; quantize it to one of them")
    })?;
    let (values, block_bytes) = form.block();
    let elements = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size)).filter(|&n| n > 0);
    let elements = elements.ok_or_else(|| format!("no tensor can have the dimensions {sizes:?}"))?;
    if !sizes[0].is_multiple_of(values as u64) {
        return Err(format!("rows of {} values are not whole blocks of {values}, as {} has", sizes[0], form.name()));
    }
    let bytes = (elements / values as u64).checked_mul(block_bytes as u64);
    let bytes = bytes.ok_or_else(|| format!("no file can hold the dimensions {sizes:?}"))?;
    sizes.reverse();
    let shape = sizes.into_iter().map(usize::try_from).collect::<Result<_, _>>();
    Ok(Described { form, shape: shape.map_err(|e| e.to_string())?, bytes, offset: reader.u64()? })
}

/// Refuses tensors that end past the file, lie askew, or overlap.
fn place(
    tensors: BTreeMap<String, Described>,
    start: u64,
    alignment: u64,
    file_len: u64,
) -> Checked<BTreeMap<String, TensorAt>> {
    let mut ranges = Vec::with_capacity(tensors.len());
    let mut placed = BTreeMap::new();
    for (name, tensor) in tensors {
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(format!("tensor {name} begins at {}, no multiple of {alignment}", tensor.offset));
        }
        let first = start.checked_add(tensor.offset);
        let range = first.and_then(|first| Some(first..first.checked_add(tensor.bytes)?));
        let Some(range) = range.filter(|range| range.end <= file_len) else {
            return Err(format!(
                "tensor {name} has {} bytes from {} on, past the end of the file, which has {file_len}",
                tensor.bytes, tensor.offset
            ));
        };
        let fits = |n: u64| usize::try_from(n).map_err(|e| e.to_string());
        let (form, shape) = (tensor.form, tensor.shape);
        placed.insert(name.clone(), TensorAt { form, shape, start: fits(range.start)?, bytes: fits(tensor.bytes)? });
        ranges.push((range, name));
    }
    ranges.sort_by_key(|(range, _)| range.start);
    match ranges.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        Some(pair) => Err(format!("tensors {} and {} overlap", pair[0].1, pair[1].1)),
        None => Ok(placed),
    }
}
