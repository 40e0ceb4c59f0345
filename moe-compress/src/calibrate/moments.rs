//! [`SecondMoments`]: what a matrix's inputs on a text have in common.

use crate::{Error, Result};
use moe_kernels::gemm::{Group, Operand, Start, Weights, gemm};
use moe_kernels::{Precision, select};

/// The sum of `x x^T` over inputs `x`.
#[derive(Debug, Clone, PartialEq)]
pub struct SecondMoments {
    width: usize,
    tokens: usize,
    /// `[width, width]`
    sums: Vec<f32>,
}

impl SecondMoments {
    /// Of no inputs of this width yet.
    pub fn new(width: usize) -> Self {
        Self { width, tokens: 0, sums: vec![0.0; width * width] }
    }

    /// Adds rows `[tokens, width]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if they are not whole rows.
    pub fn add(&mut self, rows: &[f32]) -> Result<()> {
        let width = self.width;
        if width == 0 || !rows.len().is_multiple_of(width) {
            let count = rows.len();
            return Err(Error::Argument(format!("{count} inputs are not a whole number of rows of width {width}")));
        }
        let tokens = rows.len() / width;
        let columns = Operand::columns(rows, width, tokens, width);
        let group =
            Group { a: columns, b: Weights::Plain(columns), start: Start::Added, out_offset: 0, out_stride: width };
        gemm(select::current(), Precision::F32, &[group], &mut self.sums);
        self.tokens += tokens;
        Ok(())
    }

    /// Inputs of the matrix.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows that were added.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// `[width, width]`, symmetric
    pub fn sums(&self) -> &[f32] {
        &self.sums
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(self.sums.as_slice())
    }
}
