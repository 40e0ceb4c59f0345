//! GELU (tanh form) and SwiGLU, forward and backward.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp};
use crate::parallel::SharedMut;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::Tensor;
use moe_core::Activation;
use moe_core::ops::host::Real;

/// Applies `activation` to the last dimension.
///
/// # Shapes
/// `[.., d_ff * activation.inputs()]`, f32 on the CPU, gate before up for SwiGLU; returns `[.., d_ff]`
///
/// # Errors
/// [`Error::Argument`] if the width of a SwiGLU is odd.
pub fn activation(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let width = x.dim(candle_core::D::Minus1)?;
    if !width.is_multiple_of(activation.inputs()) {
        return Err(Error::Argument(format!("swiglu needs an even width [gate | up], got {width}")));
    }
    custom::apply(Elementwise { activation, isa: select::current() }, &[x])
}

/// [`activation`] of `[rows, width]` values into `[rows, width / inputs]`.
pub(crate) fn apply_into(isa: Isa, activation: Activation, x: &[f32], width: usize, out: &mut [f32]) {
    Elementwise { activation, isa }.forward_into(x, width, out);
}

/// Elements per task.
const TASK: usize = 1 << 14;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;

/// `sqrt(2 / pi)` and the cubic factor of GELU's tanh form.
const ROOT: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// `x / 2 (1 + tanh(u))` with `u = ROOT (x + CUBIC x^3)`, written as `x sigmoid(2 u)`: no cancellation for negative x.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * sigmoid(2.0 * ROOT * (x + CUBIC * x * x * x))
}

#[inline(always)]
fn gelu_gradient(x: f32) -> f32 {
    let s = sigmoid(2.0 * ROOT * (x + CUBIC * x * x * x));
    s + x * s * (1.0 - s) * (2.0 * ROOT) * (1.0 + 3.0 * CUBIC * x * x)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp_())
}

struct Elementwise {
    activation: Activation,
    isa: Isa,
}

impl Elementwise {
    /// Calls `work` with each part of `0..rows`, of about [`TASK`] elements, or fewer where threads would have none.
    fn for_parts(&self, rows: usize, width: usize, work: impl Fn(std::ops::Range<usize>) + Sync) {
        let even = rows.div_ceil(2 * rayon::current_num_threads());
        let per_task = (TASK / width.max(1)).min(even).max(1);
        parallel::for_each_if(rows * width, LEAST_WORK, rows.div_ceil(per_task), |task| {
            work(task * per_task..((task + 1) * per_task).min(rows));
        });
    }

    fn forward_into(&self, x: &[f32], width: usize, out: &mut [f32]) {
        let (rows, out_width) = (x.len() / width.max(1), width / self.activation.inputs());
        let shared = SharedMut::new(out);
        self.for_parts(rows, width, |part| {
            let from = &x[part.start * width..part.end * width];
            // SAFETY: parts have rows of their own.
            let into = unsafe { shared.slice(part.start * out_width, part.len() * out_width) };
            self.isa.vectorize(|| match self.activation {
                Activation::GeluTanh => into.iter_mut().zip(from).for_each(|(y, &x)| *y = gelu(x)),
                Activation::SwiGlu => {
                    for (into, row) in into.chunks_exact_mut(out_width).zip(from.chunks_exact(width)) {
                        let (gate, up) = row.split_at(out_width);
                        into.iter_mut().zip(gate).zip(up).for_each(|((y, &g), &u)| *y = g * sigmoid(g) * u);
                    }
                }
            });
        });
    }

    fn gradient(&self, x: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        let (rows, out_width) = (x.len() / width.max(1), width / self.activation.inputs());
        let mut out = vec![0.0; x.len()];
        let shared = SharedMut::new(&mut out);
        self.for_parts(rows, width, |part| {
            let from = &x[part.start * width..part.end * width];
            let grads = &grad[part.start * out_width..part.end * out_width];
            // SAFETY: parts have rows of their own.
            let into = unsafe { shared.slice(part.start * width, part.len() * width) };
            self.isa.vectorize(|| match self.activation {
                Activation::GeluTanh => {
                    into.iter_mut().zip(from).zip(grads).for_each(|((d, &x), &g)| *d = g * gelu_gradient(x));
                }
                Activation::SwiGlu => {
                    for ((into, row), grads) in
                        into.chunks_exact_mut(width).zip(from.chunks_exact(width)).zip(grads.chunks_exact(out_width))
                    {
                        swiglu_gradient(row, grads, into);
                    }
                }
            });
        });
        out
    }
}

#[inline(always)]
fn swiglu_gradient(row: &[f32], grads: &[f32], into: &mut [f32]) {
    let (gate, up) = row.split_at(grads.len());
    let (d_gate, d_up) = into.split_at_mut(grads.len());
    for i in 0..grads.len() {
        let s = sigmoid(gate[i]);
        d_up[i] = grads[i] * gate[i] * s;
        d_gate[i] = grads[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
    }
}

impl SliceOp for Elementwise {
    fn name(&self) -> &'static str {
        match self.activation {
            Activation::GeluTanh => "gelu_tanh",
            Activation::SwiGlu => "swiglu",
        }
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let Input { values, dims } = inputs[0];
        let mut out = vec![0.0; values.len() / self.activation.inputs()];
        self.forward_into(values, inputs[0].width(), &mut out);
        let leading = &dims[..dims.len() - 1];
        (out, [leading, &[inputs[0].width() / self.activation.inputs()]].concat())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32]) -> Result<Vec<Vec<f32>>> {
        Ok(vec![self.gradient(inputs[0].values, grad, inputs[0].width())])
    }
}
