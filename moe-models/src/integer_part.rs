//! [`IntegerPart`]: what a rank holds of a matrix of integers where ranks divide it.

use moe_core::ParamSpec;
use moe_kernels::quantized::QuantFormat;
use moe_parallel::Placement;
use std::ops::Range;

/// Rows, columns and scales of a matrix `[out, in]`, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IntegerPart {
    /// `[out, in]` of the whole.
    whole: [usize; 2],
    rows: Vec<Range<usize>>,
    columns: Vec<Range<usize>>,
    /// The scales of a row.
    groups: Vec<Range<usize>>,
}

impl IntegerPart {
    /// Of a parameter that is a matrix, or a stack of them. `None` if it is neither, or the part begins inside a group of inputs that
    /// share a scale: no matrix of `format` has such groups.
    pub(crate) fn of(placement: Placement, spec: &ParamSpec, format: QuantFormat) -> Option<Self> {
        let &[.., out, inner] = spec.shape.as_slice() else { return None };
        let dims = spec.shape.len();
        let [rows, columns] = [dims - 2, dims - 1].map(|dim| placement.held(spec, dim));
        let size = format.group_size(inner);
        let groups = match format {
            // One scale for a row, whichever of its inputs are here.
            QuantFormat::Int8 => std::iter::once(0..1).collect(),
            QuantFormat::Int4 { .. } => {
                columns.iter().map(|range| range.start / size..range.end.div_ceil(size)).collect()
            }
        };
        // What comes after an incomplete group would be counted among its inputs.
        let (last, before) = columns.split_last()?;
        let fits = |of: &Range<usize>| of.start.is_multiple_of(size);
        let is_even = fits(last) && before.iter().all(|range| fits(range) && range.end.is_multiple_of(size));
        let part = Self { whole: [out, inner], rows, columns, groups };
        (format == QuantFormat::Int8 || is_even).then_some(part)
    }

    /// `[out, in]` here.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [&self.rows, &self.columns].map(|ranges| ranges.iter().map(Range::len).sum())
    }

    /// Those of the whole matrix's integers that are here.
    pub(crate) fn integers(&self, whole: Vec<i8>) -> Vec<i8> {
        self.cut(whole, self.whole[1], &self.columns)
    }

    /// Those of the whole matrix's scales that are here.
    pub(crate) fn scales(&self, whole: Vec<f32>) -> Vec<f32> {
        let width = whole.len() / self.whole[0].max(1);
        self.cut(whole, width, &self.groups)
    }

    fn cut<T: Copy>(&self, whole: Vec<T>, width: usize, columns: &[Range<usize>]) -> Vec<T> {
        if self.shape() == self.whole {
            return whole;
        }
        let rows = self.rows.iter().flat_map(|rows| whole[rows.start * width..rows.end * width].chunks(width.max(1)));
        rows.flat_map(|row| columns.iter().flat_map(|range| &row[range.clone()]).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::{ParamInit, SplitKind};
    use moe_kernels::quantized::IntegerMatrix;
    use moe_parallel::ParallelDims;

    const INT4: QuantFormat = QuantFormat::Int4 { group_size: 32 };

    fn spec(shape: &[usize], dim: usize, parts: usize) -> ParamSpec {
        ParamSpec::new("w", shape, ParamInit::Zeros).split(SplitKind::Tensor, dim, parts)
    }

    /// What the parts of a matrix's integers stand for are the parts of what the whole stands for.
    #[test]
    fn parts_stand_for_the_parts_of_the_floats() {
        let weights: Vec<f32> = (0..12 * 200).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
        // Three equal parts of rows, each split; columns, of one and of several parts; the last of which are no whole group.
        let cases = [
            ([12, 200], 0, 3, [1, 2, 4].as_slice()),
            ([12, 192], 1, 1, &[1, 2, 3]),
            ([12, 192], 1, 3, &[2]),
            ([12, 72], 1, 1, &[1, 2]),
            ([3, 160], 1, 1, &[2]),
            ([24, 100], 0, 1, &[2, 5]),
        ];
        for (shape, dim, parts, ranks) in cases {
            for format in [QuantFormat::Int8, INT4] {
                let matrix = IntegerMatrix::nearest(format, &weights[..shape[0] * shape[1]], shape).unwrap();
                let floats =
                    candle_core::Tensor::from_vec(matrix.dequantize(), &shape, &candle_core::Device::Cpu).unwrap();
                let spec = spec(&shape, dim, parts);
                for &ranks in ranks {
                    for rank in 0..ranks {
                        let placement = Placement::new(ParallelDims::new(1, ranks, 1, 1), rank).unwrap();
                        let want = placement.local(&spec, floats.clone()).unwrap();
                        let Some(part) = IntegerPart::of(placement, &spec, format) else {
                            // The second half of 72 or 160 columns begins inside a group of 32.
                            assert!(format == INT4 && rank == 1 && dim == 1 && shape[1] % 64 != 0);
                            continue;
                        };
                        assert_eq!(part.shape().as_slice(), want.dims());
                        let integers = part.integers(matrix.integers().to_vec());
                        let scales = part.scales(matrix.scales().to_vec());
                        let got = IntegerMatrix::new(format, part.shape(), integers, scales).unwrap();
                        let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
                        assert_eq!(got.dequantize(), want, "{shape:?} dim {dim}, {format}, {rank} of {ranks}");
                    }
                }
            }
        }
    }

    #[test]
    fn parts_that_begin_inside_a_group_have_no_such_form() {
        let spec = spec(&[3, 160], 1, 1);
        let of =
            |rank, format| IntegerPart::of(Placement::new(ParallelDims::new(1, 2, 1, 1), rank).unwrap(), &spec, format);
        assert_eq!(of(0, INT4).map(|part| part.shape()), Some([3, 80]));
        assert_eq!(of(1, INT4), None);
        assert_eq!(of(1, QuantFormat::Int8).map(|part| part.shape()), Some([3, 80]));
        let pieces = self::spec(&[3, 160], 1, 2);
        assert_eq!(IntegerPart::of(Placement::new(ParallelDims::new(1, 2, 1, 1), 0).unwrap(), &pieces, INT4), None);
        let vector = ParamSpec::new("b", &[3], ParamInit::Zeros);
        assert_eq!(IntegerPart::of(Placement::WHOLE, &vector, INT4), None);
    }
}
