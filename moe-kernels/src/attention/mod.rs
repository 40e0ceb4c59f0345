//! Causal attention with as many key heads as query heads or fewer, forward and backward; decoding over cached keys and
//! values, in one piece or in pages.
//!
//! Rows go in blocks of 48; a block sees the keys up to its last query, so no `[seq, seq]` matrix is kept and no time
//! is spent on keys that no query of the block sees. A query's result depends on the keys before it only, not on the
//! block it is in: decoding token by token gives the bits of the whole pass.

mod blocks;
mod paged;
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use blocks::row_max;
pub use paged::{PagedKv, PagedSequence, paged_attention};
pub use reference::{
    causal_attention as causal_attention_reference, grouped_query_attention as grouped_query_attention_reference,
};

use crate::parallel::SharedMut;
use crate::{Error, Precision, Result, ops};
use blocks::{Heads, Place, Sequence, Source, Strip, Training};
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Shape, Tensor};
use moe_core::ops::host;

/// How many heads an attention has. Query head `h` uses key and value head `h * num_kv_heads / num_heads`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Heads of the queries.
    pub num_heads: usize,
    /// Heads of the keys and of the values; divides `num_heads`.
    pub num_kv_heads: usize,
}

impl AttentionShape {
    /// The width of a head of queries `d_model` wide with keys and values `kv_width` wide.
    fn head_dim(self, d_model: usize, kv_width: usize) -> Result<usize> {
        let Self { num_heads, num_kv_heads } = self;
        if num_heads == 0 || num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::Argument(format!(
                "num_kv_heads {num_kv_heads} must divide num_heads {num_heads}, and neither may be 0"
            )));
        }
        let head_dim = d_model / num_heads;
        if head_dim == 0 || head_dim * num_heads != d_model || head_dim * num_kv_heads != kv_width {
            return Err(Error::Argument(format!(
                "queries of width {d_model} and keys of width {kv_width} must be num_heads {num_heads} and \
                 num_kv_heads {num_kv_heads} heads of one head_dim"
            )));
        }
        Ok(head_dim)
    }
}

/// Attention of each token to itself and the tokens before it in its sequence.
///
/// `precision` is that of the matrix products; the softmax is f32.
///
/// # Shapes
/// `qkv` `[batch, seq_len, 3 * d_model]` as queries, keys, values, each head after head; returns
/// `[batch, seq_len, d_model]`
///
/// # Errors
/// [`Error::Argument`] if `num_heads` does not divide `d_model`.
pub fn causal_attention(qkv: &Tensor, num_heads: usize, precision: Precision) -> Result<Tensor> {
    let (_, _, width) = qkv.dims3()?;
    let head_dim = fused_head_dim(width, num_heads)?;
    if !ops::takes(qkv) {
        return reference::causal_attention(qkv, num_heads);
    }
    let shape = AttentionShape { num_heads, num_kv_heads: num_heads };
    Ok(qkv.contiguous()?.apply_op1(Fused(Heads::new(shape, head_dim, precision)))?)
}

/// The width of a head of `[q | k | v]`.
fn fused_head_dim(qkv_width: usize, num_heads: usize) -> Result<usize> {
    let d_model = qkv_width / 3;
    if num_heads == 0 || !qkv_width.is_multiple_of(3) || !d_model.is_multiple_of(num_heads) {
        return Err(Error::Argument(format!(
            "num_heads {num_heads} must divide the d_model of a [q | k | v] of width {qkv_width}"
        )));
    }
    Ok(d_model / num_heads)
}

/// [`causal_attention`] of separate queries, keys and values, where several query heads may share a key and value head.
///
/// With as many key heads as query heads the bits are those of [`causal_attention`].
///
/// # Shapes
/// `queries` `[batch, seq_len, num_heads * head_dim]`, `keys` and `values` `[batch, seq_len, num_kv_heads * head_dim]`;
/// returns the shape of `queries`
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit.
///
/// # Source
/// GQA (Ainslie et al. 2023), section 2.2; the heads of a group are neighbours, as in transformers' `repeat_kv`.
pub fn grouped_query_attention(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: AttentionShape,
    precision: Precision,
) -> Result<Tensor> {
    let ((batch, seq_len, d_model), (_, _, kv_width)) = (queries.dims3()?, keys.dims3()?);
    let head_dim = shape.head_dim(d_model, kv_width)?;
    if keys.dims() != values.dims() || keys.dims()[..2] != [batch, seq_len] {
        return Err(Error::Argument(format!(
            "keys {:?} and values {:?} must have one shape, and the batch and length of the queries {:?}",
            keys.dims(),
            values.dims(),
            queries.dims()
        )));
    }
    if ![queries, keys, values].into_iter().all(ops::takes) {
        return reference::grouped_query_attention(queries, keys, values, shape);
    }
    let op = Grouped(Heads::new(shape, head_dim, precision));
    Ok(queries.contiguous()?.apply_op3(&keys.contiguous()?, &values.contiguous()?, op)?)
}

