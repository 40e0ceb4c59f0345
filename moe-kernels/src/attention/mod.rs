//! Causal multi-head attention, forward and backward, and decoding over cached keys and values.
//!
//! Queries go in blocks of 48; a block sees the keys up to its last query, so no `[seq, seq]` matrix is kept and no time is
//! spent on keys that no query of the block sees. A query's result depends on the keys before it only, not on the block
//! it is in: decoding token by token gives the bits of the whole pass.

mod reference;
#[cfg(test)]
mod tests;

pub use reference::causal_attention as causal_attention_reference;

use crate::buffer::with_scratch_f32;
use crate::gemm::{Group, Operand, Start, gemm_part};
use crate::parallel::SharedMut;
use crate::{Error, Isa, Precision, Result, ops, parallel, select};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use moe_core::ops::host::{self, Real};

/// Queries per block: a whole number of tiles.
const BLOCK: usize = 48;

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
    let heads = Heads::new(width, num_heads, precision)?;
    if !ops::takes(qkv) {
        return reference::causal_attention(qkv, num_heads);
    }
    Ok(qkv.contiguous()?.apply_op1(heads)?)
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
    let ((new, d_model), (len, _)) = (queries.dims2()?, keys.dims2()?);
    let heads = Heads::new(3 * d_model, num_heads, precision)?;
    if keys.dims() != values.dims() || keys.dim(1)? != d_model || len < new {
        return Err(Error::Argument(format!(
            "keys {:?} and values {:?} must have the width of the queries {:?} and at least their length",
            keys.dims(),
            values.dims(),
            queries.dims()
        )));
    }
    if !ops::takes(queries) {
        return reference::causal_attention_cached(queries, keys, values, num_heads);
    }
    let out = host::with_elements::<f32, _>(queries, |q| {
        host::with_elements::<f32, _>(keys, |k| {
            host::with_elements::<f32, _>(values, |v| {
                let mut out = vec![0.0; new * d_model];
                let strip = |values, rows| Strip { values, rows, row_stride: d_model };
                heads.forward(&[[strip(q, new), strip(k, len), strip(v, len)]], &mut out);
                Ok(out)
            })
        })
    })?;
    Ok(Tensor::from_vec(out, (new, d_model), queries.device())?)
}

#[derive(Debug, Clone, Copy)]
struct Heads {
    d_model: usize,
    num_heads: usize,
    head_dim: usize,
    precision: Precision,
    isa: Isa,
}

/// Rows of one sequence; a head is `head_dim` columns of them.
#[derive(Debug, Clone, Copy)]
struct Strip<'a> {
    /// From the first element of the first row on.
    values: &'a [f32],
    rows: usize,
    row_stride: usize,
}

impl<'a> Strip<'a> {
    fn at(&self, heads: &Heads, head: usize, start: usize) -> &'a [f32] {
        &self.values[start * self.row_stride + head * heads.head_dim..]
    }

    /// `rows` rows from `start` on of one head, summed over the head's columns.
    fn rows(&self, heads: &Heads, head: usize, start: usize, rows: usize) -> Operand<'a> {
        Operand::rows(self.at(heads, head, start), rows, heads.head_dim, self.row_stride)
    }

    /// The same, one output per column of the head, summed over the rows.
    fn columns(&self, heads: &Heads, head: usize, start: usize, rows: usize) -> Operand<'a> {
        Operand::columns(self.at(heads, head, start), heads.head_dim, rows, self.row_stride)
    }
}

