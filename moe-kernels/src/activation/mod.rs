//! GELU (tanh form), SwiGLU and its bounded form, forward and backward.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, Target};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::Tensor;
use moe_core::Activation;
use moe_core::ops::host::Real;

/// Applies `activation` to the last dimension.
///
/// # Shapes
/// `[.., d_ff * activation.inputs()]`, f32 on the CPU, gate before up where there is a gate; returns `[.., d_ff]`
///
/// # Errors
/// [`Error::Argument`] if the width is odd where there is a gate.
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

/// Gradient and value at once, each where an input was: `x` `[rows, width]` becomes its gradient, and `grad`
/// `[rows, width / inputs]`, the gradient of the result, becomes the result.
pub(crate) fn gradient_in_place(isa: Isa, activation: Activation, x: &mut [f32], width: usize, grad: &mut [f32]) {
    Elementwise { activation, isa }.gradient_in_place(x, width, grad);
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

/// Bound and slope of the bounded SwiGLU.
const BOUND: f32 = Activation::BOUND as f32;
const SLOPE: f32 = Activation::SLOPE as f32;

/// `(up + 1) gate sigmoid(SLOPE gate)` of bounded inputs. NaN is within all bounds.
#[inline(always)]
fn swiglu_bounded(gate: f32, up: f32) -> f32 {
    let (gate, up) = (at_most_bound(gate), within_bound(up));
    (up + 1.0) * (gate * sigmoid(SLOPE * gate))
}

/// Its gradients for gate and up.
#[inline(always)]
fn swiglu_bounded_gradient(gate: f32, up: f32) -> [f32; 2] {
    let (g, u) = (at_most_bound(gate), within_bound(up));
    let s = sigmoid(SLOPE * g);
    let of_gate = if gate > BOUND { 0.0 } else { (u + 1.0) * s * (1.0 + SLOPE * g * (1.0 - s)) };
    let of_up = if up.abs() > BOUND { 0.0 } else { g * s };
    [of_gate, of_up]
}

#[inline(always)]
fn at_most_bound(x: f32) -> f32 {
    if x > BOUND { BOUND } else { x }
}

#[inline(always)]
fn within_bound(x: f32) -> f32 {
    if x < -BOUND { -BOUND } else { at_most_bound(x) }
}

struct Elementwise {
    activation: Activation,
    isa: Isa,
}

impl Elementwise {
    /// Rows of about [`TASK`] elements, or fewer where threads would have none.
    fn rows_per_task(&self, rows: usize, width: usize) -> usize {
        let even = rows.div_ceil(2 * rayon::current_num_threads());
        (TASK / width.max(1)).min(even).max(1)
    }

    fn forward_into(&self, x: &[f32], width: usize, out: &mut [f32]) {
        let (rows, out_width) = (x.len() / width.max(1), width / self.activation.inputs());
        let (per_task, shared) = (self.rows_per_task(rows, width), SharedMut::new(out));
        parallel::for_each_if(rows * width, LEAST_WORK, rows.div_ceil(per_task), |task| {
            let part = task * per_task..((task + 1) * per_task).min(rows);
            // SAFETY: parts have rows of their own.
            let into = unsafe { shared.slice(part.start * out_width, part.len() * out_width) };
            self.rows(&x[part.start * width..part.end * width], width, into);
        });
    }

    fn forward_new(&self, x: &[f32], width: usize) -> Vec<f32> {
        let (rows, out_width) = (x.len() / width.max(1), width / self.activation.inputs());
        let part = self.rows_per_task(rows, width) * out_width;
        parallel::filled(rows * out_width, part, LEAST_WORK, |range, into| {
            let inputs = self.activation.inputs();
            self.rows(&x[range.start * inputs..range.end * inputs], width, into);
        })
    }

    fn rows(&self, from: &[f32], width: usize, into: &mut [f32]) {
        match self.activation {
            Activation::GeluTanh => vectorize!(self.isa, (from: &[f32], into: &mut [f32]) {
                into.iter_mut().zip(from).for_each(|(y, &x)| *y = gelu(x));
            }),
            Activation::SwiGlu => vectorize!(self.isa, (from: &[f32], width: usize, into: &mut [f32]) {
                for (into, row) in into.chunks_exact_mut(width / 2).zip(from.chunks_exact(width)) {
                    let (gate, up) = row.split_at(width / 2);
                    into.iter_mut().zip(gate).zip(up).for_each(|((y, &g), &u)| *y = g * sigmoid(g) * u);
                }
            }),
            Activation::SwiGluBounded => vectorize!(self.isa, (from: &[f32], width: usize, into: &mut [f32]) {
                for (into, row) in into.chunks_exact_mut(width / 2).zip(from.chunks_exact(width)) {
                    let (gate, up) = row.split_at(width / 2);
                    into.iter_mut().zip(gate).zip(up).for_each(|((y, &g), &u)| *y = swiglu_bounded(g, u));
                }
            }),
        }
    }

    fn gradient_in_place(&self, x: &mut [f32], width: usize, grad: &mut [f32]) {
        let (rows, out_width) = (x.len() / width.max(1), width / self.activation.inputs());
        let (len, per_task) = (x.len(), self.rows_per_task(rows, width));
        let (x, grad) = (SharedMut::new(x), SharedMut::new(grad));
        parallel::for_each_if(len, LEAST_WORK, rows.div_ceil(per_task), |task| {
            let part = task * per_task..((task + 1) * per_task).min(rows);
            // SAFETY: parts have rows of their own.
            let (x, grad) = unsafe {
                (
                    x.slice(part.start * width, part.len() * width),
                    grad.slice(part.start * out_width, part.len() * out_width),
                )
            };
            match self.activation {
                Activation::GeluTanh => vectorize!(self.isa, (x: &mut [f32], grad: &mut [f32]) {
                    for (x, grad) in x.iter_mut().zip(grad) {
                        let (value, slope) = (gelu(*x), gelu_gradient(*x));
                        (*x, *grad) = (*grad * slope, value);
                    }
                }),
                Activation::SwiGlu => vectorize!(self.isa, (x: &mut [f32], width: usize, grad: &mut [f32]) {
                    let out_width = width / 2;
                    for (row, grads) in x.chunks_exact_mut(width).zip(grad.chunks_exact_mut(out_width)) {
                        let (gate, up) = row.split_at_mut(out_width);
                        for ((g, u), d) in gate.iter_mut().zip(up).zip(grads) {
                            let s = sigmoid(*g);
                            let (of_gate, of_up) = (*d * *u * s * (1.0 + *g * (1.0 - s)), *d * *g * s);
                            *d = *g * s * *u;
                            (*g, *u) = (of_gate, of_up);
                        }
                    }
                }),
                Activation::SwiGluBounded => {
                    vectorize!(self.isa, (x: &mut [f32], width: usize, grad: &mut [f32]) {
                        let out_width = width / 2;
                        for (row, grads) in x.chunks_exact_mut(width).zip(grad.chunks_exact_mut(out_width)) {
                            let (gate, up) = row.split_at_mut(out_width);
                            for ((g, u), d) in gate.iter_mut().zip(up).zip(grads) {
                                let ([of_gate, of_up], value) = (swiglu_bounded_gradient(*g, *u), swiglu_bounded(*g, *u));
                                (*g, *u, *d) = (*d * of_gate, *d * of_up, value);
                            }
                        }
                    })
                }
            }
        });
    }

    fn gradient(&self, x: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        let (rows, inputs) = (x.len() / width.max(1), self.activation.inputs());
        parallel::filled(x.len(), self.rows_per_task(rows, width) * width, LEAST_WORK, |range, into| {
            let grads = &grad[range.start / inputs..range.end / inputs];
            let from = &x[range];
            match self.activation {
                Activation::GeluTanh => vectorize!(self.isa, (from: &[f32], grads: &[f32], into: &mut [f32]) {
                    into.iter_mut().zip(from).zip(grads).for_each(|((d, &x), &g)| *d = g * gelu_gradient(x));
                }),
                Activation::SwiGlu => {
                    vectorize!(self.isa, (from: &[f32], width: usize, grads: &[f32], into: &mut [f32]) {
                        let rows = into.chunks_exact_mut(width).zip(from.chunks_exact(width));
                        for ((into, row), grads) in rows.zip(grads.chunks_exact(width / 2)) {
                            swiglu_gradient(row, grads, into);
                        }
                    })
                }
                Activation::SwiGluBounded => {
                    vectorize!(self.isa, (from: &[f32], width: usize, grads: &[f32], into: &mut [f32]) {
                        let rows = into.chunks_exact_mut(width).zip(from.chunks_exact(width));
                        for ((into, row), grads) in rows.zip(grads.chunks_exact(width / 2)) {
                            let (gate, up) = row.split_at(grads.len());
                            let (d_gate, d_up) = into.split_at_mut(grads.len());
                            for i in 0..grads.len() {
                                let [of_gate, of_up] = swiglu_bounded_gradient(gate[i], up[i]);
                                (d_gate[i], d_up[i]) = (grads[i] * of_gate, grads[i] * of_up);
                            }
                        }
                    })
                }
            }
        })
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
            Activation::SwiGluBounded => "swiglu_bounded",
        }
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let Input { values, dims } = inputs[0];
        let out = self.forward_new(values, inputs[0].width());
        let leading = &dims[..dims.len() - 1];
        (out, [leading, &[inputs[0].width() / self.activation.inputs()]].concat())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        to[0].bring(|| self.gradient(inputs[0].values, grad, inputs[0].width()));
        Ok(())
    }
}