/// Attention of the last `queries.dim(0)` tokens of one sequence over all its keys and values. No gradient.
///
/// # Shapes
/// `queries` `[new, d_model]`, `keys` and `values` `[len, d_model]` with the new tokens at the end, f32 on the CPU;
/// returns `[new, d_model]`
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit.
pub fn causal_attention_cached(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    num_heads: usize,
    precision: Precision,
) -> Result<Tensor> {
    let shape = AttentionShape { num_heads, num_kv_heads: num_heads };
    grouped_query_attention_cached(queries, keys, values, shape, precision)
}

/// [`causal_attention_cached`] where several query heads may share a key and value head. No gradient.
///
/// # Shapes
/// `queries` `[new, num_heads * head_dim]`, `keys` and `values` `[len, num_kv_heads * head_dim]` with the new tokens at
/// the end, f32 on the CPU; returns the shape of `queries`
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit.
pub fn grouped_query_attention_cached(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: AttentionShape,
    precision: Precision,
) -> Result<Tensor> {
    let ((new, d_model), (len, kv_width)) = (queries.dims2()?, keys.dims2()?);
    let head_dim = shape.head_dim(d_model, kv_width)?;
    if keys.dims() != values.dims() || len < new {
        return Err(Error::Argument(format!(
            "keys {:?} and values {:?} must have one shape and at least the length of the queries {:?}",
            keys.dims(),
            values.dims(),
            queries.dims()
        )));
    }
    if !ops::takes(queries) {
        return reference::grouped_query_attention_cached(queries, keys, values, shape);
    }
    let heads = Heads::new(shape, head_dim, precision);
    let out = host::with_elements::<f32, _>(queries, |q| {
        host::with_elements::<f32, _>(keys, |k| {
            host::with_elements::<f32, _>(values, |v| {
                let mut out = vec![0.0; new * d_model];
                let [keys, values] = [k, v].map(|values| Source::Strip(Strip::new(values, kv_width)));
                let sequence = Sequence { queries: Strip::new(q, d_model), new, keys, values, len };
                heads.forward(&[sequence], &mut out);
                Ok(out)
            })
        })
    })?;
    Ok(Tensor::from_vec(out, (new, d_model), queries.device())?)
}

/// Attention of one `[q | k | v]`.
struct Fused(Heads);

/// Attention of separate queries, keys and values.
struct Grouped(Heads);

/// The sequences of a batch in which each of the three parts has its columns and its distance between rows.
fn batch_of<'a>([q, k, v]: [Strip<'a>; 3], batch: usize, seq_len: usize) -> Vec<Sequence<'a>> {
    let sequence = |b: usize| {
        let [queries, k, v] = [q, k, v].map(|strip| strip.from(b * seq_len, 0));
        Sequence { queries, new: seq_len, keys: Source::Strip(k), values: Source::Strip(v), len: seq_len }
    };
    (0..if seq_len == 0 { 0 } else { batch }).map(sequence).collect()
}

