//! [`TensorFiles`]: files that tensors are taken from one by one, by the names that a family publishes.

use super::names::FilePart;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_kernels::quantized::QuantFormat;
use safetensors::Dtype;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;

/// Files of one model's tensors, opened.
pub(crate) trait TensorFiles: Debug + Send + Sync {
    /// What errors name that are not one file's.
    fn path(&self) -> &Path;

    /// Whether a stack of experts lies there whole, under this name.
    fn has_whole(&self, name: &str) -> bool;

    /// Refuses a tensor that is missing, has another shape, or is of a type that weights do not have; where it may be integers of
    /// `quantized`, also integers that do not fit each other. Returns the names in the files of what it is made of.
    ///
    /// # Errors
    /// [`Error::Format`] naming file and tensor.
    fn check(&self, part: &FilePart, quantized: Option<QuantFormat>) -> Result<Vec<String>>;

    /// The refusal of a tensor that is not among `used`, if there is one.
    fn unused(&self, used: &BTreeSet<String>) -> Option<Error>;

    /// A tensor of floats, or one expert of a stack, copied, in the order of elements that it has here.
    ///
    /// # Errors
    /// [`Error::Format`] if it is missing.
    fn tensor(&self, part: &FilePart, device: &Device) -> Result<Tensor>;

    /// The type in which a tensor's floats are given.
    ///
    /// # Errors
    /// [`Error::Format`] if it is missing.
    fn dtype(&self, part: &FilePart) -> Result<Dtype>;

    /// Whether rows of a matrix `[out, in]` of floats can be had by themselves.
    fn has_rows(&self, part: &FilePart) -> bool;

    /// Rows `rows` of such a matrix, `[rows, in]`, copied; the pages that they lie in are let go of.
    ///
    /// # Errors
    /// [`Error::Format`] if it is missing or has another shape.
    fn rows(&self, part: &FilePart, rows: Range<usize>) -> Result<Tensor>;

    /// Whether a matrix `[out, in]`, or some of what it is made of, is there as integers of `format`.
    fn holds_integers(&self, part: &FilePart, format: QuantFormat) -> bool;

    /// The integers of such a matrix, `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing or has another shape.
    fn integers(&self, part: &FilePart, format: QuantFormat) -> Result<Vec<i8>>;

    /// Its scales, `[out, groups]`.
    ///
    /// # Errors
    /// As [`Self::integers`]; for a scale that products cannot have.
    fn scales(&self, part: &FilePart, format: QuantFormat) -> Result<Vec<f32>>;
}
