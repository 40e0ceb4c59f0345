//! GELU (tanh form) and SwiGLU with their gradients, each one pass over memory.

use super::host::{self, Real, tanh};
use crate::Result;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};
use serde::{Deserialize, Serialize};

/// What an expert or a feed-forward block applies between its two linear maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `0.5 x (1 + tanh(0.79788456 (x + 0.044715 x^3)))`: the paper's fused bias-GELU. One input of width `d_ff`.
    GeluTanh,
    /// `silu(gate) * up` of an input `[gate | up]` of width `2 d_ff`.
    SwiGlu,
}

impl Activation {
    /// Columns of the first linear map per column of its output.
    pub fn inputs(self) -> usize {
        match self {
            Self::GeluTanh => 1,
            Self::SwiGlu => 2,
        }
    }

    /// Applies the activation to the last dimension.
    ///
    /// # Shapes
    /// `[.., inputs() * d_ff]` to `[.., d_ff]`
    ///
    /// # Errors
    /// If the width is odd for [`Activation::SwiGlu`].
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(candle_core::D::Minus1)?;
        if self == Self::SwiGlu && !width.is_multiple_of(2) {
            return Err(crate::Error::Input(format!("swiglu needs an even width [gate | up], got {width}")));
        }
        if host::is_host_real(x) {
            return Ok(x.contiguous()?.apply_op1(Fused(self))?);
        }
        self.apply_reference(x)
    }

    /// The same in ordinary candle operations: the reference, and the path of other devices.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn apply_reference(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::GeluTanh => {
                let inner = ((x + (x.powf(3.0)? * CUBIC)?)? * SQRT_2_OVER_PI)?;
                Ok((((inner.tanh()? + 1.0)? * 0.5)? * x)?)
            }
            Self::SwiGlu => {
                let half = x.dim(candle_core::D::Minus1)? / 2;
                let gate = x.narrow(candle_core::D::Minus1, 0, half)?;
                let up = x.narrow(candle_core::D::Minus1, half, half)?;
                Ok((gate.silu()? * up)?)
            }
        }
    }
}

const SQRT_2_OVER_PI: f64 = 0.797_884_56;
const CUBIC: f64 = 0.044_715;

#[inline(always)]
fn gelu<T: Real>(x: T) -> T {
    let inner = T::from_f64(SQRT_2_OVER_PI) * (x + T::from_f64(CUBIC) * x * x * x);
    T::from_f64(0.5) * x * (T::from_f64(1.0) + tanh(inner))
}

#[inline(always)]
fn gelu_gradient<T: Real>(x: T) -> T {
    let (one, half) = (T::from_f64(1.0), T::from_f64(0.5));
    let t = tanh(T::from_f64(SQRT_2_OVER_PI) * (x + T::from_f64(CUBIC) * x * x * x));
    let slope = T::from_f64(SQRT_2_OVER_PI) * (one + T::from_f64(3.0 * CUBIC) * x * x);
    half * (one + t) + half * x * (one - t * t) * slope
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    let one = T::from_f64(1.0);
    one / (one + (-x).exp_())
}

fn forward<T: Real>(act: Activation, x: &[T], width: usize) -> Vec<T> {
    host::dispatch(|| match act {
        Activation::GeluTanh => x.iter().map(|&v| gelu(v)).collect(),
        Activation::SwiGlu => {
            let half = width / 2;
            let mut out = Vec::with_capacity(x.len() / 2);
            for row in x.chunks_exact(width) {
                let (gate, up) = row.split_at(half);
                out.extend(gate.iter().zip(up).map(|(&g, &u)| g * sigmoid(g) * u));
            }
            out
        }
    })
}

fn backward<T: Real>(act: Activation, x: &[T], grad: &[T], width: usize) -> Vec<T> {
    host::dispatch(|| match act {
        Activation::GeluTanh => x.iter().zip(grad).map(|(&v, &g)| g * gelu_gradient(v)).collect(),
        Activation::SwiGlu => {
            let half = width / 2;
            let one = T::from_f64(1.0);
            let mut out = vec![T::from_f64(0.0); x.len()];
            for ((row, grads), into) in
                x.chunks_exact(width).zip(grad.chunks_exact(half)).zip(out.chunks_exact_mut(width))
            {
                let (gate, up) = row.split_at(half);
                let (d_gate, d_up) = into.split_at_mut(half);
                for i in 0..half {
                    let s = sigmoid(gate[i]);
                    d_up[i] = grads[i] * gate[i] * s;
                    d_gate[i] = grads[i] * up[i] * s * (one + gate[i] * (one - s));
                }
            }
            out
        }
    })
}

struct Fused(Activation);

impl CustomOp1 for Fused {
    fn name(&self) -> &'static str {
        match self.0 {
            Activation::GeluTanh => "gelu_tanh",
            Activation::SwiGlu => "swiglu",
        }
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut dims = l.dims().to_vec();
        let Some(last) = dims.last_mut() else { candle_core::bail!("an activation needs at least one dimension") };
        let width = *last;
        *last /= self.0.inputs();
        let out = match s.dtype() {
            DType::F64 => CpuStorage::F64(forward(self.0, host::elements::<f64>(s, l)?, width)),
            _ => CpuStorage::F32(forward(self.0, host::elements::<f32>(s, l)?, width)),
        };
        Ok((out, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let width = x.dim(candle_core::D::Minus1)?;
        let run = |act| match x.dtype() {
            DType::F64 => host::with_elements::<f64, _>(x, |xs| {
                host::with_elements::<f64, _>(grad, |g| {
                    Tensor::from_vec(backward(act, xs, g, width), x.shape(), x.device())
                })
            }),
            _ => host::with_elements::<f32, _>(x, |xs| {
                host::with_elements::<f32, _>(grad, |g| {
                    Tensor::from_vec(backward(act, xs, g, width), x.shape(), x.device())
                })
            }),
        };
        Ok(Some(run(self.0)?))
    }
}
