//! [`Layout`]: the order in which files keep the elements of one expert's matrix or bias, where it is another than here.
//!
//! ```text
//! here                 [out, in]          g0 g1 .. u0 u1 ..     outputs of the gate, then those of the other half
//! Columns              [in, out]          g0 g1 .. u0 u1 ..
//! AlternatingRows      [out, in]          g0 u0 g1 u1 ..
//! AlternatingColumns   [in, out]          g0 u0 g1 u1 ..
//! ```

use crate::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How a matrix `[out, in]`, or a bias `[out]`, lies in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// As here.
    Rows,
    /// Transposed.
    Columns,
    /// Rows of the first half and of the second take turns.
    AlternatingRows,
    /// Transposed, and columns take turns.
    AlternatingColumns,
}

impl Layout {
    fn is_transposed(self) -> bool {
        matches!(self, Self::Columns | Self::AlternatingColumns)
    }

    fn alternates(self) -> bool {
        matches!(self, Self::AlternatingRows | Self::AlternatingColumns)
    }

    /// Whether what has this shape here can lie so.
    pub fn fits(self, shape: &[usize]) -> bool {
        !self.alternates() || shape.first().is_some_and(|out| out.is_multiple_of(2))
    }

    /// The shape in files of what has this shape here.
    pub fn in_files(self, shape: &[usize]) -> Vec<usize> {
        match shape {
            &[out, inner] if self.is_transposed() => vec![inner, out],
            _ => shape.to_vec(),
        }
    }

    /// Where element `index` of a matrix of this shape here lies in files, both counted row after row.
    pub fn index_in_files(self, index: usize, shape: &[usize]) -> usize {
        let (out, inner) = (shape.first().copied().unwrap_or(1), shape.iter().skip(1).product::<usize>());
        let (mut row, column) = (index / inner.max(1), index % inner.max(1));
        if self.alternates() {
            row = if row < out / 2 { 2 * row } else { 2 * (row - out / 2) + 1 };
        }
        if self.is_transposed() { column * out + row } else { row * inner + column }
    }

    /// Values of this shape here in the order of files.
    pub fn to_files(self, values: Vec<f32>, shape: &[usize]) -> Vec<f32> {
        if self == Self::Rows {
            return values;
        }
        let mut stored = vec![0.0; values.len()];
        values.into_iter().enumerate().for_each(|(index, v)| stored[self.index_in_files(index, shape)] = v);
        stored
    }

    /// What files hold, as it is here.
    ///
    /// # Errors
    /// If it is no matrix or bias of an even number of outputs where halves take turns.
    pub fn from_files(self, stored: &Tensor) -> Result<Tensor> {
        let mut own = if self.is_transposed() && stored.rank() == 2 { stored.t()? } else { stored.clone() };
        if self.alternates() {
            let dims = own.dims().to_vec();
            own = own.contiguous()?.reshape([&[dims[0] / 2, 2], &dims[1..]].concat())?.transpose(0, 1)?;
            own = own.contiguous()?.reshape(dims)?;
        }
        Ok(own.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Four outputs of three inputs, the tens their output, the ones their input.
    #[test]
    fn elements_are_found_in_every_order() {
        let here: Vec<f32> = (0..4).flat_map(|o| (0..3).map(move |i| (10 * o + i) as f32)).collect();
        for (layout, shape, want) in [
            (Layout::Rows, vec![4, 3], here.clone()),
            (Layout::Columns, vec![3, 4], vec![0., 10., 20., 30., 1., 11., 21., 31., 2., 12., 22., 32.]),
            (Layout::AlternatingRows, vec![4, 3], vec![0., 1., 2., 20., 21., 22., 10., 11., 12., 30., 31., 32.]),
            (Layout::AlternatingColumns, vec![3, 4], vec![0., 20., 10., 30., 1., 21., 11., 31., 2., 22., 12., 32.]),
        ] {
            assert_eq!(layout.in_files(&[4, 3]), shape);
            let stored = layout.to_files(here.clone(), &[4, 3]);
            assert_eq!(stored, want, "{layout:?}");
            let back = layout.from_files(&Tensor::from_vec(stored, shape, &Device::Cpu).unwrap()).unwrap();
            assert_eq!(back.to_vec2::<f32>().unwrap().concat(), here, "{layout:?}");
        }
        let bias = Layout::AlternatingColumns.to_files(vec![0., 1., 2., 3.], &[4]);
        assert_eq!((bias.as_slice(), Layout::Columns.in_files(&[4])), (&[0., 2., 1., 3.][..], vec![4]));
        let bias = Tensor::from_vec(bias, 4, &Device::Cpu).unwrap();
        assert_eq!(Layout::AlternatingRows.from_files(&bias).unwrap().to_vec1::<f32>().unwrap(), [0., 1., 2., 3.]);
        let odd = Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(Layout::AlternatingRows.from_files(&odd).is_err());
        assert!(
            !Layout::AlternatingRows.fits(&[3, 2])
                && Layout::AlternatingRows.fits(&[4])
                && Layout::Columns.fits(&[3, 2])
        );
    }
}
