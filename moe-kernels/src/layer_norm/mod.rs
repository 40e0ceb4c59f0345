//! LayerNorm over the last dimension, forward and backward in one pass over memory each.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp};
use crate::parallel::SharedMut;
use crate::{Isa, Result, parallel, select};
use candle_core::{D, Tensor};
use moe_core::ops::host;

/// `(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last dimension.
///
/// # Shapes
/// `x` `[.., d_model]`, `weight` and `bias` `[d_model]`, f32 on the CPU; returns the shape of `x`
///
/// # Errors
/// If a shape does not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    host::expect_shape("layer norm weight", weight, &[width])?;
    host::expect_shape("layer norm bias", bias, &[width])?;
    custom::apply(LayerNorm { epsilon: epsilon as f32, isa: select::current() }, &[x, weight, bias])
}

/// Rows per task, and per partial sum of the gradients of weight and bias.
const TASK_ROWS: usize = 64;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;

struct LayerNorm {
    epsilon: f32,
    isa: Isa,
}

/// Mean and inverse standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32], epsilon: f32) -> (f32, f32) {
    let scale = 1.0 / row.len() as f32;
    let mean = host::sum_by(row.len(), |i| row[i]) * scale;
    let variance = host::sum_by(row.len(), |i| (row[i] - mean) * (row[i] - mean)) * scale;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

impl LayerNorm {
    /// Calls `work` with the row range of each task.
    fn for_tasks(&self, rows: usize, width: usize, work: impl Fn(usize, std::ops::Range<usize>) + Sync) {
        parallel::for_each_if(rows * width, LEAST_WORK, rows.div_ceil(TASK_ROWS), |task| {
            work(task, task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows));
        });
    }

    fn normed(&self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let width = weight.len();
        let mut out = vec![0.0; x.len()];
        let shared = SharedMut::new(&mut out);
        self.for_tasks(x.len() / width.max(1), width, |_, rows| {
            // SAFETY: tasks have rows of their own.
            let into = unsafe { shared.slice(rows.start * width, rows.len() * width) };
            let from = &x[rows.start * width..rows.end * width];
            self.isa.vectorize(|| {
                for (row, into) in from.chunks_exact(width).zip(into.chunks_exact_mut(width)) {
                    let (mean, inverse) = moments(row, self.epsilon);
                    for (((o, &v), &w), &b) in into.iter_mut().zip(row).zip(weight).zip(bias) {
                        *o = (v - mean) * inverse * w + b;
                    }
                }
            });
        });
        out
    }

    /// Gradients of input, weight and bias; the last two are summed over the tasks in their order.
    fn gradients(&self, x: &[f32], weight: &[f32], grad: &[f32]) -> [Vec<f32>; 3] {
        let width = weight.len();
        let rows = x.len() / width.max(1);
        let tasks = rows.div_ceil(TASK_ROWS);
        let mut dx = vec![0.0; x.len()];
        let mut sums = vec![0.0; tasks * 2 * width];
        let (dx_shared, sums_shared) = (SharedMut::new(&mut dx), SharedMut::new(&mut sums));
        self.for_tasks(rows, width, |task, rows| {
            // SAFETY: tasks have rows and partial sums of their own.
            let (into, sums) = unsafe {
                let into = dx_shared.slice(rows.start * width, rows.len() * width);
                (into, sums_shared.slice(task * 2 * width, 2 * width))
            };
            let range = rows.start * width..rows.end * width;
            self.isa.vectorize(|| self.backward_rows(&x[range.clone()], weight, &grad[range], into, sums));
        });
        let (mut dw, mut db) = (vec![0.0; width], vec![0.0; width]);
        for part in sums.chunks_exact(2 * width) {
            let (part_w, part_b) = part.split_at(width);
            dw.iter_mut().zip(part_w).for_each(|(sum, v)| *sum += v);
            db.iter_mut().zip(part_b).for_each(|(sum, v)| *sum += v);
        }
        [dx, dw, db]
    }

    #[inline(always)]
    fn backward_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], sums: &mut [f32]) {
        let width = weight.len();
        let scale = 1.0 / width as f32;
        let (dw, db) = sums.split_at_mut(width);
        for ((row, g), into) in x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let (mean, inverse) = moments(row, self.epsilon);
            let mean_g = host::sum_by(width, |i| g[i] * weight[i]) * scale;
            let mean_gx = host::sum_by(width, |i| g[i] * weight[i] * ((row[i] - mean) * inverse)) * scale;
            for i in 0..width {
                let normed = (row[i] - mean) * inverse;
                into[i] = (g[i] * weight[i] - mean_g - normed * mean_gx) * inverse;
                dw[i] += g[i] * normed;
                db[i] += g[i];
            }
        }
    }
}

impl SliceOp for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        (self.normed(inputs[0].values, inputs[1].values, inputs[2].values), inputs[0].dims.to_vec())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32]) -> Result<Vec<Vec<f32>>> {
        Ok(self.gradients(inputs[0].values, inputs[1].values, grad).into())
    }
}
