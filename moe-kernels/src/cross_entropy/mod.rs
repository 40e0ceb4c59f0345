//! Softmax cross-entropy over the vocabulary, fused with the output layer: logits exist for one block of tokens at a time.
//!
//! With gradients, those of the hidden states and of the output layer are computed in the forward pass, while a block's
//! logits are at hand; the backward pass scales them. Nothing of size `[tokens, vocab_size]` is ever kept.

mod reference;
#[cfg(test)]
mod tests;

pub use reference::linear_cross_entropy as linear_cross_entropy_reference;

use crate::attention::row_max;
use crate::buffer::with_scratch_f32;
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm};
use crate::parallel::SharedMut;
use crate::{Error, Isa, Precision, Result, ops, parallel, select};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use moe_core::ops::host::{self, Real};
use std::sync::Mutex;

/// A target that does not count.
pub const IGNORED: u32 = u32::MAX;

/// Mean over the counted targets of `-log softmax(hidden weight^T)[target]`, in nats.
///
/// # Shapes
/// `hidden` `[tokens, d_model]`, `weight` `[vocab_size, d_model]`, `targets` `[tokens]` ([`IGNORED`] entries do not count);
/// returns a scalar, 0 if no target counts
///
/// # Errors
/// [`Error::Argument`] if the sizes differ or a target is outside the vocabulary.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &[u32], precision: Precision) -> Result<Tensor> {
    let ((tokens, width), (vocab, weight_width)) = (hidden.dims2()?, weight.dims2()?);
    if targets.len() != tokens || width != weight_width {
        return Err(Error::Argument(format!(
            "hidden [{tokens}, {width}] needs a weight of its width and {tokens} targets, got [{vocab}, {weight_width}] and {}",
            targets.len()
        )));
    }
    if let Some(target) = targets.iter().find(|&&t| t != IGNORED && t as usize >= vocab) {
        return Err(Error::Argument(format!("target {target} is outside the vocabulary of {vocab}")));
    }
    if !ops::takes(hidden) || !ops::takes(weight) {
        return reference::linear_cross_entropy(hidden, weight, targets);
    }
    let op = LinearCrossEntropy {
        targets: targets.to_vec(),
        precision,
        isa: select::current(),
        wants_gradients: hidden.track_op() || weight.track_op(),
        gradients: Mutex::new(None),
    };
    Ok(hidden.contiguous()?.apply_op2(&weight.contiguous()?, op)?)
}

/// Tokens whose logits exist at a time.
const BLOCK: usize = 384;
/// Rows per task of the softmax.
const TASK_ROWS: usize = 16;

struct LinearCrossEntropy {
    targets: Vec<u32>,
    precision: Precision,
    isa: Isa,
    wants_gradients: bool,
    /// Of hidden and weight for an upstream gradient of 1, from the forward pass to the backward pass.
    gradients: Mutex<Option<[Vec<f32>; 2]>>,
}

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    width: usize,
    vocab: usize,
}

