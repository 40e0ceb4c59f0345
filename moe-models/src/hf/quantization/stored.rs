//! [`StoredMatrix`]: how one quantized matrix lies in a folder, to bytes and back.
//!
//! ```text
//! int8   X.weight         i8  [out, in]         X.weight_scale  [out, 1]
//! int4   X.weight_packed  i32 [out, in / 8]     X.weight_scale  [out, groups]    X.weight_shape  i64 [2]: out, in
//! ```
//!
//! Eight integers of 4 bits are a word, each plus 8, the first in the lowest bits; zeros fill the last word of a row. Scales are
//! bf16; f16 and f32 are read too, of 4 bits where their values are ones of bf16.

use crate::hf::tensor_file::TensorHeader;
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use safetensors::Dtype;

/// Integers of 4 bits in a word.
const PER_WORD: usize = 8;

/// A matrix that is stored as integers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredMatrix {
    /// What the matrix would be called as floats.
    pub(crate) name: String,
    pub(crate) format: QuantFormat,
    /// `[out, in]`
    pub(crate) shape: [usize; 2],
}

impl StoredMatrix {
    /// The tensor of its integers.
    pub(crate) fn integers_name(&self) -> String {
        match self.format {
            QuantFormat::Int8 => self.name.clone(),
            QuantFormat::Int4 { .. } => format!("{}_packed", self.name),
        }
    }

    /// The tensor of its scales.
    pub(crate) fn scales_name(&self) -> String {
        format!("{}_scale", self.name)
    }

    /// The tensor of its shape, where it has one.
    pub(crate) fn shape_name(&self) -> Option<String> {
        matches!(self.format, QuantFormat::Int4 { .. }).then(|| format!("{}_shape", self.name))
    }

    /// All its tensors.
    pub(crate) fn tensors(&self) -> Vec<TensorHeader> {
        let [out, inner] = self.shape;
        let header = |name, dtype, shape: &[usize]| TensorHeader { name, dtype, shape: shape.to_vec() };
        let (dtype, columns, groups) = match self.format {
            QuantFormat::Int8 => (Dtype::I8, inner, 1),
            QuantFormat::Int4 { group_size } => (Dtype::I32, inner.div_ceil(PER_WORD), inner.div_ceil(group_size)),
        };
        let mut tensors = vec![
            header(self.integers_name(), dtype, &[out, columns]),
            header(self.scales_name(), Dtype::BF16, &[out, groups]),
        ];
        tensors.extend(self.shape_name().map(|name| header(name, Dtype::I64, &[2])));
        tensors
    }

    /// The content of its tensors, in their order.
    ///
    /// # Errors
    /// What of `matrix` cannot be stored.
    pub(crate) fn content(&self, matrix: &IntegerMatrix) -> Result<Vec<Vec<u8>>, String> {
        if (matrix.format(), matrix.shape()) != (self.format, self.shape) {
            let ([out, inner], format) = (matrix.shape(), matrix.format());
            return Err(format!("must be {:?} in {}, got {:?} in {format}", self.shape, self.format, [out, inner]));
        }
        let is_bf16 = |scale: f32| scale.to_bits() & 0xffff == 0;
        if let Some(scale) = matrix.scales().iter().find(|scale| !is_bf16(**scale)) {
            return Err(format!("has a scale of {scale}, which is no value of bf16, as scales are stored"));
        }
        let scales = matrix.scales().iter().flat_map(|scale| ((scale.to_bits() >> 16) as u16).to_le_bytes()).collect();
        Ok(match self.format {
            QuantFormat::Int8 => vec![matrix.integers().iter().map(|&q| q as u8).collect(), scales],
            QuantFormat::Int4 { .. } => {
                let shape = self.shape.iter().flat_map(|&size| (size as i64).to_le_bytes()).collect();
                vec![self.packed(matrix.integers()), scales, shape]
            }
        })
    }

    fn packed(&self, integers: &[i8]) -> Vec<u8> {
        let word = |integers: &[i8]| {
            let nibbles = integers.iter().enumerate().map(|(at, &q)| ((i32::from(q) + 8) as u32) << (4 * at));
            nibbles.sum::<u32>().to_le_bytes()
        };
        integers.chunks_exact(self.shape[1].max(1)).flat_map(|row| row.chunks(PER_WORD).flat_map(word)).collect()
    }

    /// The integers `[out, in]` of the bytes of their tensor.
    pub(crate) fn integers(&self, bytes: &[u8]) -> Vec<i8> {
        let inner = self.shape[1];
        match self.format {
            QuantFormat::Int8 => bytes.iter().map(|&byte| byte as i8).collect(),
            QuantFormat::Int4 { .. } => {
                let row_bytes = inner.div_ceil(PER_WORD) * size_of::<u32>();
                let nibbles = |byte: &u8| [byte & 15, byte >> 4].map(|nibble| nibble as i8 - 8);
                bytes.chunks_exact(row_bytes.max(1)).flat_map(|row| row.iter().flat_map(nibbles).take(inner)).collect()
            }
        }
    }
}
