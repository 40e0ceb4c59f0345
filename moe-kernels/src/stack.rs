//! [`PackedStack`]: the packed weights of one linear map, or of one per expert, in any form; and their products.

use crate::gemm::{Operand, PackedWeights, gemm, gemm_new};
use crate::grouped_linear::packed_groups;
use crate::quantized::{IntegerMatrix, QuantFormat, QuantGroup, QuantizedWeights, quantized_gemm};
use crate::{Isa, Precision, Result};
use std::fmt;
use std::ops::Range;

/// How weights that never change are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// As numbers of this precision; the products' inputs have it too.
    Float(Precision),
    /// As integers; the products' inputs are quantized to 8 bits on the way.
    Quantized(QuantFormat),
}

impl From<Precision> for WeightFormat {
    fn from(precision: Precision) -> Self {
        Self::Float(precision)
    }
}

impl From<QuantFormat> for WeightFormat {
    fn from(format: QuantFormat) -> Self {
        Self::Quantized(format)
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(Precision::F32) => f.write_str("f32"),
            Self::Float(Precision::Bf16) => f.write_str("bf16"),
            Self::Quantized(format) => format.fmt(f),
        }
    }
}

/// PackedStack `[out, in]` of one shape and form, one per expert.
#[derive(Debug, Clone)]
pub enum PackedStack {
    /// As floats of this precision.
    Float(Precision, Vec<PackedWeights>),
    /// As integers of this format.
    Quantized(QuantFormat, Vec<QuantizedWeights>),
}

impl PackedStack {
    /// None yet.
    pub fn new(format: WeightFormat) -> Self {
        match format {
            WeightFormat::Float(precision) => Self::Float(precision, Vec::new()),
            WeightFormat::Quantized(format) => Self::Quantized(format, Vec::new()),
        }
    }

    /// Packs one more, of row-major `[out, in]` values.
    ///
    /// # Errors
    /// As [`IntegerMatrix::nearest`], where the form is of integers.
    ///
    /// # Panics
    /// If `values` has another size.
    pub fn push(&mut self, isa: Isa, values: &[f32], [out, inner]: [usize; 2]) -> Result<()> {
        match self {
            Self::Float(precision, all) => {
                all.push(PackedWeights::new(isa, *precision, &Operand::rows(values, out, inner, inner)));
            }
            Self::Quantized(format, all) => all.push(QuantizedWeights::new(*format, values, [out, inner])?),
        }
        Ok(())
    }

    /// The same of a matrix of which `rows` gives some rows at a time, row-major.
    ///
    /// # Errors
    /// As [`PackedStack::push`], and those of `rows`.
    ///
    /// # Panics
    /// If `rows` gives more or fewer values.
    pub fn push_rows(
        &mut self,
        isa: Isa,
        shape: [usize; 2],
        rows: impl Fn(Range<usize>) -> Result<Vec<f32>> + Sync,
    ) -> Result<()> {
        match self {
            Self::Float(precision, all) => all.push(PackedWeights::from_rows(isa, *precision, shape, rows)?),
            Self::Quantized(format, all) => all.push(QuantizedWeights::from_rows(*format, shape, rows)?),
        }
        Ok(())
    }

    /// Integers as they are, one matrix per expert.
    pub fn of_integers(format: QuantFormat, matrices: impl IntoIterator<Item = IntegerMatrix>) -> Self {
        Self::Quantized(format, matrices.into_iter().map(|matrix| QuantizedWeights::pack(&matrix)).collect())
    }

    /// How they are kept.
    pub fn format(&self) -> WeightFormat {
        match self {
            Self::Float(precision, _) => (*precision).into(),
            Self::Quantized(format, _) => (*format).into(),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Float(_, all) => all.len(),
            Self::Quantized(_, all) => all.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `[out, in]` of each; `None` without any.
    pub fn shape(&self) -> Option<[usize; 2]> {
        match self {
            Self::Float(_, all) => all.first().map(PackedWeights::shape),
            Self::Quantized(_, all) => all.first().map(QuantizedWeights::shape),
        }
    }

    /// Size in memory, scales included.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Float(_, all) => all.iter().map(PackedWeights::bytes).sum(),
            Self::Quantized(_, all) => all.iter().map(QuantizedWeights::bytes).sum(),
        }
    }

    /// Copies row `row` of matrix `index`, as the products read it, `[in]`.
    pub(crate) fn copy_row(&self, index: usize, row: usize, to: &mut [f32]) {
        match self {
            Self::Float(_, all) => all[index].copy_row(row, to),
            Self::Quantized(_, all) => all[index].copy_row(row, to),
        }
    }

