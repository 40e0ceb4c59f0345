//! Integers of one matrix, column after column, each error made up for by the columns that are left. Pure.
//!
//! With second moments `H = R R^T` of the inputs and `R` upper triangular, what rounding a row `w` to `q` changes in its outputs is a
//! sum over columns, `||(w - q) R||^2 = sum_j (sum_{i <= j} (w_i - q_i) R_ij)^2`, whose first `j` terms depend on the first `j` integers
//! alone. Column by column the integer is taken that makes its term least.
//!
//! # Source
//! GPTQ (2210.17323), algorithm 1. Differs: it subtracts each error from the columns that are left, through the Cholesky factor of the
//! inverse of `H`, which is the inverse of `R`; here each column gathers the errors of those before it from `R` itself. The
//! integers are the same, and nothing is inverted.

use super::SecondMoments;
use crate::{Error, Result};
use moe_core::ops::host::{dispatch, sum_by};
use moe_kernels::quantized::{Grid, IntegerMatrix, QuantFormat};
use rayon::prelude::*;
use std::ops::Range;

/// What is added to the diagonal, as a share of its mean.
///
/// # Source
/// GPTQ, section 3.3 (numerical stability).
pub(super) const DAMPING: f64 = 0.01;

/// `R` of `H = R R^T`, for damped moments `H`.
#[derive(Debug, Clone, PartialEq)]
pub struct Factor {
    width: usize,
    /// `[width, width]`: row `j` holds column `j` of `R` up to its diagonal, and nothing behind.
    columns: Vec<f64>,
}

/// The sum of the products of two rows, as far as the shorter one goes.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    sum_by(len, |i| a[i] * b[i])
}

/// Multiply-adds that are worth a task of their own.
const TASK_WORK: usize = 1 << 15;

impl Factor {
    /// The factor of `moments`. Inputs that are all zero count as if they had nothing to do with each other, all alike.
    ///
    /// # Errors
    /// [`Error::Argument`] for moments that are not finite.
    pub fn new(moments: &SecondMoments) -> Result<Self> {
        let width = moments.width();
        if let Some(at) = moments.sums().iter().position(|sum| !sum.is_finite()) {
            return Err(Error::Argument(format!(
                "inputs {} and {} have the moment {}; the model's activations on this text are not finite, or too large",
                at / width,
                at % width,
                moments.sums()[at]
            )));
        }
        let mut rows: Vec<f64> = moments.sums().iter().copied().map(f64::from).collect();
        let mean = (0..width).map(|i| rows[i * width + i]).sum::<f64>() / width as f64;
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        (0..width).for_each(|i| rows[i * width + i] += damping);

        // From the last column to the first: row i of R is then final behind column j.
        for j in (0..width).rev() {
            let (above, own) = rows.split_at_mut(j * width);
            let (own, tail) = own[..width].split_at_mut(j + 1);
            // No pivot of damped moments is below the damping, but sums of f32 are rounded.
            let pivot = (own[j] - dispatch(|| dot(tail, tail))).max(damping).sqrt();
            own[j] = pivot;
            let least = TASK_WORK.div_ceil(tail.len() + 1);
            above.par_chunks_exact_mut(width).with_min_len(least).for_each(|row| {
                row[j] = (row[j] - dispatch(|| dot(&row[j + 1..], tail))) / pivot;
            });
        }
        for i in 0..width {
            for j in i + 1..width {
                rows[j * width + i] = std::mem::take(&mut rows[i * width + j]);
            }
        }
        Ok(Self { width, columns: rows })
    }

    /// Inputs of the matrix.
    pub fn width(&self) -> usize {
        self.width
    }

    /// `R_ij`; 0 below the diagonal.
    #[cfg(test)]
    pub(super) fn at(&self, i: usize, j: usize) -> f64 {
        self.column(j).get(i).copied().unwrap_or(0.0)
    }

    /// `R_ij` for `i` up to `j`.
    fn column(&self, j: usize) -> &[f64] {
        &self.columns[j * self.width..][..=j]
    }
}

/// Rows that share the columns of `R` while these are near.
const TASK_ROWS: usize = 8;
/// Columns whose share of earlier errors is gathered at once, where the format has no groups.
const COLUMNS: usize = 32;

