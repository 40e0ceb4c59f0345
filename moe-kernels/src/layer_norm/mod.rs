//! LayerNorm over the last dimension, forward and backward in one pass over memory each.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, Target};
use crate::select::vectorize;
use crate::{Isa, Result, norm_rows, select};
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

/// The row functions.
#[derive(Clone, Copy)]
pub(crate) struct LayerNorm {
    pub(crate) epsilon: f32,
    pub(crate) isa: Isa,
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
    fn normed(&self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        norm_rows::for_blocks(x.len(), weight.len(), |range, into| self.forward_rows(&x[range], weight, bias, into))
    }

    /// Rows of `from`, normed into those of `into`.
    pub(crate) fn forward_rows(&self, from: &[f32], weight: &[f32], bias: &[f32], into: &mut [f32]) {
        vectorize!(self.isa, (epsilon: f32 = self.epsilon, from: &[f32], weight: &[f32], bias: &[f32], into: &mut [f32]) {
            let width = weight.len();
            for (row, into) in from.chunks_exact(width).zip(into.chunks_exact_mut(width)) {
                let (mean, inverse) = moments(row, epsilon);
                for (((o, &v), &w), &b) in into.iter_mut().zip(row).zip(weight).zip(bias) {
                    *o = (v - mean) * inverse * w + b;
                }
            }
        });
    }

    /// Gradients of input, weight and bias.
    fn gradients(&self, x: &[f32], weight: &[f32], grad: &[f32]) -> [Vec<f32>; 3] {
        let width = weight.len();
        let (dx, mut dw) = norm_rows::backward(x.len(), width, 2 * width, |range, dx, sums| {
            self.backward_rows(&x[range.clone()], weight, &grad[range], dx, sums);
        });
        let db = dw.split_off(width);
        [dx, dw, db]
    }

    /// The gradient of rows of `x` into `dx`; those of the parameters are added to `sums`, weight before bias.
    pub(crate) fn backward_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], sums: &mut [f32]) {
        vectorize!(
            self.isa,
            (op: &LayerNorm = self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], sums: &mut [f32]) {
                op.gradient_rows(x, weight, grad, dx, sums);
            }
        );
    }

    #[inline(always)]
    fn gradient_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], sums: &mut [f32]) {
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

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let gradients = self.gradients(inputs[0].values, inputs[1].values, grad);
        to.iter_mut().zip(gradients).for_each(|(to, gradient)| to.bring(|| gradient));
        Ok(())
    }
}
