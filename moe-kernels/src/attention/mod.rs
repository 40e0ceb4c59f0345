//! Causal attention with as many key heads as query heads or fewer, forward and backward; decoding over cached keys and
//! values, in one piece or in pages.
//!
//! Rows go in blocks of 48; a block sees the keys up to its last query, so no `[seq, seq]` matrix is kept and no time
//! is spent on keys that no query of the block sees. A query's result depends on the keys before it only, not on the
//! block it is in: decoding token by token gives the bits of the whole pass.

mod blocks;
mod decode;
mod paged;
mod pages;
mod sinks;
#[cfg(test)]
mod tests;

pub(crate) use blocks::row_max;
pub use moe_core::ops::{AttentionShape, HeadDropout, KvShape, PagedKv, PagedSequence};
pub use paged::{new_pages, paged_attention, paged_attention_with_sinks, write_pages};
pub use sinks::grouped_query_attention_with_sinks;

use crate::custom::{self, Input, SliceOp, Target, with_inputs};
use crate::parallel::SharedMut;
use crate::{Error, Precision, Result};
use blocks::{Heads, Place, Sequence, Source, Strip, TrainedSinks, Training};
use candle_core::{D, Tensor};
use moe_core::ops::check_sequences;

/// Attention of each token to itself and the tokens before it in its sequence.
///
/// `precision` is that of the matrix products; the softmax is f32.
///
/// # Shapes
/// `qkv` `[.., 3 * d_model]`, sequences of `seq_len` tokens one after the other, as queries, keys, values, each head after
/// head; returns `[.., d_model]`
///
/// # Errors
/// If `num_heads` does not divide `d_model`, or `seq_len` the tokens.
pub fn causal_attention(qkv: &Tensor, num_heads: usize, seq_len: usize, precision: Precision) -> Result<Tensor> {
    let width = qkv.dim(D::Minus1)?;
    check_sequences(qkv.elem_count() / width.max(1), seq_len)?;
    let head_dim = AttentionShape::fused_head_dim(width, num_heads)?;
    custom::apply(Fused(Heads::new(AttentionShape::equal(num_heads), head_dim, precision), seq_len), &[qkv])
}

/// [`causal_attention`] with probabilities dropped after the softmax. The mask is computed where the probabilities are, in the
/// forward pass and again in the backward pass.
///
/// # Errors
/// As there.
pub fn causal_attention_dropped(
    qkv: &Tensor,
    num_heads: usize,
    seq_len: usize,
    dropout: HeadDropout,
    precision: Precision,
) -> Result<Tensor> {
    let width = qkv.dim(D::Minus1)?;
    check_sequences(qkv.elem_count() / width.max(1), seq_len)?;
    let head_dim = AttentionShape::fused_head_dim(width, num_heads)?;
    let heads = Heads::new(AttentionShape::equal(num_heads), head_dim, precision).dropping(dropout);
    custom::apply(Fused(heads, seq_len), &[qkv])
}

/// [`causal_attention`] of separate queries, keys and values, where several query heads may share a key and value head.
///
/// With as many key heads as query heads the bits are those of [`causal_attention`].
///
/// # Shapes
/// `queries` `[.., num_heads * head_dim]`, `keys` and `values` `[.., num_kv_heads * head_dim]`, sequences of `seq_len` tokens
/// one after the other; returns the shape of `queries`
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
    seq_len: usize,
    precision: Precision,
) -> Result<Tensor> {
    let head_dim = shape.check(queries, keys, values, seq_len)?;
    custom::apply(Grouped(Heads::new(shape, head_dim, precision), seq_len), &[queries, keys, values])
}

/// [`grouped_query_attention`] of `[queries, keys, values]` with probabilities dropped, as [`causal_attention_dropped`] does.
///
/// # Errors
/// As there.
pub fn grouped_query_attention_dropped(
    qkv: [&Tensor; 3],
    shape: AttentionShape,
    seq_len: usize,
    dropout: HeadDropout,
    precision: Precision,
) -> Result<Tensor> {
    let [queries, keys, values] = qkv;
    let head_dim = shape.check(queries, keys, values, seq_len)?;
    custom::apply(Grouped(Heads::new(shape, head_dim, precision).dropping(dropout), seq_len), &qkv)
}

/// [`grouped_query_attention`] of the last `queries.dim(0)` tokens of one sequence over all its keys and values. No
/// gradient.
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
    let heads = Heads::new(shape, head_dim, precision);
    let out = with_inputs("attention", &[queries, keys, values], |qkv| {
        let mut out = vec![0.0; new * d_model];
        let [keys, values] = [1, 2].map(|part| Source::Strip(Strip::new(qkv[part].values, kv_width)));
        let sequence = Sequence { queries: Strip::new(qkv[0].values, d_model), new, keys, values, len };
        heads.forward(&[sequence], None, &mut out);
        out
    })?;
    Ok(Tensor::from_vec(out, (new, d_model), queries.device())?)
}

/// Attention of one `[q | k | v]`, with the length of its sequences.
struct Fused(Heads, usize);

/// Attention of separate queries, keys and values, with the length of their sequences.
struct Grouped(Heads, usize);

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
    fn forward_batch(&self, qkv: [Strip<'_>; 3], sinks: Option<&[f32]>, (batch, seq_len): (usize, usize)) -> Vec<f32> {
        let mut out = vec![0.0; batch * seq_len * self.d_model()];
        self.forward(&batch_of(qkv, batch, seq_len), sinks, &mut out);
        out
    }

    /// Adds the gradients of all rows into their places; each sequence has a row of those of sinks.
    ///
    /// # Safety
    /// The places must be the caller's, and must not overlap.
    unsafe fn backward_batch(&self, all: Training<'_>, batch: usize, seq_len: usize) {
        let sequence = |b: usize| Training {
            sinks: all.sinks.map(|sinks| TrainedSinks { gradient: sinks.gradient.from(b, 0), ..sinks }),
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
            sinks: None,
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
            sinks: None,
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

impl SliceOp for Fused {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn needs_output(&self) -> bool {
        true
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let Input { values, dims } = inputs[0];
        let out = self.0.forward_batch(self.parts(values), None, (inputs[0].rows() / self.1, self.1));
        (out, [&dims[..dims.len() - 1], &[self.0.d_model()]].concat())
    }

    fn backward(&self, inputs: &[Input<'_>], out: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        to[0].bring(|| self.gradient(inputs[0].values, out, grad, inputs[0].rows() / self.1, self.1));
        Ok(())
    }
}

impl SliceOp for Grouped {
    fn name(&self) -> &'static str {
        "grouped_query_attention"
    }

    fn needs_output(&self) -> bool {
        true
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let dims = inputs[0].dims;
        let parts = self.parts([0, 1, 2].map(|part| inputs[part].values));
        (self.0.forward_batch(parts, None, (inputs[0].rows() / self.1, self.1)), dims.to_vec())
    }

    fn backward(&self, inputs: &[Input<'_>], out: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let qkv = [0, 1, 2].map(|part| inputs[part].values);
        let gradients = self.gradient(qkv, [out, grad], (inputs[0].rows() / self.1, self.1));
        to.iter_mut().zip(gradients).for_each(|(to, gradient)| to.bring(|| gradient));
        Ok(())
    }
}