/// The integers of `weights` `[out, in]`, row-major, that change least of what they make of the inputs `factor` stands for. Scales are
/// by the rule of [`Grid::of`]: for 8 bits of a row as it is, for 4 of a group as it has become when its turn comes.
///
/// # Errors
/// [`Error::Argument`] if `factor` has another width; as [`QuantFormat::check`].
pub fn quantize(
    format: QuantFormat,
    weights: &[f32],
    [out, inner]: [usize; 2],
    factor: &Factor,
) -> Result<IntegerMatrix> {
    format.check(weights, [out, inner]).map_err(moe_models::Error::from)?;
    if factor.width() != inner {
        let width = factor.width();
        return Err(Error::Argument(format!("a matrix of {inner} inputs has moments of {width}; take its own")));
    }
    let groups = format.groups(inner);
    let (mut integers, mut scales) = (vec![0i8; out * inner], vec![0f32; out * groups]);
    let row_tasks =
        integers.par_chunks_mut((TASK_ROWS * inner).max(1)).zip(scales.par_chunks_mut((TASK_ROWS * groups).max(1)));
    row_tasks.enumerate().for_each(|(task, (integers, scales))| {
        let weights = &weights[task * TASK_ROWS * inner..][..integers.len()];
        Rows { format, factor, weights, integers, scales }.round();
    });
    Ok(IntegerMatrix::new(format, [out, inner], integers, scales).map_err(moe_models::Error::from)?)
}

/// Some rows of a matrix.
struct Rows<'a> {
    format: QuantFormat,
    factor: &'a Factor,
    weights: &'a [f32],
    integers: &'a mut [i8],
    scales: &'a mut [f32],
}

impl Rows<'_> {
    fn round(self) {
        let Self { format, factor, weights, integers, scales } = self;
        let (inner, groups) = (factor.width(), format.groups(factor.width()));
        let of_rows = |row: &[f32]| match format {
            QuantFormat::Int8 => Some(Grid::of(format, row)),
            QuantFormat::Int4 { .. } => None,
        };
        let grids: Vec<Option<Grid>> = weights.chunks_exact(inner).map(of_rows).collect();
        let step = if format == QuantFormat::Int8 { COLUMNS } else { format.group_size(inner) };
        // What rounding has changed so far, w - q.
        let mut errors = vec![0f64; weights.len()];
        let mut pulls = vec![0f64; step];
        for (index, first) in (0..inner).step_by(step).enumerate() {
            let columns = first..(first + step).min(inner);
            for (row, grid) in grids.iter().enumerate() {
                let at = row * inner..(row + 1) * inner;
                let (weights, errors) = (&weights[at.clone()], &mut errors[at.clone()]);
                let pulls = &mut pulls[..columns.len()];
                gather(factor, errors, columns.clone(), pulls);
                let grid = grid.unwrap_or_else(|| Grid::of(format, &moved(factor, weights, columns.clone(), pulls)));
                scales[row * groups + index.min(groups - 1)] = grid.scale();
                round_columns(factor, weights, grid, columns.clone(), pulls, errors, &mut integers[at]);
            }
        }
    }
}

/// Of each of `columns` what the errors before the first of them sum up to.
fn gather(factor: &Factor, errors: &[f64], columns: Range<usize>, pulls: &mut [f64]) {
    let before = &errors[..columns.start];
    dispatch(
        #[inline(always)]
        || {
            for (pull, j) in pulls.iter_mut().zip(columns) {
                *pull = dot(before, factor.column(j));
            }
        },
    );
}

/// Where the weights of `columns` go if errors before them are made up for and none of their own is made.
fn moved(factor: &Factor, weights: &[f32], columns: Range<usize>, pulls: &[f64]) -> Vec<f32> {
    let mut moves = Vec::with_capacity(columns.len());
    for (j, pull) in columns.clone().zip(pulls) {
        let column = factor.column(j);
        moves.push((pull - dot(&moves, &column[columns.start..])) / column[j]);
    }
    weights[columns].iter().zip(moves).map(|(&w, by)| (f64::from(w) + by) as f32).collect()
}

/// Rounds `columns`, one after the other.
fn round_columns(
    factor: &Factor,
    weights: &[f32],
    grid: Grid,
    columns: Range<usize>,
    pulls: &[f64],
    errors: &mut [f64],
    integers: &mut [i8],
) {
    for (j, pull) in columns.clone().zip(pulls) {
        let (column, weight) = (factor.column(j), f64::from(weights[j]));
        let pull = pull + dot(&errors[columns.start..j], &column[columns.start..]);
        integers[j] = grid.nearest((weight + pull / column[j]) as f32);
        errors[j] = weight - f64::from(integers[j]) * f64::from(grid.scale());
    }
}
