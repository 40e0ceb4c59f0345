//! [`TensorForm`]: the forms of a GGUF tensor that are read, and what their bytes stand for.
//!
//! # Source
//! The blocks of ggml as the `gguf` package (0.19) takes them apart. An element of a quantized block is computed in f32, in ggml's
//! order of operations. A scale of MXFP4 that is no number gives none, as the form's specification has it; ggml takes it for 2^128.

use crate::hf::mxfp4;
use half::{bf16, f16};

/// How a tensor's values are stored: rows of blocks, each of so many values in so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorForm {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
    Q6K,
    Mxfp4,
}

/// Values of a block of the simple forms.
const BLOCK: usize = 32;
/// Values of a block whose scales are themselves scaled.
const SUPER_BLOCK: usize = 256;

/// What ggml calls its other types, to refuse them by name.
const OTHERS: [(u32, &str); 31] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (13, "Q5_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl TensorForm {
    /// The form with this number.
    ///
    /// # Errors
    /// What the format calls a form that is not read.
    pub(super) fn of(number: u32) -> Result<Self, String> {
        Ok(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            39 => Self::Mxfp4,
            _ => {
                let name = OTHERS.iter().find(|(other, _)| *other == number);
                return Err(name.map_or_else(|| format!("unknown form {number}"), |(_, name)| (*name).to_owned()));
            }
        })
    }

    /// What the format calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
            Self::Mxfp4 => "MXFP4",
        }
    }

    /// Whether values are integers with scales.
    pub(super) fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Values and bytes of a block. Rows are whole blocks.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (BLOCK, 2 + 32),
            Self::Q4_0 => (BLOCK, 2 + 16),
            Self::Q4_1 => (BLOCK, 4 + 16),
            Self::Q4K => (SUPER_BLOCK, 4 + 12 + 128),
            Self::Q6K => (SUPER_BLOCK, 128 + 64 + 16 + 2),
            Self::Mxfp4 => (BLOCK, 1 + 16),
        }
    }

    /// The values of whole blocks.
    pub(super) fn values(self, bytes: &[u8]) -> Vec<f32> {
        let (values, size) = self.block();
        debug_assert!(bytes.len().is_multiple_of(size));
        let mut out = vec![0.0; bytes.len() / size * values];
        let blocks = bytes.chunks_exact(size).zip(out.chunks_exact_mut(values));
        match self {
            Self::F32 => blocks.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => blocks.for_each(|(b, out)| out[0] = half_at(b, 0)),
            Self::Bf16 => blocks.for_each(|(b, out)| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::Q8_0 => blocks.for_each(|(b, out)| q8_0(b, out)),
            Self::Q4_0 => blocks.for_each(|(b, out)| q4_0(b, out)),
            Self::Q4_1 => blocks.for_each(|(b, out)| q4_1(b, out)),
            Self::Q4K => blocks.for_each(|(b, out)| q4_k(b, out)),
            Self::Q6K => blocks.for_each(|(b, out)| q6_k(b, out)),
            Self::Mxfp4 => blocks.for_each(|(b, out)| mxfp4(b, out)),
        }
        out
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(out, &q)| *out = f32::from(q as i8) * scale);
}

/// The integers of a block of Q4_0, and its scale. The first half of the values lies in the low nibbles, the second in the high ones.
pub(super) fn q4_0_integers(block: &[u8]) -> (f32, [i8; BLOCK]) {
    let mut integers = [0; BLOCK];
    let (low, high) = integers.split_at_mut(BLOCK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
        (*low, *high) = ((byte & 15) as i8 - 8, (byte >> 4) as i8 - 8);
    }
    (half_at(block, 0), integers)
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let (scale, integers) = q4_0_integers(block);
    out.iter_mut().zip(integers).for_each(|(out, q)| *out = f32::from(q) * scale);
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, least) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[4..]) {
        *low = f32::from(byte & 15) * scale + least;
        *high = f32::from(byte >> 4) * scale + least;
    }
}

/// Eight scales and eight minima of 6 bits in 12 bytes: of the first four the low six bits of a byte each; of the others four bits in
/// the last bytes, and their two high bits above those of the first.
fn scale_and_least(packed: &[u8], part: usize) -> (f32, f32) {
    let (scale, least) = match part {
        0..4 => (packed[part] & 63, packed[part + 4] & 63),
        _ => (
            (packed[part + 4] & 15) | ((packed[part - 4] >> 6) << 4),
            (packed[part + 4] >> 4) | ((packed[part] >> 6) << 4),
        ),
    };
    (f32::from(scale), f32::from(least))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, least) = (half_at(block, 0), half_at(block, 2));
    let (packed, bytes) = block[4..].split_at(12);
    let part = |part| {
        let (s, m) = scale_and_least(packed, part);
        (scale * s, least * m)
    };
    for (pair, (bytes, out)) in bytes.chunks_exact(BLOCK).zip(out.chunks_exact_mut(2 * BLOCK)).enumerate() {
        let ((scale0, least0), (scale1, least1)) = (part(2 * pair), part(2 * pair + 1));
        let (low, high) = out.split_at_mut(BLOCK);
        for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = scale0 * f32::from(byte & 15) - least0;
            *high = scale1 * f32::from(byte >> 4) - least1;
        }
    }
}

/// Four low bits of each value, then two high bits of each, a scale for 16 values, and one for all.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, scale) = (&rest[..16], half_at(rest, 16));
    let halves = low.chunks_exact(64).zip(high.chunks_exact(32)).zip(scales.chunks_exact(8));
    for (((low, high), scales), out) in halves.zip(out.chunks_exact_mut(128)) {
        for (quarter, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let low = &low[quarter % 2 * BLOCK..][..BLOCK];
            for (at, out) in out.iter_mut().enumerate() {
                let bits = (low[at] >> (quarter / 2 * 4) & 15) | (high[at] >> (quarter * 2) & 3) << 4;
                let part = f32::from(scales[quarter * 2 + at / 16] as i8);
                *out = scale * part * f32::from(bits as i8 - 32);
            }
        }
    }
}

/// A scale, then values in the order of Q4_0.
fn mxfp4(block: &[u8], out: &mut [f32]) {
    let scale = mxfp4::scale(block[0]);
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[1..]) {
        [*low, *high] = mxfp4::pair(byte).map(|value| value * scale);
    }
}
