//! RMSNorm over the last dimension, forward and backward in one pass over memory each.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp};
use crate::parallel::SharedMut;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::{D, Tensor};
use moe_core::ops::host;

/// `x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension.
///
/// # Shapes
/// `x` `[.., d_model]`, `weight` `[d_model]`, f32 on the CPU; returns the shape of `x`
///
/// # Errors
/// [`Error::Argument`] if the weight has not one entry per column, or `epsilon` is negative or not finite.
///
/// # Source
/// Zhang and Sennrich 2019, equation 4, with the `epsilon` of Llama and `torch.nn.functional.rms_norm`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if weight.dims() != [width] {
        return Err(Error::Argument(format!(
            "weight of an rms norm over {width} columns must have shape [{width}], got {:?}",
            weight.dims()
        )));
    }
    if !epsilon.is_finite() || epsilon < 0.0 {
        return Err(Error::Argument(format!("epsilon of an rms norm must be finite and at least 0, got {epsilon}")));
    }
    custom::apply(RmsNorm { epsilon: epsilon as f32, isa: select::current() }, &[x, weight])
}

/// Rows per task, and per partial sum of the gradient of the weight.
const TASK_ROWS: usize = 64;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;

struct RmsNorm {
    epsilon: f32,
    isa: Isa,
}

impl RmsNorm {
    /// Calls `work` with the row range of each task.
    fn for_tasks(&self, rows: usize, width: usize, work: impl Fn(usize, std::ops::Range<usize>) + Sync) {
        parallel::for_each_if(rows * width, LEAST_WORK, rows.div_ceil(TASK_ROWS), |task| {
            work(task, task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows));
        });
    }

    /// `1 / sqrt(mean(row^2) + epsilon)`
    #[inline(always)]
    fn inverse_rms(&self, row: &[f32]) -> f32 {
        let mean_square = host::sum_by(row.len(), |i| row[i] * row[i]) * (1.0 / row.len() as f32);
        1.0 / (mean_square + self.epsilon).sqrt()
    }

    fn normed(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let width = weight.len();
        let mut out = vec![0.0; x.len()];
        let shared = SharedMut::new(&mut out);
        self.for_tasks(x.len() / width.max(1), width, |_, rows| {
            // SAFETY: tasks have rows of their own.
            let into = unsafe { shared.slice(rows.start * width, rows.len() * width) };
            let from = &x[rows.start * width..rows.end * width];
            self.isa.vectorize(|| {
                for (row, into) in from.chunks_exact(width).zip(into.chunks_exact_mut(width)) {
                    let inverse = self.inverse_rms(row);
                    for ((o, &v), &w) in into.iter_mut().zip(row).zip(weight) {
                        *o = v * inverse * w;
                    }
                }
            });
        });
        out
    }

    /// Gradients of input and weight; the latter is summed over the tasks in their order.
    fn gradients(&self, x: &[f32], weight: &[f32], grad: &[f32]) -> [Vec<f32>; 2] {
        let width = weight.len();
        let rows = x.len() / width.max(1);
        let mut dx = vec![0.0; x.len()];
        let mut sums = vec![0.0; rows.div_ceil(TASK_ROWS) * width];
        let (dx_shared, sums_shared) = (SharedMut::new(&mut dx), SharedMut::new(&mut sums));
        self.for_tasks(rows, width, |task, rows| {
            // SAFETY: tasks have rows and partial sums of their own.
            let (into, sums) = unsafe {
                let into = dx_shared.slice(rows.start * width, rows.len() * width);
                (into, sums_shared.slice(task * width, width))
            };
            let range = rows.start * width..rows.end * width;
            self.isa.vectorize(|| self.backward_rows(&x[range.clone()], weight, &grad[range], into, sums));
        });
        let mut dw = vec![0.0; width];
        for part in sums.chunks_exact(width.max(1)) {
            dw.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
        }
        [dx, dw]
    }

    #[inline(always)]
    fn backward_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
        let width = weight.len();
        let scale = 1.0 / width as f32;
        for ((row, g), into) in x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let inverse = self.inverse_rms(row);
            let mean_gx = host::sum_by(width, |i| g[i] * weight[i] * (row[i] * inverse)) * scale;
            for i in 0..width {
                let normed = row[i] * inverse;
                into[i] = (g[i] * weight[i] - normed * mean_gx) * inverse;
                dw[i] += g[i] * normed;
            }
        }
    }
}

impl SliceOp for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        (self.normed(inputs[0].values, inputs[1].values), inputs[0].dims.to_vec())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32]) -> Result<Vec<Vec<f32>>> {
        Ok(self.gradients(inputs[0].values, inputs[1].values, grad).into())
    }
}
