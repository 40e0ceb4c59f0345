//! [`BlockedStack`]: matrices of all experts of a layer as MXFP4, which gpt-oss publishes. Read only, as the floats they stand for.
//!
//! ```text
//! X_blocks   u8 [experts, out, in / 32, 16]   two values of 4 bits in a byte, the first in the low half
//! X_scales   u8 [experts, out, in / 32]       the exponent of a power of two for 32 values, plus 127
//! ```
//!
//! # Source
//! OCP Microscaling Formats (MX) 1.0: E2M1 values and E8M0 scales.

use super::layout::Layout;
use super::names::{FilePart, StackPlace};
use super::tensor_file::TensorHeader;
use safetensors::Dtype;

/// Values that have one scale.
const BLOCK: usize = 32;
/// Bytes of a block.
const BYTES: usize = BLOCK / 2;
/// What 4 bits stand for.
const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The two tensors in the place of a stack of transposed matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockedStack {
    name: String,
    experts: usize,
    /// `[out, in]`, rows as they lie in the files.
    shape: [usize; 2],
}

impl BlockedStack {
    /// What could be in the place of the stack that `part` is an expert of.
    pub(super) fn of(part: &FilePart) -> Option<Self> {
        let &FilePart { ref name, ref shape, place: Some(StackPlace { layout, .. }) } = part else { return None };
        match (layout, shape.as_slice()) {
            (Layout::Columns | Layout::AlternatingColumns, &[experts, inner, out]) => {
                Some(Self { name: name.clone(), experts, shape: [out, inner] })
            }
            _ => None,
        }
    }

    /// The name of the tensor of values.
    pub(super) fn blocks_name(&self) -> String {
        format!("{}_blocks", self.name)
    }

    /// The name of the tensor of scales.
    pub(super) fn scales_name(&self) -> String {
        format!("{}_scales", self.name)
    }

    /// Both tensors.
    ///
    /// # Errors
    /// The reason why no blocks can hold the matrices.
    pub(super) fn tensors(&self) -> Result<[TensorHeader; 2], String> {
        let [out, inner] = self.shape;
        if !inner.is_multiple_of(BLOCK) {
            return Err(format!("{} has rows of {inner} values, which are no blocks of {BLOCK}", self.name));
        }
        let header = |name, shape: &[usize]| TensorHeader { name, dtype: Dtype::U8, shape: shape.to_vec() };
        let groups = inner / BLOCK;
        Ok([
            header(self.blocks_name(), &[self.experts, out, groups, BYTES]),
            header(self.scales_name(), &[self.experts, out, groups]),
        ])
    }

    /// The shape of one expert in the blocks, `[out, in]`.
    pub(super) fn shape(&self) -> [usize; 2] {
        self.shape
    }
}

/// How the rows of an expert lie in blocks: those of a transposed matrix are not transposed there.
pub(super) fn layout(of: Layout) -> Layout {
    match of {
        Layout::AlternatingColumns => Layout::AlternatingRows,
        _ => Layout::Rows,
    }
}

/// The values of blocks with their scales, row-major.
pub(super) fn decode(blocks: &[u8], scales: &[u8]) -> Vec<f32> {
    let block = |(bytes, &scale): (&[u8], &u8)| {
        let scale = self::scale(scale);
        bytes.iter().flat_map(|&byte| pair(byte).map(|value| value * scale)).collect::<Vec<f32>>()
    };
    blocks.chunks_exact(BYTES).zip(scales).flat_map(block).collect()
}

/// What the low and the high half of a byte stand for, without their scale.
pub(crate) fn pair(byte: u8) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|code| VALUES[usize::from(code)])
}

/// The scale that a byte stands for, `2^(exponent - 127)`; 255 is no number.
pub(crate) fn scale(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two() {
        for exponent in 0..255u8 {
            assert_eq!(f64::from(scale(exponent)), 2f64.powi(i32::from(exponent) - 127), "{exponent}");
        }
        assert!(scale(255).is_nan());
    }

    #[test]
    fn low_halves_come_first() {
        let mut bytes = [0; BYTES];
        (bytes[0], bytes[15]) = (0x2f, 0x91);
        let values = decode(&bytes, &[128]);
        assert_eq!((values[0], values[1], values[30], values[31], values.len()), (-12.0, 2.0, 1.0, -1.0, BLOCK));
    }
}
