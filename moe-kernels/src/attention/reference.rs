//! Attention in ordinary candle operations: any device and type, with candle's own gradients.

use super::{AttentionShape, fused_head_dim};
use crate::Result;
use candle_core::{D, Tensor};

/// [`super::causal_attention`] in ordinary operations.
///
/// # Errors
/// As there.
pub fn causal_attention(qkv: &Tensor, num_heads: usize) -> Result<Tensor> {
    let width = qkv.dim(D::Minus1)?;
    let d_model = fused_head_dim(width, num_heads)? * num_heads;
    let part = |part: usize| qkv.narrow(D::Minus1, part * d_model, d_model);
    let shape = AttentionShape { num_heads, num_kv_heads: num_heads };
    grouped_query_attention(&part(0)?, &part(1)?, &part(2)?, shape)
}

/// [`super::grouped_query_attention`] in ordinary operations; the queries may be the last rows only.
///
/// # Errors
/// As there.
pub fn grouped_query_attention(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: AttentionShape,
) -> Result<Tensor> {
    let (batch, rows, d_model) = queries.dims3()?;
    let head_dim = shape.head_dim(d_model, keys.dim(D::Minus1)?)?;
    let (kv_heads, group) = (shape.num_kv_heads, shape.num_heads / shape.num_kv_heads);
    let split = |x: &Tensor, heads: usize| -> Result<Tensor> {
        Ok(x.reshape((batch, x.dim(1)?, heads, head_dim))?.transpose(1, 2)?.contiguous()?)
    };
    // Each key head once per query head that uses it.
    let repeated = |x: &Tensor| -> Result<Tensor> {
        let (x, len) = (split(x, kv_heads)?.unsqueeze(2)?, x.dim(1)?);
        let x = x.broadcast_as((batch, kv_heads, group, len, head_dim))?.contiguous()?;
        Ok(x.reshape((batch, kv_heads * group, len, head_dim))?)
    };
    let scale = 1.0 / (head_dim as f32).sqrt();
    let out = attend(&split(queries, shape.num_heads)?, &repeated(keys)?, &repeated(values)?, scale)?;
    Ok(out.transpose(1, 2)?.reshape((batch, rows, d_model))?)
}

/// [`super::grouped_query_attention_cached`] in ordinary operations.
pub(super) fn grouped_query_attention_cached(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: AttentionShape,
) -> Result<Tensor> {
    let [q, k, v] = [queries, keys, values].map(|x| x.unsqueeze(0));
    Ok(grouped_query_attention(&q?, &k?, &v?, shape)?.squeeze(0)?)
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
