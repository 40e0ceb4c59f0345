//! The residual stream: what a block adds to it, and the norm of the sum that the next block reads, in one pass over memory.
//!
//! Backward, the gradient of the sum is that of the norm plus the one that comes along the stream, and both terms of the sum
//! get it as it is. The bits are those of the two operations one after the other.

#[cfg(test)]
mod tests;

use crate::custom::{settle, targets, with_cpu_inputs, with_inputs};
use crate::layer_norm::{self, LayerNorm};
use crate::parallel::SharedMut;
use crate::rms_norm::{self, RmsNorm};
use crate::{Error, Result, norm_rows, select, sums};
use candle_core::{D, Device, Tensor};
use moe_core::ops::host;
use moe_core::tape::{self, Edge};

/// One of the norms, with its row functions.
#[derive(Clone, Copy)]
enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    fn forward_rows(&self, from: &[f32], params: &[&[f32]], into: &mut [f32]) {
        match (self, params) {
            (Self::Layer(norm), [weight, bias]) => norm.forward_rows(from, weight, bias, into),
            (Self::Rms(norm), [weight]) => norm.forward_rows(from, weight, into),
            _ => unreachable!("a layer norm has two parameters, an rms norm one"),
        }
    }

    /// `sums` are those of the gradients of the parameters, one after the other.
    fn backward_rows(&self, x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], sums: &mut [f32]) {
        match self {
            Self::Layer(norm) => norm.backward_rows(x, weight, grad, dx, sums),
            Self::Rms(norm) => norm.backward_rows(x, weight, grad, dx, sums),
        }
    }
}

/// `x + delta`, and its LayerNorm (RMSNorm without a bias) over the last dimension.
///
/// # Shapes
/// `x` and `delta` `[.., d_model]`, `weight` and `bias` `[d_model]`, f32 on the CPU; returns two of the shape of `x`
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit.
pub fn add_norm(
    x: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    epsilon: f64,
) -> Result<[Tensor; 2]> {
    if x.dims() != delta.dims() {
        let (x, delta) = (x.dims(), delta.dims());
        return Err(Error::Argument(format!("both sides of a sum must have one shape, got {x:?} and {delta:?}")));
    }
    let width = x.dim(D::Minus1)?;
    host::expect_shape("norm weight", weight, &[width])?;
    if let Some(bias) = bias {
        host::expect_shape("norm bias", bias, &[width])?;
    }
    let inputs: Vec<&Tensor> = [x, delta, weight].into_iter().chain(bias).collect();
    if !tape::is_active() && tape::tracks(&inputs) {
        // candle's operations have one result.
        let sum = sums::add(x, delta)?;
        let normed = match bias {
            Some(bias) => layer_norm::layer_norm(&sum, weight, bias, epsilon)?,
            None => rms_norm::rms_norm(&sum, weight, epsilon)?,
        };
        return Ok([sum, normed]);
    }
    let (epsilon, isa) = (epsilon as f32, select::current());
    let norm = match bias {
        Some(_) => Norm::Layer(LayerNorm { epsilon, isa }),
        None => Norm::Rms(RmsNorm { epsilon, isa }),
    };
    let [sum, normed] = with_inputs("add_norm", &inputs, |inputs| {
        let params: Vec<&[f32]> = inputs[2..].iter().map(|param| param.values).collect();
        forward(norm, inputs[0].values, inputs[1].values, &params, width)
    })?;
    if !tape::tracks(&inputs) {
        return Ok([
            Tensor::from_vec(sum, x.shape(), &Device::Cpu)?,
            Tensor::from_vec(normed, x.shape(), &Device::Cpu)?,
        ]);
    }
    let [sum, normed] = [tape::output(sum, x.dims(), &Device::Cpu)?, tape::output(normed, x.dims(), &Device::Cpu)?];
    record(norm, &inputs, &sum, &normed);
    Ok([sum, normed])
}

fn forward(norm: Norm, x: &[f32], delta: &[f32], params: &[&[f32]], width: usize) -> [Vec<f32>; 2] {
    let mut sum: Vec<f32> = Vec::with_capacity(x.len());
    let shared = SharedMut::from_raw(sum.as_mut_ptr(), x.len());
    let normed = norm_rows::for_blocks(x.len(), width, |range, normed| {
        // SAFETY: blocks do not overlap and lie inside of the capacity; zeros are values.
        let sum = unsafe {
            std::ptr::write_bytes(shared.at(range.start), 0, range.len());
            shared.slice(range.start, range.len())
        };
        let (x, delta) = (&x[range.clone()], &delta[range]);
        sum.iter_mut().zip(x).zip(delta).for_each(|((sum, x), delta)| *sum = x + delta);
        norm.forward_rows(sum, params, normed);
    });
    // SAFETY: the blocks cover the buffer, and every element has been written.
    unsafe { sum.set_len(x.len()) };
    [sum, normed]
}

fn record(norm: Norm, inputs: &[&Tensor], sum: &Tensor, normed: &Tensor) {
    let terms = [Edge::of(inputs[0]), Edge::of(inputs[1])];
    let params: Vec<Edge> = inputs[2..].iter().map(|param| Edge::of(param)).collect();
    let shape = inputs[2].shape().clone();
    let (kept, weight) = (sum.detach(), inputs[2].detach());
    tape::record(&[sum, normed], move |gradients, into| {
        let mut gradients = gradients.into_iter();
        let (along, Some(grad)) = (gradients.next().flatten(), gradients.next().flatten()) else {
            return Err(moe_core::Error::Input("the norm of a residual stream has no gradient".into()));
        };
        let width = weight.elem_count();
        let all: Vec<&Tensor> = [&kept, &weight, &grad].into_iter().chain(&along).collect();
        let (dx, sums) = with_cpu_inputs(&all, |all| {
            let (sum, weight, grad) = (all[0].values, all[1].values, all[2].values);
            norm_rows::backward(sum.len(), width, params.len() * width, |range, dx, sums| {
                norm.backward_rows(&sum[range.clone()], weight, &grad[range.clone()], dx, sums);
                if let Some(along) = all.get(3) {
                    dx.iter_mut().zip(&along.values[range]).for_each(|(dx, along)| *dx += along);
                }
            })
        })?;
        let dx = Tensor::from_vec(dx, kept.shape(), &Device::Cpu)?;
        terms.iter().try_for_each(|term| into.give(term, dx.clone()))?;
        let mut targets = targets(&params, into);
        targets.iter_mut().zip(sums.chunks_exact(width)).for_each(|(to, sums)| to.bring(|| sums.to_vec()));
        let shapes = params.iter().map(|_| shape.clone()).collect();
        settle(&params, shapes, targets, into)
    });
}
