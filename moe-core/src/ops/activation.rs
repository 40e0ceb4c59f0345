//! GELU (tanh form) and SwiGLU.

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
}

impl Activation {
    /// Columns of the first linear map per column of its output.
    pub fn inputs(self) -> usize {
        match self {
            Self::GeluTanh => 1,
            Self::SwiGlu => 2,
        }
    }

    /// Applies the activation to the last dimension, in ordinary candle operations.
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
