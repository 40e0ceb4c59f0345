//! Softmax cross-entropy over the vocabulary, with the softmax recomputed in the backward pass instead of kept.

use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Shape, Tensor};
use moe_core::ops::host::{self, Real};

/// A target that does not count.
pub const IGNORED: u32 = u32::MAX;

/// Mean over the counted targets of `-log softmax(logits)[target]`, in nats.
///
/// # Shapes
/// `logits` `[tokens, vocab_size]`, `targets` `[tokens]` ([`IGNORED`] entries do not count); returns a scalar, 0 if no
/// target counts
///
/// # Errors
/// [`Error::Argument`] if the lengths differ or a target is outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (tokens, vocab) = logits.dims2()?;
    if targets.len() != tokens {
        return Err(Error::Argument(format!("{} targets for {tokens} rows of logits", targets.len())));
    }
    if let Some(target) = targets.iter().find(|&&t| t != IGNORED && t as usize >= vocab) {
        return Err(Error::Argument(format!("target {target} is outside the vocabulary of {vocab}")));
    }
    if host::is_host_real(logits) {
        return Ok(logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.to_vec() })?);
    }
    let counted: Vec<u32> = (0..tokens as u32).filter(|&t| targets[t as usize] != IGNORED).collect();
    if counted.is_empty() {
        return Ok(Tensor::zeros((), logits.dtype(), logits.device())?);
    }
    let ids: Vec<u32> = counted.iter().map(|&t| targets[t as usize]).collect();
    let (rows, count) = (Tensor::new(counted, logits.device())?, ids.len());
    let logits = logits.index_select(&rows, 0)?;
    let picked = logits.gather(&Tensor::from_vec(ids, (count, 1), logits.device())?, 1)?.squeeze(1)?;
    Ok((logits.log_sum_exp(D::Minus1)? - picked)?.mean_all()?)
}

struct CrossEntropy {
    targets: Vec<u32>,
}

#[inline(always)]
fn max_and_sum<T: Real>(row: &[T]) -> (T, T) {
    let max = row.iter().fold(row[0], |a, &b| a.max_(b));
    (max, host::sum_by(row.len(), |i| (row[i] - max).exp_()))
}

impl CrossEntropy {
    fn count(&self) -> f64 {
        self.targets.iter().filter(|&&t| t != IGNORED).count().max(1) as f64
    }

    fn forward<T: Real>(&self, logits: &[T], vocab: usize) -> T {
        let total: f64 = host::dispatch(|| {
            let rows = logits.chunks_exact(vocab).zip(&self.targets).filter(|(_, t)| **t != IGNORED);
            rows.map(|(row, &target)| {
                let (max, sum) = max_and_sum(row);
                (max - row[target as usize]).to_f64() + sum.to_f64().ln()
            })
            .sum()
        });
        T::from_f64(total / self.count())
    }

    fn backward<T: Real>(&self, logits: &[T], vocab: usize, grad: f64) -> Vec<T> {
        let scale = T::from_f64(grad / self.count());
        host::dispatch(|| {
            let mut out = vec![T::from_f64(0.0); logits.len()];
            for ((row, &target), into) in logits.chunks_exact(vocab).zip(&self.targets).zip(out.chunks_exact_mut(vocab))
            {
                if target == IGNORED {
                    continue;
                }
                let (max, sum) = max_and_sum(row);
                let factor = scale / sum;
                for (g, &z) in into.iter_mut().zip(row) {
                    *g = (z - max).exp_() * factor;
                }
                into[target as usize] -= scale;
            }
            out
        })
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, vocab) = l.shape().dims2()?;
        let out = match s.dtype() {
            DType::F64 => CpuStorage::F64(vec![self.forward::<f64>(host::elements(s, l)?, vocab)]),
            _ => CpuStorage::F32(vec![self.forward::<f32>(host::elements(s, l)?, vocab)]),
        };
        Ok((out, Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let vocab = x.dim(1)?;
        let upstream = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let dx = match x.dtype() {
            DType::F64 => host::with_elements::<f64, _>(x, |z| {
                Tensor::from_vec(self.backward(z, vocab, upstream), x.shape(), x.device())
            })?,
            _ => host::with_elements::<f32, _>(x, |z| {
                Tensor::from_vec(self.backward(z, vocab, upstream), x.shape(), x.device())
            })?,
        };
        Ok(Some(dx))
    }
}