    /// Each expert's rows `offsets[e]..offsets[e + 1]` times its matrix, with its part of `bias` `[experts, out]`, into `out`.
    pub(crate) fn product(&self, isa: Isa, rows: &[f32], bias: Option<&[f32]>, offsets: &[usize], out: &mut [f32]) {
        match self {
            Self::Float(precision, all) => gemm(isa, *precision, &packed_groups(rows, all, bias, offsets), out),
            Self::Quantized(_, all) => quantized_gemm(isa, &quantized_groups(rows, all, bias, offsets), out),
        }
    }

    /// The same as a new buffer of `len` elements.
    pub(crate) fn product_new(
        &self,
        isa: Isa,
        rows: &[f32],
        bias: Option<&[f32]>,
        offsets: &[usize],
        len: usize,
    ) -> Vec<f32> {
        match self {
            Self::Float(precision, all) => gemm_new(isa, *precision, &packed_groups(rows, all, bias, offsets), len),
            Self::Quantized(..) => {
                let mut out = vec![0.0; len];
                self.product(isa, rows, bias, offsets, &mut out);
                out
            }
        }
    }
}

fn quantized_groups<'a>(
    x: &'a [f32],
    weights: &'a [QuantizedWeights],
    bias: Option<&'a [f32]>,
    offsets: &[usize],
) -> Vec<QuantGroup<'a>> {
    let group = |(expert, (pair, weights)): (usize, (&[usize], &'a QuantizedWeights))| {
        let [out, inner] = weights.shape();
        QuantGroup {
            rows: &x[pair[0] * inner..pair[1] * inner],
            weights,
            bias: bias.map(|bias| &bias[expert * out..][..out]),
            out_offset: pair[0] * out,
        }
    };
    offsets.windows(2).zip(weights).enumerate().filter(|(_, (pair, _))| pair[1] > pair[0]).map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, select};

    /// Rows that come a stretch at a time make the matrix that all of them make at once.
    #[test]
    fn rows_at_a_time_make_the_same_matrix() {
        let forms = [
            WeightFormat::from(Precision::F32),
            Precision::Bf16.into(),
            QuantFormat::Int8.into(),
            QuantFormat::INT4.into(),
        ];
        for (form, [out, inner]) in
            forms.into_iter().flat_map(|form| [[1, 5], [31, 64], [200, 1030]].map(|s| (form, s)))
        {
            let values: Vec<f32> = (0..out * inner).map(|i| ((i * 7919 % 1013) as f32 - 506.0) * 0.003).collect();
            let [mut whole, mut by_rows] = [PackedStack::new(form), PackedStack::new(form)];
            whole.push(select::current(), &values, [out, inner]).unwrap();
            let rows = |range: Range<usize>| Ok(values[range.start * inner..range.end * inner].to_vec());
            by_rows.push_rows(select::current(), [out, inner], rows).unwrap();
            let x: Vec<f32> = (0..3 * inner).map(|i| ((i * 31 % 47) as f32 - 23.0) * 0.05).collect();
            let product = |stack: &PackedStack| stack.product_new(select::current(), &x, None, &[0, 3], 3 * out);
            assert_eq!(product(&whole), product(&by_rows), "{form} {out} x {inner}");
            assert_eq!((whole.bytes(), whole.shape()), (by_rows.bytes(), by_rows.shape()));
            let (mut a, mut b) = (vec![0.0; inner], vec![0.0; inner]);
            for row in 0..out {
                whole.copy_row(0, row, &mut a);
                by_rows.copy_row(0, row, &mut b);
                assert_eq!(a, b, "{form} {out} x {inner}, row {row}");
            }
        }
    }

    #[test]
    fn what_rows_cannot_be_is_told_with_its_place() {
        let mut stack = PackedStack::new(QuantFormat::Int8.into());
        let nan = |range: Range<usize>| {
            Ok(range
                .flat_map(|row| (0..1030).map(move |col| if (row, col) == (170, 3) { f32::NAN } else { 1.0 }))
                .collect())
        };
        let text = stack.push_rows(select::current(), [200, 1030], nan).unwrap_err().to_string();
        assert!(text.contains("weights[170, 3] is NaN"), "{text}");
        let failing = |range: Range<usize>| match range.start {
            0 => Ok(vec![1.0; range.len() * 1030]),
            _ => Err(Error::Argument("the disk is gone".into())),
        };
        let mut stack = PackedStack::new(Precision::Bf16.into());
        assert!(stack.push_rows(select::current(), [200, 1030], failing).unwrap_err().to_string().contains("the disk"));
        assert!(stack.is_empty());
    }
}
