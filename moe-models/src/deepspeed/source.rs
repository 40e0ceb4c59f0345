//! [`Source`]: where one parameter is, in one file or several, and how it comes out of them.

use super::arguments::QkvOrder;
use super::torch_file::{StoredTensor, TorchFile};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// A parameter, or one expert of it.
#[derive(Debug)]
pub(super) struct Source {
    /// What it is called there.
    pub(super) name: String,
    /// In slices, or whole and then maybe several times.
    pub(super) parts: Vec<Part>,
    pub(super) form: Form,
}

/// A tensor in a file.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: Arc<TorchFile>,
    pub(super) tensor: StoredTensor,
}

/// What of the parameter is in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// All of it in each.
    Whole,
    /// A slice along this dimension, or all of it.
    Along(usize),
    /// Heads, each with its queries, keys and values.
    Heads { order: QkvOrder, head_dim: usize },
    /// Its two rows, the second first.
    Swapped,
    /// Nothing: their model has zeros in its place.
    Zeros,
}

/// Most that copies of one tensor may differ by, of its largest magnitude. Ranks compute the same sums, maybe in another order.
const MOST_APART: f32 = 0.01;

impl Source {
    /// Whether each file has all of it.
    fn is_whole(&self, shape: &[usize]) -> bool {
        self.parts.iter().all(|part| part.tensor.shape == shape)
    }

    /// Refuses parts that do not make a parameter of this shape.
    ///
    /// # Errors
    /// [`crate::Error::Format`] naming file and tensor.
    pub(super) fn check(&self, shape: &[usize]) -> Result<()> {
        let (dim, rows) = match self.form {
            Form::Whole | Form::Swapped | Form::Zeros => (None, 1),
            Form::Along(dim) => (Some(dim), 1),
            Form::Heads { head_dim, .. } => (Some(0), 3 * head_dim),
        };
        if self.is_whole(shape) && rows == 1 {
            return Ok(());
        }
        let count = self.parts.len();
        for part in &self.parts {
            let got = part.tensor.shape.as_slice();
            let is_slice = |dim: usize| {
                let whole = got.iter().enumerate().map(|(d, size)| if d == dim { size * count } else { *size });
                whole.eq(shape.iter().copied()) && got[dim].is_multiple_of(rows)
            };
            if !dim.is_some_and(is_slice) {
                let slices = match dim {
                    Some(_) if count > 1 => format!(", or be one of its {count} slices"),
                    _ => String::new(),
                };
                return Err(part
                    .file
                    .error(format!("{} must have the shape {shape:?}{slices}, got {got:?}", self.name)));
            }
        }
        Ok(())
    }

    /// The values, in our order: f32.
    ///
    /// # Errors
    /// [`crate::Error::Format`] if copies of it differ.
    pub(super) fn values(&self, shape: &[usize]) -> Result<Tensor> {
        let parts = self.parts.iter().map(|part| part.file.floats(&part.tensor)).collect::<Result<Vec<_>>>()?;
        match self.form {
            Form::Zeros => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
            Form::Heads { order, head_dim } => {
                let slices = parts.iter().map(|slice| by_part(slice, order, head_dim));
                Ok(Tensor::cat(&slices.collect::<candle_core::Result<Vec<_>>>()?, 1)?.reshape(shape)?)
            }
            Form::Along(dim) if !self.is_whole(shape) => Ok(Tensor::cat(&parts, dim)?),
            Form::Along(_) | Form::Whole => self.common(&parts),
            Form::Swapped => {
                let rows = self.common(&parts)?;
                Ok(Tensor::cat(&[rows.narrow(0, 1, 1)?, rows.narrow(0, 0, 1)?], 0)?)
            }
        }
    }

    /// What all ranks have alike: the mean of their copies, as DeepSpeed puts them together in its universal checkpoints.
    fn common(&self, copies: &[Tensor]) -> Result<Tensor> {
        let first = &copies[0];
        let largest = largest(first)?;
        let (mut sum, mut differ) = (first.clone(), false);
        for (copy, part) in copies.iter().zip(&self.parts).skip(1) {
            let apart = self::largest(&(copy - first)?)?;
            if apart.is_nan() || apart > MOST_APART * largest {
                let other = self.parts[0].file.path().file_name().unwrap_or_default().to_string_lossy();
                let reason =
                    format!("{} differs by {apart} from that in {other}; copy the files of one run", self.name);
                return Err(part.file.error(reason));
            }
            differ |= apart > 0.0;
            sum = (sum + copy)?;
        }
        if differ { Ok((sum / copies.len() as f64)?) } else { Ok(first.clone()) }
    }
}

/// The largest magnitude; not a number if a value is none.
fn largest(tensor: &Tensor) -> Result<f32> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().fold(0.0, |most, value| if value.abs() <= most { most } else { value.abs() }))
}

/// One slice as `[3, heads, head_dim, columns]`.
fn by_part(slice: &Tensor, order: QkvOrder, head_dim: usize) -> candle_core::Result<Tensor> {
    let columns = slice.elem_count() / slice.dim(0)?;
    let heads = slice.dim(0)? / (3 * head_dim);
    let by_part = match order {
        QkvOrder::PartHeadColumn => slice.reshape((3, heads, head_dim, columns))?,
        QkvOrder::HeadColumnPart => slice.reshape((heads, head_dim, 3, columns))?.permute((2, 0, 1, 3))?,
        QkvOrder::HeadPartColumn => slice.reshape((heads, 3, head_dim, columns))?.transpose(0, 1)?,
    };
    by_part.contiguous()
}
