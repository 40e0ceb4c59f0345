//! Dropout of a tensor's elements. The mask is a function of each element's place ([`moe_core::ops::Dropout`]): the backward pass
//! computes it again, and neither keeps it nor the input.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, Target};
use crate::select::vectorize;
use crate::{Isa, Result, parallel, select};
use candle_core::Tensor;
use moe_core::ops::{Dropout, DropoutRow};

/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;
/// Elements per task.
const TASK: usize = 1 << 13;

/// Each element of `x` times its factor of `dropout`.
///
/// # Shapes
/// `[.., width]` to the same; rows count from 0 before the last dimension
///
/// # Errors
/// [`crate::Error::Argument`] for a tensor of another type than f32 or another device than the CPU.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    custom::apply(Dropped { dropout, isa: select::current() }, &[x])
}

struct Dropped {
    dropout: Dropout,
    isa: Isa,
}

impl Dropped {
    fn apply(&self, x: &[f32], width: usize) -> Vec<f32> {
        let width = width.max(1);
        parallel::filled(x.len(), (TASK / width).max(1) * width, LEAST_WORK, |range, out| {
            let first = range.start / width;
            let rows = x[range].chunks_exact(width).zip(out.chunks_exact_mut(width));
            for (index, (x, out)) in rows.enumerate() {
                let row = self.dropout.row(first + index);
                vectorize!(self.isa, (row: DropoutRow, x: &[f32], out: &mut [f32]) {
                    for (column, (out, x)) in out.iter_mut().zip(x).enumerate() {
                        *out = x * row.factor(column as u32);
                    }
                });
            }
        })
    }
}

impl SliceOp for Dropped {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        (self.apply(inputs[0].values, inputs[0].width()), inputs[0].dims.to_vec())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        to[0].bring(|| self.apply(grad, inputs[0].width()));
        Ok(())
    }
}
