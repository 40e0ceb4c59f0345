//! [`Weight`]: what a layer multiplies with, as a tensor or in a backend's own form; [`WeightSource`]: where it comes from.

use crate::{Error, ParamSpec, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

/// A matrix `[out, in]`, or one per expert, `[experts, out, in]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// As it is, with its gradient if it is a variable.
    Tensor(Tensor),
    /// In the form a backend multiplies with; without a gradient.
    Packed(Arc<dyn PackedWeight>),
}

/// A backend's form of a weight. Its owner may rewrite it in place between two passes; whoever reads sees either form whole.
pub trait PackedWeight: Debug + Send + Sync {
    /// `[out, in]` or `[experts, out, in]`
    fn dims(&self) -> &[usize];
    /// Size in memory.
    fn bytes(&self) -> usize;
    /// How its values are kept, in words: `bf16`, `int8`.
    fn form(&self) -> String;
    /// For the backend that made it.
    fn as_any(&self) -> &dyn Any;
}

impl Weight {
    /// `[out, in]` or `[experts, out, in]`
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Tensor(tensor) => tensor.dims(),
            Self::Packed(packed) => packed.dims(),
        }
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Packed(packed) => packed.bytes(),
        }
    }

    /// How its values are kept, in words: `f32`, `bf16`, `int8`.
    pub fn form(&self) -> String {
        match self {
            Self::Tensor(tensor) => tensor.dtype().as_str().to_owned(),
            Self::Packed(packed) => packed.form(),
        }
    }

    /// The tensor.
    ///
    /// # Errors
    /// [`Error::Input`] if the weight is packed: another backend than the one that packed it was asked.
    pub fn tensor(&self) -> Result<&Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor),
            Self::Packed(packed) => Err(Error::Input(format!(
                "a weight of shape {:?} is packed for another backend; use the operations it was made with",
                packed.dims()
            ))),
        }
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

/// What a weight is for: a backend may keep each kind in a form of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightUse {
    /// Matrix products, in the backend's precision.
    Product,
    /// Router logits and mixing coefficients, never in less than f32.
    Gate,
    /// Rows that are looked up, and perhaps the output layer's products.
    Table,
    /// The output layer's products alone.
    Output,
}

/// A matrix `[out, in]` that its source holds as integers `q`, for weights of `q * scale`.
#[derive(Debug, Clone)]
pub struct StoredIntegers {
    /// `[out, in]`, u8: each `q` plus [`StoredIntegers::ZERO`], as candle has no signed bytes
    pub integers: Tensor,
    /// `[out, groups]`, f32: of equally many inputs each, but that the last may have fewer
    pub scales: Tensor,
}

impl StoredIntegers {
    /// What stands for 0.
    pub const ZERO: u8 = 128;
    /// What a source appends to the name of a matrix for its integers.
    pub const INTEGERS: &str = "_integers";
    /// The same for its scales.
    pub const SCALES: &str = "_scales";
}

/// A stretch of a matrix's rows, as a source is asked for it by name: so that whoever packs a matrix never holds it whole.
#[derive(Debug, Clone, Copy)]
pub struct StoredRows;

impl StoredRows {
    const MARK: &str = "_rows_";

    /// The name of rows `rows` of `matrix`.
    pub fn name(matrix: &str, rows: &Range<usize>) -> String {
        format!("{matrix}{}{}_{}", Self::MARK, rows.start, rows.end)
    }

    /// Which rows of which matrix a name asks for, if it does for any.
    pub fn parse(name: &str) -> Option<(&str, Range<usize>)> {
        let (matrix, rows) = name.rsplit_once(Self::MARK)?;
        let (start, end) = rows.split_once('_')?;
        Some((matrix, start.parse().ok()?..end.parse().ok()?))
    }
}

/// A parameter that is still where it came from: fetched whole, or matrix by matrix so that no stack is ever held.
#[derive(Clone)]
pub struct WeightSource<'a> {
    vb: &'a VarBuilder<'a>,
    spec: &'a ParamSpec,
}