impl Heads {
    /// Of the output's shape; `[q, k, v]` hold `batch * seq_len` rows.
    fn forward_batch(&self, qkv: [Strip<'_>; 3], batch: usize, seq_len: usize) -> Vec<f32> {
        let mut out = vec![0.0; batch * seq_len * self.d_model()];
        self.forward(&batch_of(qkv, batch, seq_len), &mut out);
        out
    }

    /// Adds the gradients of all rows into their places.
    ///
    /// # Safety
    /// The places must be the caller's, and must not overlap.
    unsafe fn backward_batch(&self, all: Training<'_>, batch: usize, seq_len: usize) {
        let sequence = |b: usize| Training {
            qkv: all.qkv.map(|strip| strip.from(b * seq_len, 0)),
            out: all.out.from(b * seq_len, 0),
            grad: all.grad.from(b * seq_len, 0),
            d_qkv: all.d_qkv.map(|place| place.from(b * seq_len, 0)),
        };
        if seq_len > 0 {
            let sequences: Vec<Training<'_>> = (0..batch).map(sequence).collect();
            // SAFETY: sequences have rows of their own in the caller's places.
            unsafe { self.backward(&sequences, seq_len) };
        }
    }
}

impl Fused {
    fn parts<'a>(&self, qkv: &'a [f32]) -> [Strip<'a>; 3] {
        let d_model = self.0.d_model();
        [0, 1, 2].map(|part| Strip::new(&qkv[(part * d_model).min(qkv.len())..], 3 * d_model))
    }

    fn gradient(&self, qkv: &[f32], out: &[f32], grad: &[f32], batch: usize, seq_len: usize) -> Vec<f32> {
        let d_model = self.0.d_model();
        let mut into = vec![0.0; qkv.len()];
        let place = Place::new(SharedMut::new(&mut into), 3 * d_model);
        let all = Training {
            qkv: self.parts(qkv),
            out: Strip::new(out, d_model),
            grad: Strip::new(grad, d_model),
            d_qkv: [0, 1, 2].map(|part| place.from(0, part * d_model)),
        };
        // SAFETY: `into` is borrowed here alone, and the parts have columns of their own.
        unsafe { self.0.backward_batch(all, batch, seq_len) };
        into
    }
}

impl Grouped {
    fn parts<'a>(&self, [q, k, v]: [&'a [f32]; 3]) -> [Strip<'a>; 3] {
        let (d_model, kv_width) = (self.0.d_model(), self.0.kv_width());
        [Strip::new(q, d_model), Strip::new(k, kv_width), Strip::new(v, kv_width)]
    }

    fn gradient(&self, qkv: [&[f32]; 3], [out, grad]: [&[f32]; 2], (batch, seq_len): (usize, usize)) -> [Vec<f32>; 3] {
        let (d_model, kv_width) = (self.0.d_model(), self.0.kv_width());
        let mut into = qkv.map(|values| vec![0.0; values.len()]);
        let [dq, dk, dv] = &mut into;
        let place = |values: &mut [f32], stride| Place::new(SharedMut::new(values), stride);
        let all = Training {
            qkv: self.parts(qkv),
            out: Strip::new(out, d_model),
            grad: Strip::new(grad, d_model),
            d_qkv: [place(dq, d_model), place(dk, kv_width), place(dv, kv_width)],
        };
        // SAFETY: the three buffers are borrowed here alone.
        unsafe { self.0.backward_batch(all, batch, seq_len) };
        into
    }
}

impl CustomOp1 for Fused {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, seq_len, _) = l.shape().dims3()?;
        let out = self.0.forward_batch(self.parts(host::elements(s, l)?), batch, seq_len);
        Ok((CpuStorage::F32(out), Shape::from((batch, seq_len, self.0.d_model()))))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (batch, seq_len, _) = qkv.dims3()?;
        host::with_elements::<f32, _>(qkv, |x| {
            host::with_elements::<f32, _>(out, |o| {
                host::with_elements::<f32, _>(grad, |g| {
                    Tensor::from_vec(self.gradient(x, o, g, batch, seq_len), qkv.shape(), qkv.device()).map(Some)
                })
            })
        })
    }
}

impl CustomOp3 for Grouped {
    fn name(&self) -> &'static str {
        "grouped_query_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, seq_len, _) = ql.shape().dims3()?;
        let parts = self.parts([host::elements(q, ql)?, host::elements(k, kl)?, host::elements(v, vl)?]);
        Ok((CpuStorage::F32(self.0.forward_batch(parts, batch, seq_len)), ql.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (batch, seq_len, _) = q.dims3()?;
        let [dq, dk, dv] = host::with_elements::<f32, _>(q, |qs| {
            host::with_elements::<f32, _>(k, |ks| {
                host::with_elements::<f32, _>(v, |vs| {
                    host::with_elements::<f32, _>(out, |o| {
                        host::with_elements::<f32, _>(grad, |g| {
                            Ok(self.gradient([qs, ks, vs], [o, g], (batch, seq_len)))
                        })
                    })
                })
            })
        })?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}
