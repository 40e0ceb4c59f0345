//! RMSNorm over the last dimension, forward and backward in one pass over memory each.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, Target};
use crate::select::vectorize;
use crate::{Error, Isa, Result, norm_rows, select};
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

/// The row functions.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm {
    pub(crate) epsilon: f32,
    pub(crate) isa: Isa,
}

impl RmsNorm {
    /// `1 / sqrt(mean(row^2) + epsilon)`
    #[inline(always)]
    fn inverse_rms(&self, row: &[f32]) -> f32 {
        let mean_square = host::sum_by(row.len(), |i| row[i] * row[i]) * (1.0 / row.len() as f32);
        1.0 / (mean_square + self.epsilon).sqrt()
    }

    fn normed(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        norm_rows::for_blocks(x.len(), weight.len(), |range, into| self.forward_rows(&x[range], weight, into))
    }

    /// Rows of `from`, normed into those of `into`.
    pub(crate) fn forward_rows(&self, from: &[f32], weight: &[f32], into: &mut [f32]) {
        vectorize!(self.isa, (op: &RmsNorm = self, from: &[f32], weight: &[f32], into: &mut [f32]) {
            let width = weight.len();
            for (row, into) in from.chunks_exact(width).zip(into.chunks_exact_mut(width)) {
                let inverse = op.inverse_rms(row);
                for ((o, &v), &w) in into.iter_mut().zip(row).zip(weight) {
                    *o = v * inverse * w;
                }
            }
        });
    }

    /// Gradients of input and weight.
    fn gradients(&self, x: &[f32], weight: &[f32], grad: &[f32]) -> [Vec<f32>; 2] {
        let width = weight.len();
        let (dx, dw) = norm_rows::backward(x.len(), width, width, |range, dx, dw| {
            self.backward_rows(&x[range.clone()], weight, &grad[range], dx, dw);
        });
        [dx, dw]
    }

    /// The gradient of rows of `x` into `dx`; that of the weight is added to `dw`.
    pub(crate) fn backward_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
        vectorize!(
            self.isa,
            (op: &RmsNorm = self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
                op.gradient_rows(x, weight, grad, dx, dw);
            }
        );
    }

    #[inline(always)]
    fn gradient_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
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

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let gradients = self.gradients(inputs[0].values, inputs[1].values, grad);
        to.iter_mut().zip(gradients).for_each(|(to, gradient)| to.bring(|| gradient));
        Ok(())
    }
}
