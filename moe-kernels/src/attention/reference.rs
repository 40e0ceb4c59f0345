//! Attention in ordinary candle operations: any device and type, with candle's own gradients.

use super::Heads;
use crate::{Precision, Result};
use candle_core::{D, Tensor};

/// [`super::causal_attention`] in ordinary operations.
///
/// # Errors
/// As there.
pub fn causal_attention(qkv: &Tensor, num_heads: usize) -> Result<Tensor> {
    let (batch, seq, width) = qkv.dims3()?;
    let heads = Heads::new(width, num_heads, Precision::F32)?;
    let split = |part: usize| -> Result<Tensor> {
        let x = qkv.narrow(D::Minus1, part * heads.d_model, heads.d_model)?;
        Ok(x.reshape((batch, seq, num_heads, heads.head_dim))?.transpose(1, 2)?.contiguous()?)
    };
    let out = attend(&split(0)?, &split(1)?, &split(2)?, heads.scale())?;
    Ok(out.transpose(1, 2)?.reshape((batch, seq, heads.d_model))?)
}

/// [`super::causal_attention_cached`] in ordinary operations.
pub(super) fn causal_attention_cached(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    num_heads: usize,
) -> Result<Tensor> {
    let (new, d_model) = queries.dims2()?;
    let heads = Heads::new(3 * d_model, num_heads, Precision::F32)?;
    let split = |x: &Tensor| -> Result<Tensor> {
        Ok(x.reshape((1, x.dim(0)?, num_heads, heads.head_dim))?.transpose(1, 2)?.contiguous()?)
    };
    let out = attend(&split(queries)?, &split(keys)?, &split(values)?, heads.scale())?;
    Ok(out.transpose(1, 2)?.reshape((new, d_model))?)
}

/// `[batch, heads, rows, head_dim]` each; the queries are the last rows.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
    let (rows, len) = (q.dim(2)?, k.dim(2)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * f64::from(scale))?;
    let hidden: Vec<f32> =
        (0..rows * len).map(|i| if i % len > i / len + (len - rows) { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(hidden, (rows, len), q.device())?.to_dtype(q.dtype())?;
    let scores = scores.broadcast_add(&mask)?;
    let exp = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let probs = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
    Ok(probs.matmul(v)?)
}