impl LinearCrossEntropy {
    fn counted(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORED).count().max(1)
    }

    /// The loss, and the gradients if they are wanted.
    fn forward(&self, hidden: &[f32], weight: &[f32], sizes: Sizes) -> (f32, Option<[Vec<f32>; 2]>) {
        let Sizes { tokens, width, vocab } = sizes;
        let pack = |operand| PackedWeights::new(self.isa, self.precision, &operand);
        let forward_weight = pack(Operand::rows(weight, vocab, width, width));
        let backward_weight = self.wants_gradients.then(|| pack(Operand::columns(weight, width, vocab, width)));
        let mut gradients = self.wants_gradients.then(|| [vec![0.0; hidden.len()], vec![0.0; weight.len()]]);
        let mut losses = vec![0.0; tokens];
        with_scratch_f32(BLOCK.min(tokens) * vocab, |scratch| {
            for start in (0..tokens).step_by(BLOCK) {
                let rows = BLOCK.min(tokens - start);
                let logits = &mut scratch[..rows * vocab];
                let block = &hidden[start * width..][..rows * width];
                self.product(Operand::rows(block, rows, width, width), &forward_weight, Start::Zero, logits);
                self.softmax(logits, vocab, start, &mut losses[start..start + rows]);
                if let (Some([d_hidden, d_weight]), Some(packed)) = (&mut gradients, &backward_weight) {
                    let logits = &*logits;
                    let into = &mut d_hidden[start * width..][..rows * width];
                    self.product(Operand::rows(logits, rows, vocab, vocab), packed, Start::Zero, into);
                    let by_word = Group {
                        a: Operand::columns(logits, vocab, rows, vocab),
                        b: Operand::columns(block, width, rows, width).into(),
                        start: Start::Output,
                        out_offset: 0,
                        out_stride: width,
                    };
                    gemm(self.isa, self.precision, &[by_word], d_weight);
                }
            }
        });
        ((losses.iter().sum::<f64>() / self.counted() as f64) as f32, gradients)
    }

    fn product(&self, a: Operand<'_>, b: &PackedWeights, start: Start<'_>, out: &mut [f32]) {
        let group = Group { a, b: Weights::Packed(b), start, out_offset: 0, out_stride: b.shape()[0] };
        gemm(self.isa, self.precision, &[group], out);
    }

    /// The loss of each row of logits, which become the gradient of the mean loss if it is wanted.
    fn softmax(&self, logits: &mut [f32], vocab: usize, first_token: usize, losses: &mut [f64]) {
        let rows = losses.len();
        let scale = 1.0 / self.counted() as f32;
        let (logits, losses) = (SharedMut::new(logits), SharedMut::new(losses));
        parallel::for_each_if(rows * vocab, 1 << 15, rows.div_ceil(TASK_ROWS), |task| {
            for row in task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows) {
                // SAFETY: each row belongs to one task.
                let (row_logits, loss) = unsafe { (logits.slice(row * vocab, vocab), one(losses, row)) };
                let target = self.targets[first_token + row];
                if target == IGNORED {
                    row_logits.fill(0.0);
                    *loss = 0.0;
                    continue;
                }
                let at = row_logits[target as usize];
                let (max, sum) = self.isa.vectorize(|| exponentials(row_logits));
                *loss = f64::from(max - at) + f64::from(sum).ln();
                if self.wants_gradients {
                    let factor = scale / sum;
                    self.isa.vectorize(|| row_logits.iter_mut().for_each(|p| *p *= factor));
                    row_logits[target as usize] -= scale;
                }
            }
        });
    }
}

/// # Safety
/// As [`SharedMut::slice`].
unsafe fn one<'a>(values: SharedMut<f64>, index: usize) -> &'a mut f64 {
    // SAFETY: passed on from the caller.
    unsafe { &mut values.slice(index, 1)[0] }
}

/// Replaces a row by the exponentials of its distances from its maximum; returns the maximum and their sum.
#[inline(always)]
fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let max = row_max(row);
    row.iter_mut().for_each(|z| *z = (*z - max).exp_());
    (max, host::sum_by(row.len(), |i| row[i]))
}

impl CustomOp2 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((tokens, width), (vocab, _)) = (xl.shape().dims2()?, wl.shape().dims2()?);
        let (loss, gradients) =
            self.forward(host::elements(x, xl)?, host::elements(w, wl)?, Sizes { tokens, width, vocab });
        *self.gradients.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = gradients;
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self.gradients.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some([mut dx, mut dw]) = kept else {
            candle_core::bail!("linear_cross_entropy can be differentiated once; compute the loss again")
        };
        let upstream = grad.to_scalar::<f32>()?;
        if upstream != 1.0 {
            for values in [&mut dx, &mut dw] {
                self.isa.vectorize(|| values.iter_mut().for_each(|v| *v *= upstream));
            }
        }
        let tensor = |v, like: &Tensor| Tensor::from_vec(v, like.shape(), x.device()).map(Some);
        Ok((tensor(dx, x)?, tensor(dw, w)?))
    }
}
