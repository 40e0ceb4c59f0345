//! Attention with the whole matrix of scores.

use crate::Result;
use crate::ops::{AttentionShape, HeadDropout};
use candle_core::{D, Tensor};

/// `[batch, rows, heads * head_dim]` each; the queries may be the last rows only, where nothing is dropped. `sinks` `[heads]`.
pub(super) fn grouped_query_attention(
    [queries, keys, values]: [&Tensor; 3],
    sinks: Option<&Tensor>,
    shape: AttentionShape,
    dropout: Option<HeadDropout>,
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
    let scale = shape.scale(head_dim);
    let qkv = [&split(queries, shape.num_heads)?, &repeated(keys)?, &repeated(values)?];
    let sinks = sinks.map(|sinks| sinks.reshape((1, shape.num_heads, 1, 1))).transpose()?;
    let out = attend(qkv, sinks, scale, shape, dropout)?;
    Ok(out.transpose(1, 2)?.reshape((batch, rows, d_model))?)
}

/// `[batch, heads, rows, head_dim]` each; the queries are the last rows.
fn attend(
    [q, k, v]: [&Tensor; 3],
    sinks: Option<Tensor>,
    scale: f32,
    shape: AttentionShape,
    dropout: Option<HeadDropout>,
) -> Result<Tensor> {
    let (rows, len) = (q.dim(2)?, k.dim(2)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * f64::from(scale))?;
    let seen = |i: usize| shape.seen(i / len + (len - rows)).contains(&(i % len));
    let hidden: Vec<f32> = (0..rows * len).map(|i| if seen(i) { 0.0 } else { f32::NEG_INFINITY }).collect();
    let mask = Tensor::from_vec(hidden, (rows, len), q.device())?.to_dtype(q.dtype())?;
    let scores = scores.broadcast_add(&mask)?;
    let mut max = scores.detach().max_keepdim(D::Minus1)?;
    if let Some(sinks) = &sinks {
        max = max.broadcast_maximum(&sinks.detach())?;
    }
    let exp = scores.broadcast_sub(&max)?.exp()?;
    let mut sum = exp.sum_keepdim(D::Minus1)?;
    if let Some(sinks) = &sinks {
        sum = (sum + sinks.broadcast_sub(&max)?.exp()?)?;
    }
    let probs = exp.broadcast_div(&sum)?;
    let Some(dropout) = dropout else { return Ok(probs.matmul(v)?) };
    let (batch, heads) = (q.dim(0)?, q.dim(1)?);
    let heads = (0..batch * heads).map(|i| dropout.head(i / heads, i % heads));
    let factors = heads.flat_map(|head| head.factors(rows, len).collect::<Vec<_>>());
    let factors = Tensor::from_iter(factors, q.device())?.reshape(probs.shape())?.to_dtype(q.dtype())?;
    Ok((probs * factors)?.matmul(v)?)
}
