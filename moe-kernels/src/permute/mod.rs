//! Rows from token order to expert order and back, the way back fused with the weighted sum.
//!
//! A token's result is summed over its choices in their order, so it does not depend on the other tokens.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, Target};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::Tensor;
use moe_core::ops::host;
use moe_core::{DROPPED, DispatchTable};
use std::sync::Arc;

/// Copies each routed token to its row.
///
/// # Shapes
/// `tokens` `[tokens, d_model]`, f32 on the CPU; returns `[rows, d_model]` in the order of `table`
///
/// # Errors
/// [`Error::Argument`] if `tokens` does not have `table.num_tokens` rows.
pub fn permute(tokens: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
    let (num_tokens, _) = tokens.dims2()?;
    if num_tokens != table.num_tokens {
        return Err(Error::Argument(format!("tokens must number {}, got {num_tokens}", table.num_tokens)));
    }
    custom::apply(Permute(Arc::clone(table)), &[tokens])
}

/// Sums each token's rows, scaled by its weights; a token without rows gets zeros.
///
/// # Shapes
/// `rows` `[rows, d_model]`, `combine_weights` `[tokens, top_k]`, f32 on the CPU; returns `[tokens, d_model]`
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit `table`.
pub fn unpermute(rows: &Tensor, combine_weights: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
    let (num_rows, _) = rows.dims2()?;
    if num_rows != table.num_rows() {
        return Err(Error::Argument(format!("rows must number {}, got {num_rows}", table.num_rows())));
    }
    host::expect_shape("combine_weights", combine_weights, &[table.num_tokens, table.top_k])?;
    custom::apply(Unpermute(Arc::clone(table)), &[rows, combine_weights])
}

/// Rows moved by one task.
const TASK_ROWS: usize = 64;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 16;

/// Fills `out` `[rows, width]` row by row, in parallel; `fill` gets the number of a row and its elements.
fn fill_rows(out: &mut [f32], width: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
    let count = out.len() / width.max(1);
    let len = out.len();
    let shared = SharedMut::new(out);
    parallel::for_each_if(len, LEAST_WORK, count.div_ceil(TASK_ROWS), |task| {
        for row in task * TASK_ROWS..((task + 1) * TASK_ROWS).min(count) {
            // SAFETY: each row belongs to one task.
            fill(row, unsafe { shared.slice(row * width, width) });
        }
    });
}

/// A new `[count, width]` buffer, filled as by [`fill_rows`]; `fill` gets zeroed elements.
fn rows_of(count: usize, width: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    parallel::filled(count * width, TASK_ROWS * width, LEAST_WORK, |range, rows| {
        for (row, into) in rows.chunks_exact_mut(width).enumerate() {
            fill(range.start / width + row, into);
        }
    })
}

/// The token of each row, copied into `out` `[rows, width]`.
pub(crate) fn gather_into(tokens: &[f32], width: usize, table: &DispatchTable, out: &mut [f32]) {
    fill_rows(out, width, |row, into| {
        into.copy_from_slice(&tokens[table.row_tokens[row] as usize * width..][..width]);
    });
}

/// For each token the sum over its choices of `weight * row`; weights of 1 if there are none.
pub(crate) fn sum_choices(
    isa: Isa,
    rows: &[f32],
    weights: Option<&[f32]>,
    table: &DispatchTable,
    width: usize,
) -> Vec<f32> {
    rows_of(table.num_tokens, width, |token, into| {
        for choice in token * table.top_k..(token + 1) * table.top_k {
            let row = table.choice_rows[choice];
            if row == DROPPED {
                continue;
            }
            let weight = weights.map_or(1.0, |w| w[choice]);
            let from = &rows[row as usize * width..][..width];
            vectorize!(isa, (weight: f32, from: &[f32], into: &mut [f32]) {
                into.iter_mut().zip(from).for_each(|(sum, value)| *sum += weight * value);
            });
        }
    })
}

struct Permute(Arc<DispatchTable>);

impl SliceOp for Permute {
    fn name(&self) -> &'static str {
        "moe_permute"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (tokens, width) = (inputs[0].values, inputs[0].width());
        let rows = rows_of(self.0.num_rows(), width, |row, into| {
            into.copy_from_slice(&tokens[self.0.row_tokens[row] as usize * width..][..width]);
        });
        (rows, vec![self.0.num_rows(), width])
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        to[0].bring(|| sum_choices(select::current(), grad, None, &self.0, inputs[0].width()));
        Ok(())
    }
}

struct Unpermute(Arc<DispatchTable>);

impl Unpermute {
    /// Gradient of the rows.
    fn row_gradient(&self, isa: Isa, weights: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        let table = &self.0;
        rows_of(table.num_rows(), width, |row, into| {
            let choice = table.row_choices[row] as usize;
            let from = &grad[choice / table.top_k * width..][..width];
            vectorize!(isa, (weight: f32 = weights[choice], from: &[f32], into: &mut [f32]) {
                into.iter_mut().zip(from).for_each(|(d, g)| *d = weight * g);
            });
        })
    }

    /// Gradient of the weights: for each choice the product of its row with the token's gradient.
    fn weight_gradient(&self, isa: Isa, rows: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        let table = &self.0;
        rows_of(table.choice_rows.len(), 1, |choice, into| {
            let row = table.choice_rows[choice];
            if row != DROPPED {
                let from = &grad[choice / table.top_k * width..][..width];
                let values = &rows[row as usize * width..][..width];
                into[0] = vectorize!(isa, (from: &[f32], values: &[f32]) -> f32 {
                    host::sum_by(from.len(), |i| from[i] * values[i])
                });
            }
        })
    }
}

impl SliceOp for Unpermute {
    fn name(&self) -> &'static str {
        "moe_unpermute"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (rows, weights, width) = (inputs[0].values, inputs[1].values, inputs[0].width());
        (sum_choices(select::current(), rows, Some(weights), &self.0, width), vec![self.0.num_tokens, width])
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let (isa, width) = (select::current(), inputs[0].width());
        to[0].bring(|| self.row_gradient(isa, inputs[1].values, grad, width));
        to[1].bring(|| self.weight_gradient(isa, inputs[0].values, grad, width));
        Ok(())
    }
}
