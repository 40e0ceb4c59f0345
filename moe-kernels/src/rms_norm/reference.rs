//! RMSNorm in ordinary candle operations: any device and type, with candle's own gradients (its fused one has none).

use crate::Result;
use candle_core::{D, DType, Tensor};

/// [`super::rms_norm`] in ordinary operations; half types are computed in f32 and rounded once, at the end.
///
/// # Errors
/// If a shape does not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let compute = if matches!(x.dtype(), DType::BF16 | DType::F16) { DType::F32 } else { x.dtype() };
    let (wide, weight) = (x.to_dtype(compute)?, weight.to_dtype(compute)?);
    let mean_square = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = wide.broadcast_div(&(mean_square + epsilon)?.sqrt()?)?;
    Ok(normed.broadcast_mul(&weight)?.to_dtype(x.dtype())?)
}
