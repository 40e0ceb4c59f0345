//! Packed weights as bytes, and back: what a program needs that keeps them in a file and maps it at its next start.
//!
//! The bytes are this machine's (its order of bytes, and this version's layout): whoever keeps them says so beside them.

use crate::buffer::{Number, SharedBytes, as_bytes};
use crate::gemm::PackedWeights;
use crate::quantized::QuantizedWeights;
use crate::stack::{PackedStack, WeightFormat};
use crate::{PackedMatrices, Words};
use std::fmt::Debug;

/// Version of the layout that packed weights have, to be raised with every change of it.
pub const LAYOUT: u32 = 1;

/// Packed weights that are kept somewhere, as in a file that an earlier start has written.
pub trait KeptWeights: Debug + Send + Sync {
    /// Those of this name and shape, if they are there.
    fn find(&self, name: &str, dims: &[usize]) -> Option<PackedMatrices>;
}

/// Stretches of bytes that one matrix is kept in: its words, and for integers of 8 bits its scales and offsets.
fn sections_of(format: WeightFormat) -> usize {
    match format {
        WeightFormat::Float(_) => 1,
        WeightFormat::Quantized(_) => 3,
    }
}

impl PackedStack {
    /// What it is made of, matrix by matrix; the first of a matrix's stretches has to begin at a cache line.
    pub fn sections(&self) -> Vec<&[u8]> {
        match self {
            Self::Float(_, all) => all.iter().map(|matrix| as_bytes(matrix.words().as_slice())).collect(),
            Self::Quantized(_, all) => all
                .iter()
                .flat_map(|matrix| {
                    let (words, scales, offsets) = matrix.parts();
                    [as_bytes(words.as_slice()), as_bytes(scales), as_bytes(offsets)]
                })
                .collect(),
        }
    }

    /// Matrices `[out, in]` of which [`Self::sections`] were these: words stay where they are. `None` if they do not fit.
    pub fn of_sections(format: WeightFormat, shape: [usize; 2], sections: &[SharedBytes]) -> Option<Self> {
        let matrices = sections.chunks_exact(sections_of(format));
        if !matrices.remainder().is_empty() {
            return None;
        }
        match format {
            WeightFormat::Float(precision) => {
                let matrix =
                    |parts: &[SharedBytes]| PackedWeights::of_words(precision, shape, Words::shared(parts[0].clone())?);
                Some(Self::Float(precision, matrices.map(matrix).collect::<Option<_>>()?))
            }
            WeightFormat::Quantized(format) => {
                let matrix = |parts: &[SharedBytes]| {
                    let parts = (Words::shared(parts[0].clone())?, numbers(&parts[1])?, numbers(&parts[2])?);
                    QuantizedWeights::of_parts(format, shape, parts)
                };
                Some(Self::Quantized(format, matrices.map(matrix).collect::<Option<_>>()?))
            }
        }
    }
}

fn numbers<T: Number>(bytes: &SharedBytes) -> Option<Vec<T>> {
    let (numbers, rest) = bytes.as_slice().as_chunks();
    rest.is_empty().then(|| numbers.iter().copied().map(T::of_bytes).collect())
}
