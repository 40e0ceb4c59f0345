//! Causal multi-head attention over a fused `[q | k | v]`, block by block: no `[seq, seq]` matrix is kept, and queries
//! skip the keys after them. Decoding over cached keys and values runs the same blocks.

use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Shape, Storage, Tensor};
use moe_core::ops::host::{self, Real, View};

/// Queries per block.
const BLOCK: usize = 64;

/// Attention of each token to itself and the tokens before it in its sequence.
///
/// # Shapes
/// `qkv` `[batch, seq_len, 3 * d_model]` as queries, keys, values, each head after head; returns
/// `[batch, seq_len, d_model]`
///
/// # Errors
/// [`Error::Argument`] if `num_heads` does not divide `d_model`, or the tensor is neither f32 nor f64 on the CPU.
pub fn causal_attention(qkv: &Tensor, num_heads: usize) -> Result<Tensor> {
    let (_, _, width) = qkv.dims3()?;
    let heads = Heads::new(width / 3, num_heads)?;
    if !host::is_host_real(qkv) || width % 3 != 0 {
        return reference(qkv, num_heads);
    }
    Ok(qkv.contiguous()?.apply_op1(Attention { heads })?)
}

/// The same in ordinary candle operations, on any device.
pub(super) fn reference(qkv: &Tensor, num_heads: usize) -> Result<Tensor> {
    let (batch, seq, width) = qkv.dims3()?;
    let heads = Heads::new(width / 3, num_heads)?;
    let split = |part: usize| -> Result<Tensor> {
        let x = qkv.narrow(D::Minus1, part * heads.d_model, heads.d_model)?;
        Ok(x.reshape((batch, seq, num_heads, heads.head_dim))?.transpose(1, 2)?.contiguous()?)
    };
    let (q, k, v) = (split(0)?, split(1)?, split(2)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * heads.scale())?;
    let hidden: Vec<f32> = (0..seq * seq).map(|i| if i % seq > i / seq { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(hidden, (seq, seq), qkv.device())?.to_dtype(qkv.dtype())?;
    let scores = scores.broadcast_add(&mask)?;
    let exp = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let probs = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
    Ok(probs.matmul(&v)?.transpose(1, 2)?.reshape((batch, seq, heads.d_model))?)
}

/// Attention of the last `queries.dim(0)` tokens of one sequence over all its keys and values. No gradient.
///
/// # Shapes
/// `queries` `[new, d_model]`, `keys` and `values` `[len, d_model]` with the new tokens at the end; returns
/// `[new, d_model]`
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit, or the tensors are neither f32 nor f64 on the CPU.
pub fn causal_attention_cached(queries: &Tensor, keys: &Tensor, values: &Tensor, num_heads: usize) -> Result<Tensor> {
    let ((new, d_model), (len, _)) = (queries.dims2()?, keys.dims2()?);
    let heads = Heads::new(d_model, num_heads)?;
    if keys.dims() != values.dims() || keys.dim(1)? != d_model || len < new {
        return Err(Error::Argument(format!(
            "keys {:?} and values {:?} must have the width of the queries {:?} and at least their length",
            keys.dims(),
            values.dims(),
            queries.dims()
        )));
    }
    let (queries, keys, values) = (queries.contiguous()?, keys.contiguous()?, values.contiguous()?);
    let ((qs, ql), (ks, kl), (vs, vl)) =
        (queries.storage_and_layout(), keys.storage_and_layout(), values.storage_and_layout());
    let (Storage::Cpu(q), Storage::Cpu(k), Storage::Cpu(v)) = (&*qs, &*ks, &*vs) else {
        return Err(Error::Argument("cached attention runs on the CPU".into()));
    };
    let at = |start: usize, rows| Strip { offset: start, rows, row_stride: d_model };
    let strips = [at(ql.start_offset(), new), at(kl.start_offset(), len), at(vl.start_offset(), len)];
    let out = match queries.dtype() {
        DType::F64 => CpuStorage::F64(heads.forward::<f64>([q, k, v], strips)?),
        DType::F32 => CpuStorage::F32(heads.forward::<f32>([q, k, v], strips)?),
        other => return Err(Error::Argument(format!("cached attention computes in f32 or f64, got {other:?}"))),
    };
    let device = queries.device().clone();
    Ok(match out {
        CpuStorage::F64(v) => Tensor::from_vec(v, (new, d_model), &device)?,
        CpuStorage::F32(v) => Tensor::from_vec(v, (new, d_model), &device)?,
        _ => return Err(Error::Argument("cached attention computes in f32 or f64".into())),
    })
}

#[derive(Debug, Clone, Copy)]
struct Heads {
    d_model: usize,
    num_heads: usize,
    head_dim: usize,
}

/// Rows of one sequence in a buffer; a head is `head_dim` columns of it.
#[derive(Debug, Clone, Copy)]
struct Strip {
    offset: usize,
    rows: usize,
    row_stride: usize,
}

impl Strip {
    fn view(self, head: usize, head_dim: usize, start: usize, rows: usize) -> View {
        let offset = self.offset + start * self.row_stride + head * head_dim;
        View { offset, rows, cols: head_dim, row_stride: self.row_stride, col_stride: 1 }
    }
}

impl Heads {
    fn new(d_model: usize, num_heads: usize) -> Result<Self> {
        if num_heads == 0 || !d_model.is_multiple_of(num_heads) {
            return Err(Error::Argument(format!("num_heads {num_heads} must divide d_model {d_model}")));
        }
        Ok(Self { d_model, num_heads, head_dim: d_model / num_heads })
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Probabilities `[rows, visible]` of queries `start..start + rows`, the last of which sees `visible` keys.
    fn probabilities<T: Real>(
        &self,
        (q, q_view): (&CpuStorage, View),
        (k, k_view): (&CpuStorage, View),
        before: usize,
    ) -> candle_core::Result<Vec<T>> {
        let visible = k_view.rows;
        let scores = host::matmul((q, q_view), (k, k_view.transposed()))?;
        let mut scores = T::cpu_storage_data(scores)?;
        host::dispatch(|| softmax_rows(&mut scores, visible, before, T::from_f64(self.scale())));
        Ok(scores)
    }

    /// Attention of one sequence's queries (the last `q.rows` positions) over its keys and values.
    fn forward<T: Real>(&self, storages: [&CpuStorage; 3], [q, k, v]: [Strip; 3]) -> candle_core::Result<Vec<T>> {
        let mut out = vec![T::from_f64(0.0); q.rows * self.d_model];
        let past = k.rows - q.rows;
        for head in 0..self.num_heads {
            for start in (0..q.rows).step_by(BLOCK) {
                let rows = BLOCK.min(q.rows - start);
                let visible = past + start + rows;
                let keys = (storages[1], k.view(head, self.head_dim, 0, visible));
                let queries = (storages[0], q.view(head, self.head_dim, start, rows));
                let probs = T::to_cpu_storage_owned(self.probabilities::<T>(queries, keys, past + start)?);
                let values = (storages[2], v.view(head, self.head_dim, 0, visible));
                let block = host::matmul((&probs, View::row_major(0, rows, visible)), values)?;
                for (row, from) in block.as_slice::<T>()?.chunks_exact(self.head_dim).enumerate() {
                    let to = (start + row) * self.d_model + head * self.head_dim;
                    out[to..to + self.head_dim].copy_from_slice(from);
                }
            }
        }
        Ok(out)
    }

    /// Adds the gradient of one sequence's `[q | k | v]` into `into` (`[seq_len, 3 d_model]`).
    fn backward<T: Real>(
        &self,
        qkv: &CpuStorage,
        [q, k, v]: [Strip; 3],
        (grad, grad_strip): (&CpuStorage, Strip),
        (out, into): (&[T], &mut [T]),
    ) -> candle_core::Result<()> {
        let (seq, hd) = (q.rows, self.head_dim);
        for head in 0..self.num_heads {
            for start in (0..seq).step_by(BLOCK) {
                let rows = BLOCK.min(seq - start);
                let visible = start + rows;
                let (q_view, k_view) = (q.view(head, hd, start, rows), k.view(head, hd, 0, visible));
                let g_view = grad_strip.view(head, hd, start, rows);
                let probs = self.probabilities::<T>((qkv, q_view), (qkv, k_view), start)?;
                let block = View::row_major(0, rows, visible);

                // 1. d_probs = grad V^T; d_scores = probs * (d_probs - rowsum(grad * out)) * scale.
                let d_probs = host::matmul((grad, g_view), (qkv, v.view(head, hd, 0, visible).transposed()))?;
                let mut d_scores = T::cpu_storage_data(d_probs)?;
                let grads = grad.as_slice::<T>()?;
                host::dispatch(|| {
                    let scale = T::from_f64(self.scale());
                    for row in 0..rows {
                        let g = &grads[g_view.offset + row * g_view.row_stride..][..hd];
                        let o = &out[(start + row) * self.d_model + head * hd..][..hd];
                        let dot = host::sum_by(hd, |i| g[i] * o[i]);
                        let range = row * visible..(row + 1) * visible;
                        for (d, &p) in d_scores[range.clone()].iter_mut().zip(&probs[range]) {
                            *d = p * (*d - dot) * scale;
                        }
                    }
                });
                let (probs, d_scores) = (T::to_cpu_storage_owned(probs), T::to_cpu_storage_owned(d_scores));

                // 2. dV += probs^T grad; dQ = d_scores K; dK += d_scores^T Q.
                let dv = host::matmul((&probs, block.transposed()), (grad, g_view))?;
                let dq = host::matmul((&d_scores, block), (qkv, k_view))?;
                let dk = host::matmul((&d_scores, block.transposed()), (qkv, q_view))?;
                let at = |part: usize, row: usize| row * 3 * self.d_model + part * self.d_model + head * hd;
                add_rows(into, dq.as_slice::<T>()?, hd, |row| at(0, start + row));
                add_rows(into, dk.as_slice::<T>()?, hd, |row| at(1, row));
                add_rows(into, dv.as_slice::<T>()?, hd, |row| at(2, row));
            }
        }
        Ok(())
    }
}

fn add_rows<T: Real>(into: &mut [T], rows: &[T], width: usize, offset: impl Fn(usize) -> usize) {
    for (row, values) in rows.chunks_exact(width).enumerate() {
        for (sum, value) in into[offset(row)..][..width].iter_mut().zip(values) {
            *sum += *value;
        }
    }
}

/// Scaled softmax of row `i` over its first `before + i + 1` columns; the rest becomes 0.
#[inline(always)]
fn softmax_rows<T: Real>(scores: &mut [T], cols: usize, before: usize, scale: T) {
    for (i, row) in scores.chunks_exact_mut(cols).enumerate() {
        let (seen, hidden) = row.split_at_mut(before + i + 1);
        let max = seen.iter().fold(seen[0], |a, &b| a.max_(b));
        for s in seen.iter_mut() {
            *s = ((*s - max) * scale).exp_();
        }
        let inverse = T::from_f64(1.0) / host::sum_by(seen.len(), |j| seen[j]);
        seen.iter_mut().for_each(|s| *s *= inverse);
        hidden.fill(T::from_f64(0.0));
    }
}

struct Attention {
    heads: Heads,
}

impl Attention {
    fn strips(&self, offset: usize, seq: usize) -> [Strip; 3] {
        let (d_model, row_stride) = (self.heads.d_model, 3 * self.heads.d_model);
        [0, 1, 2].map(|part| Strip { offset: offset + part * d_model, rows: seq, row_stride })
    }

    fn run<T: Real>(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, seq, width) = l.shape().dims3()?;
        let mut out = Vec::with_capacity(batch * seq * self.heads.d_model);
        for b in 0..batch {
            let strips = self.strips(l.start_offset() + b * seq * width, seq);
            out.extend(self.heads.forward::<T>([s, s, s], strips)?);
        }
        Ok((T::to_cpu_storage_owned(out), Shape::from((batch, seq, self.heads.d_model))))
    }

    fn gradient<T: Real>(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, seq, width) = qkv.dims3()?;
        let d_model = self.heads.d_model;
        let (qkv, grad) = (qkv.contiguous()?, grad.contiguous()?);
        let ((qs, ql), (gs, gl)) = (qkv.storage_and_layout(), grad.storage_and_layout());
        let (Storage::Cpu(q), Storage::Cpu(g)) = (&*qs, &*gs) else {
            candle_core::bail!("attention's gradient runs on the CPU")
        };
        let mut into = vec![T::from_f64(0.0); batch * seq * width];
        host::with_elements::<T, _>(out, |out| {
            for b in 0..batch {
                let strips = self.strips(ql.start_offset() + b * seq * width, seq);
                let grad_strip =
                    Strip { offset: gl.start_offset() + b * seq * d_model, rows: seq, row_stride: d_model };
                let out = &out[b * seq * d_model..][..seq * d_model];
                let into = &mut into[b * seq * width..][..seq * width];
                self.heads.backward(q, strips, (g, grad_strip), (out, into))?;
            }
            Ok(())
        })?;
        Tensor::from_vec(into, (batch, seq, width), grad.device())
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if s.dtype() == DType::F64 { self.run::<f64>(s, l) } else { self.run::<f32>(s, l) }
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(match qkv.dtype() {
            DType::F64 => self.gradient::<f64>(qkv, out, grad)?,
            _ => self.gradient::<f32>(qkv, out, grad)?,
        }))
    }
}