impl<'a> WeightSource<'a> {
    /// The parameter `spec` below the prefix of `vb`.
    pub fn new(vb: &'a VarBuilder<'a>, spec: &'a ParamSpec) -> Self {
        Self { vb, spec }
    }

    /// `[out, in]` or `[experts, out, in]`
    pub fn dims(&self) -> &[usize] {
        &self.spec.shape
    }

    /// The same place, for a parameter of another description: a part of this one.
    pub fn of<'b>(&'b self, spec: &'b ParamSpec) -> WeightSource<'b> {
        WeightSource { vb: self.vb, spec }
    }

    /// What the parameter is.
    pub fn spec(&self) -> &ParamSpec {
        self.spec
    }

    /// The whole name of the parameter.
    pub fn name(&self) -> String {
        self.prefixed(self.spec.name.clone())
    }

    /// The whole name of matrix `index`: the parameter's, or an expert's own of a stack.
    pub fn matrix_name(&self, index: usize) -> String {
        self.prefixed(self.spec.expert_name(index).unwrap_or_else(|| self.spec.name.clone()))
    }

    fn prefixed(&self, own: String) -> String {
        match self.vb.prefix() {
            root if root.is_empty() => own,
            prefix => format!("{prefix}.{own}"),
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// If there is no such tensor or it has another shape.
    pub fn whole(&self) -> Result<Tensor> {
        self.spec.get(self.vb)
    }

    /// Matrices: the experts, or 1.
    pub fn num_matrices(&self) -> usize {
        if self.spec.is_stacked() { self.spec.shape[0] } else { 1 }
    }

    /// Matrix `index` alone, `[out, in]`.
    ///
    /// # Errors
    /// If there is no such tensor or it has another shape.
    pub fn matrix(&self, index: usize) -> Result<Tensor> {
        if self.spec.is_stacked() { self.spec.get_expert(self.vb, index) } else { self.whole() }
    }

    /// Rows `rows` of matrix `index` alone, `[rows, in]`, in the type that the source has them in; `None` if it gives whole
    /// matrices only.
    ///
    /// # Errors
    /// If the source cannot give them, or they have another shape.
    pub fn rows(&self, index: usize, rows: Range<usize>) -> Result<Option<Tensor>> {
        let matrix = self.spec.expert_name(index).unwrap_or_else(|| self.spec.name.clone());
        let name = StoredRows::name(&matrix, &rows);
        if !self.vb.contains_tensor(&name) {
            return Ok(None);
        }
        let tensor = self.vb.get_unchecked(&name)?;
        let want = [rows.len(), self.dims().last().copied().unwrap_or(0)];
        match tensor.dims() {
            got if got == want => Ok(Some(tensor)),
            got => Err(Error::Input(format!("rows {rows:?} of {matrix} are {got:?}, but a layer asks for {want:?}"))),
        }
    }

    /// Matrix `index` alone as the integers that the source holds of it; `None` if it holds floats.
    ///
    /// # Errors
    /// If the source cannot give them, or they have another shape.
    pub fn integers(&self, index: usize) -> Result<Option<StoredIntegers>> {
        let name = self.spec.expert_name(index).unwrap_or_else(|| self.spec.name.clone());
        let [integers, scales] = [StoredIntegers::INTEGERS, StoredIntegers::SCALES].map(|part| format!("{name}{part}"));
        if !self.vb.contains_tensor(&integers) {
            return Ok(None);
        }
        let integers = self.vb.get_unchecked_dtype(&integers, DType::U8)?;
        let (want, got) = (&self.dims()[self.dims().len().saturating_sub(2)..], integers.dims());
        if got != want {
            return Err(Error::Input(format!("{name} has {got:?} integers, but a layer asks for {want:?}")));
        }
        Ok(Some(StoredIntegers { integers, scales: self.vb.get_unchecked_dtype(&scales, DType::F32)? }))
    }
}
