//! Rotary position embedding: pairs of columns of each head turn by an angle that grows with the token's position.
//!
//! The backward pass is the inverse rotation. Knows positions, not caches: a row's result depends on its own position
//! only, so decoding token by token gives the bits of the whole pass.

#[cfg(test)]
mod tests;

pub use moe_core::ops::{Positions, RotaryLayout, RotaryTable};

use crate::custom::{self, Input, SliceOp, Target};
use crate::select::vectorize;
use crate::{Isa, Result, parallel, select};
use candle_core::Tensor;

/// Turns the first `rotary_dim` columns of each head by the angles of the row's position.
///
/// # Shapes
/// `x` `[.., seq_len, heads * head_dim]`, head after head, of any number of heads; returns the shape of `x`
///
/// # Errors
/// [`crate::Error::Argument`] if the width is no multiple of the table's `head_dim`, there is not one position per
/// row, or a position is not in the table.
///
/// # Source
/// RoFormer (Su et al. 2021), equations 14, 15 and 34; both orders of columns as in transformers.
pub fn rotary(x: &Tensor, table: &RotaryTable, layout: RotaryLayout, positions: Positions<'_>) -> Result<Tensor> {
    let positions = table.resolve(x.dims(), positions)?;
    custom::apply(Rotary { table: table.clone(), layout, positions, isa: select::current() }, &[x])
}

/// Elements per task.
const TASK: usize = 1 << 14;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;

struct Rotary {
    table: RotaryTable,
    layout: RotaryLayout,
    /// One per row.
    positions: Vec<u32>,
    isa: Isa,
}

impl Rotary {
    /// Every row turned; backwards if `sign` is -1.
    fn turn(&self, x: &[f32], sign: f32) -> Vec<f32> {
        let rows = self.positions.len();
        let width = x.len() / rows.max(1);
        let per_task = (TASK / width.max(1)).max(1);
        parallel::filled(x.len(), per_task * width, LEAST_WORK, |range, into| {
            let rows = range.start / width.max(1)..range.end / width.max(1);
            let (from, positions) = (&x[range], &self.positions[rows]);
            vectorize!(self.isa, (op: &Rotary = self, from: &[f32], positions: &[u32], sign: f32, into: &mut [f32]) {
                op.turn_rows(from, positions, sign, into);
            });
        })
    }

    #[inline(always)]
    fn turn_rows(&self, from: &[f32], positions: &[u32], sign: f32, into: &mut [f32]) {
        let (head_dim, rotary_dim) = (self.table.head_dim(), self.table.rotary_dim());
        let width = from.len() / positions.len();
        for (row, &position) in positions.iter().enumerate() {
            let (cos, sin) = self.table.at(position);
            let range = row * width..(row + 1) * width;
            let heads = from[range.clone()].chunks_exact(head_dim).zip(into[range].chunks_exact_mut(head_dim));
            for (head, into) in heads {
                let ((head, rest), (into, into_rest)) = (head.split_at(rotary_dim), into.split_at_mut(rotary_dim));
                into_rest.copy_from_slice(rest);
                match self.layout {
                    RotaryLayout::Halves => turn_halves(head, cos, sin, sign, into),
                    RotaryLayout::Interleaved => turn_pairs(head, cos, sin, sign, into),
                }
            }
        }
    }
}

#[inline(always)]
fn turn_halves(head: &[f32], cos: &[f32], sin: &[f32], sign: f32, into: &mut [f32]) {
    let half = cos.len();
    let ((a, b), (to_a, to_b)) = (head.split_at(half), into.split_at_mut(half));
    let (a, b, sin, to_a, to_b) = (&a[..half], &b[..half], &sin[..half], &mut to_a[..half], &mut to_b[..half]);
    for i in 0..half {
        let s = sin[i] * sign;
        to_a[i] = a[i] * cos[i] - b[i] * s;
        to_b[i] = b[i] * cos[i] + a[i] * s;
    }
}

#[inline(always)]
fn turn_pairs(head: &[f32], cos: &[f32], sin: &[f32], sign: f32, into: &mut [f32]) {
    for (((pair, to), &c), &s) in head.chunks_exact(2).zip(into.chunks_exact_mut(2)).zip(cos).zip(sin) {
        let s = s * sign;
        to[0] = pair[0] * c - pair[1] * s;
        to[1] = pair[1] * c + pair[0] * s;
    }
}

impl SliceOp for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        (self.turn(inputs[0].values, 1.0), inputs[0].dims.to_vec())
    }

    fn backward(&self, _: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        to[0].bring(|| self.turn(grad, -1.0));
        Ok(())
    }
}
