//! GELU (tanh form), SwiGLU, and the latter with bounds.

use crate::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// What an expert or a feed-forward block applies between its two linear maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `0.5 x (1 + tanh(0.79788456 (x + 0.044715 x^3)))`: the paper's fused bias-GELU. One input of width `d_ff`.
    GeluTanh,
    /// `silu(gate) * up` of an input `[gate | up]` of width `2 d_ff`.
    SwiGlu,
    /// `(up + 1) gate sigmoid(1.702 gate)` of an input `[gate | up]` of width `2 d_ff`, with the gate at most 7 and `up` within 7
    /// of 0 (gpt-oss).
    SwiGluBounded,
}

impl Activation {
    /// Of [`Activation::SwiGluBounded`]: what its inputs are bounded by.
    pub const BOUND: f64 = 7.0;
    /// Of the same: the factor in its sigmoid.
    pub const SLOPE: f64 = 1.702;

    /// Columns of the first linear map per column of its output.
    pub fn inputs(self) -> usize {
        match self {
            Self::GeluTanh => 1,
            Self::SwiGlu | Self::SwiGluBounded => 2,
        }
    }

    /// Applies the activation to the last dimension, in ordinary candle operations.
    ///
    /// # Shapes
    /// `[.., inputs() * d_ff]` to `[.., d_ff]`
    ///
    /// # Errors
    /// If the width is odd for one that has a gate.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(candle_core::D::Minus1)?;
        if !width.is_multiple_of(self.inputs()) {
            return Err(crate::Error::Input(format!("swiglu needs an even width [gate | up], got {width}")));
        }
        match self {
            Self::GeluTanh => {
                let inner = ((x + (x.powf(3.0)? * CUBIC)?)? * SQRT_2_OVER_PI)?;
                Ok((((inner.tanh()? + 1.0)? * 0.5)? * x)?)
            }
            // candle takes no bound of nothing.
            Self::SwiGluBounded if x.elem_count() == 0 => Self::SwiGlu.apply(x),
            Self::SwiGluBounded => {
                let half = width / 2;
                let gate = x.narrow(candle_core::D::Minus1, 0, half)?.minimum(Self::BOUND)?;
                let up = x.narrow(candle_core::D::Minus1, half, half)?;
                let up = up.maximum(-Self::BOUND)?.minimum(Self::BOUND)?;
                let open = sigmoid(&(&gate * Self::SLOPE)?)?;
                Ok(((up + 1.0)? * (gate * open)?)?)
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

/// From here on down a sigmoid is what it is here: `exp(88)` is still a number, and so is what its gradient makes of it.
pub const SIGMOID_LEAST: f32 = -88.0;

/// `1 / (1 + exp(-z))`, of `z` of at least [`SIGMOID_LEAST`], so that its gradient is a number everywhere.
///
/// # Errors
/// If candle refuses the tensor's type.
pub fn sigmoid(z: &Tensor) -> Result<Tensor> {
    // candle takes no bound of nothing.
    let z = if z.elem_count() == 0 { z.clone() } else { z.maximum(f64::from(SIGMOID_LEAST))? };
    Ok((z.neg()?.exp()? + 1.0)?.recip()?)
}

const SQRT_2_OVER_PI: f64 = 0.797_884_56;
const CUBIC: f64 = 0.044_715;