impl Heads {
    fn new(qkv_width: usize, num_heads: usize, precision: Precision) -> Result<Self> {
        let d_model = qkv_width / 3;
        if num_heads == 0 || !qkv_width.is_multiple_of(3) || !d_model.is_multiple_of(num_heads) {
            return Err(Error::Argument(format!(
                "num_heads {num_heads} must divide the d_model of a [q | k | v] of width {qkv_width}"
            )));
        }
        Ok(Self { d_model, num_heads, head_dim: d_model / num_heads, precision, isa: select::current() })
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// One product on this thread into `out`, `out_stride` elements between rows.
    ///
    /// # Safety
    /// The product's part of `out` must belong to the caller.
    unsafe fn product(
        &self,
        a: Operand<'_>,
        b: Operand<'_>,
        start: Start<'_>,
        (out, out_offset, out_stride): (SharedMut<f32>, usize, usize),
    ) {
        let group = Group { a, b: b.into(), start, out_offset, out_stride };
        // SAFETY: passed on from the caller.
        unsafe { gemm_part(self.isa, self.precision, group, out) }
    }

    /// Probabilities `[rows, visible]` of queries `start..start + rows` of which the last sees `visible` keys.
    fn probabilities(&self, [q, k]: [Strip<'_>; 2], head: usize, start: usize, rows: usize, probs: &mut [f32]) {
        let visible = probs.len() / rows;
        let (queries, keys) = (q.rows(self, head, start, rows), k.rows(self, head, 0, visible));
        // SAFETY: `probs` is borrowed for the call.
        unsafe { self.product(queries, keys, Start::Zero, (SharedMut::new(probs), 0, visible)) };
        let scale = self.scale();
        self.isa.vectorize(|| softmax_rows(probs, visible, visible - rows, scale));
    }

    /// Attention of each sequence's queries, its last `q.rows` positions, into `out`, sequence after sequence.
    fn forward(&self, sequences: &[[Strip<'_>; 3]], out: &mut [f32]) {
        let blocks = sequences.first().map_or(0, |[q, ..]| q.rows.div_ceil(BLOCK));
        let (per_sequence, work) = match sequences.first() {
            Some([q, k, _]) => (q.rows * self.d_model, sequences.len() * q.rows * k.rows * self.d_model),
            None => return,
        };
        let out = SharedMut::new(out);
        parallel::for_each_if(work, 1 << 17, sequences.len() * self.num_heads * blocks, |task| {
            let (sequence, rest) = (task / (self.num_heads * blocks), task % (self.num_heads * blocks));
            // The last blocks see the most keys: they go first.
            let (head, block) = (rest % self.num_heads, blocks - 1 - rest / self.num_heads);
            let [q, k, v] = sequences[sequence];
            let start = block * BLOCK;
            let rows = BLOCK.min(q.rows - start);
            let visible = k.rows - q.rows + start + rows;
            with_scratch_f32(rows * visible, |probs| {
                self.probabilities([q, k], head, start, rows, probs);
                let to = sequence * per_sequence + start * self.d_model + head * self.head_dim;
                let (probs, values) = (Operand::rows(probs, rows, visible, visible), v.columns(self, head, 0, visible));
                // SAFETY: each task writes the columns of its head in the rows of its block.
                unsafe { self.product(probs, values, Start::Zero, (out, to, self.d_model)) };
            });
        });
    }

    /// Adds the gradient of one head of one sequence's `[q | k | v]` into `into` (`[seq_len, 3 d_model]` from `first` on).
    ///
    /// # Safety
    /// The head's columns in `into` must belong to the caller.
    unsafe fn backward(
        &self,
        [q, k, v]: [Strip<'_>; 3],
        [grad, out]: [Strip<'_>; 2],
        head: usize,
        (into, first): (SharedMut<f32>, usize),
    ) {
        let stride = 3 * self.d_model;
        let part =
            |part: usize, row: usize| (into, first + row * stride + part * self.d_model + head * self.head_dim, stride);
        for start in (0..q.rows).step_by(BLOCK) {
            let rows = BLOCK.min(q.rows - start);
            let visible = start + rows;
            with_scratch_f32(2 * rows * visible, |scratch| {
                let (probs, d_scores) = scratch.split_at_mut(rows * visible);
                self.probabilities([q, k], head, start, rows, probs);
                // 1. d_probs = grad V^T; d_scores = probs * (d_probs - rowsum(grad * out)) * scale.
                let grads = grad.rows(self, head, start, rows);
                // SAFETY: `d_scores` is borrowed for the call.
                unsafe {
                    let to = (SharedMut::new(d_scores), 0, visible);
                    self.product(grads, v.rows(self, head, 0, visible), Start::Zero, to);
                }
                self.score_gradient((probs, visible), d_scores, |row| {
                    [grad, out].map(|strip| &strip.at(self, head, start + row)[..self.head_dim])
                });
                // 2. dV += probs^T grad; dQ = d_scores K; dK += d_scores^T Q.
                let (probs, d_scores) = (&*probs, &*d_scores);
                // SAFETY: the caller's columns; each of the three parts has its own.
                unsafe {
                    let by_key = |values| Operand::columns(values, visible, rows, visible);
                    let queries = q.columns(self, head, start, rows);
                    self.product(by_key(probs), grad.columns(self, head, start, rows), Start::Output, part(2, 0));
                    self.product(by_key(d_scores), queries, Start::Output, part(1, 0));
                    let d_scores = Operand::rows(d_scores, rows, visible, visible);
                    self.product(d_scores, k.columns(self, head, 0, visible), Start::Zero, part(0, start));
                }
            });
        }
    }

    /// `d_scores` `[rows, visible]`, which holds the gradient of the probabilities, becomes that of the scores; `row` gives
    /// the gradient and the output of a query.
    fn score_gradient<'a>(
        &self,
        (probs, visible): (&[f32], usize),
        d_scores: &mut [f32],
        row: impl Fn(usize) -> [&'a [f32]; 2],
    ) {
        let scale = self.scale();
        self.isa.vectorize(|| {
            for (index, (d_scores, probs)) in
                d_scores.chunks_exact_mut(visible).zip(probs.chunks_exact(visible)).enumerate()
            {
                let [g, o] = row(index);
                let dot = host::sum_by(self.head_dim, |i| g[i] * o[i]);
                for (d, &p) in d_scores.iter_mut().zip(probs) {
                    *d = p * (*d - dot) * scale;
                }
            }
        });
    }

    fn sequences<'a>(&self, qkv: &'a [f32], batch: usize, seq: usize) -> Vec<[Strip<'a>; 3]> {
        let row_stride = 3 * self.d_model;
        let strip = |b: usize, part: usize| Strip {
            values: &qkv[b * seq * row_stride + part * self.d_model..],
            rows: seq,
            row_stride,
        };
        (0..batch).map(|b| [0, 1, 2].map(|part| strip(b, part))).collect()
    }

    fn gradient(&self, qkv: &[f32], out: &[f32], grad: &[f32], batch: usize, seq: usize) -> Vec<f32> {
        let mut into = vec![0.0; qkv.len()];
        let shared = SharedMut::new(&mut into);
        let sequences = self.sequences(qkv, batch, seq);
        let work = 2 * batch * seq * seq * self.d_model;
        parallel::for_each_if(work, 1 << 17, batch * self.num_heads, |task| {
            let (b, head) = (task / self.num_heads, task % self.num_heads);
            let [grad, out] = [grad, out].map(|values| Strip {
                values: &values[b * seq * self.d_model..],
                rows: seq,
                row_stride: self.d_model,
            });
            // SAFETY: each task adds into the columns of its head in its sequence.
            unsafe {
                self.backward(sequences[b], [grad, out], head, (shared, b * seq * 3 * self.d_model));
            }
        });
        into
    }
}

/// Scaled softmax of row `i` over its first `before + i + 1` columns; the rest becomes 0.
#[inline(always)]
fn softmax_rows(scores: &mut [f32], cols: usize, before: usize, scale: f32) {
    for (i, row) in scores.chunks_exact_mut(cols).enumerate() {
        let (seen, hidden) = row.split_at_mut(before + i + 1);
        let max = row_max(seen);
        for s in seen.iter_mut() {
            *s = ((*s - max) * scale).exp_();
        }
        let inverse = 1.0 / host::sum_by(seen.len(), |j| seen[j]);
        seen.iter_mut().for_each(|s| *s *= inverse);
        hidden.fill(0.0);
    }
}

/// The largest value, in 16 lanes so that it vectorises.
#[inline(always)]
pub(crate) fn row_max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(16);
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = lane.max_(v);
    }
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max_(v);
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, &b| a.max_(b))
}

impl CustomOp1 for Heads {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, seq, _) = l.shape().dims3()?;
        let mut out = vec![0.0; batch * seq * self.d_model];
        self.forward(&self.sequences(host::elements(s, l)?, batch, seq), &mut out);
        Ok((CpuStorage::F32(out), Shape::from((batch, seq, self.d_model))))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (batch, seq, _) = qkv.dims3()?;
        host::with_elements::<f32, _>(qkv, |x| {
            host::with_elements::<f32, _>(out, |o| {
                host::with_elements::<f32, _>(grad, |g| {
                    Tensor::from_vec(self.gradient(x, o, g, batch, seq), qkv.shape(), qkv.device()).map(Some)
                })
            })
        })
    }
}
