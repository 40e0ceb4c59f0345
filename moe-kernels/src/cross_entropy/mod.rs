//! Softmax cross-entropy over the vocabulary, fused with the output layer: logits exist for one block of tokens at a time.
//!
//! With gradients, those of the hidden states and of the output layer are computed in the forward pass, while a block's
//! logits are at hand; the backward pass scales them. Nothing of size `[tokens, vocab_size]` is ever kept.
//!
//! Of a vocabulary in parts each part computes its own logits, and the parts hear of each other block by block
//! ([`moe_core::ops::VocabularyParts`]); who they are is not known here.

#[cfg(test)]
mod parts_tests;
#[cfg(test)]
mod tests;

pub use moe_core::ops::IGNORED;

use crate::attention::row_max;
use crate::buffer::with_scratch_f32;
use crate::custom::{self, Input, SliceOp, Target, with_inputs};
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm, gemm_new};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Precision, Result, parallel, select};
use candle_core::Tensor;
use moe_core::ops::host::{self, Real};
use moe_core::ops::{PartStatistics, VocabularyPart, check_targets};
use moe_core::tape;
use std::sync::{Mutex, PoisonError};

/// Mean over the counted targets of `-log softmax(hidden weight^T)[target]`, in nats.
///
/// # Shapes
/// `hidden` `[tokens, d_model]`, `weight` `[vocab_size, d_model]`, `targets` `[tokens]` ([`IGNORED`] entries do not count);
/// returns a scalar, 0 if no target counts
///
/// # Errors
/// If the sizes differ or a target is outside the vocabulary.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &[u32], precision: Precision) -> Result<Tensor> {
    check_targets(hidden.dims(), weight.dims(), targets)?;
    LinearCrossEntropy::new(targets, precision, None).of_tensors(hidden, weight)
}

/// [`linear_cross_entropy`] without gradients, with a weight packed before.
///
/// # Errors
/// As there.
pub fn linear_cross_entropy_packed(hidden: &Tensor, weight: &PackedWeights, targets: &[u32]) -> Result<Tensor> {
    check_targets(hidden.dims(), &weight.shape(), targets)?;
    LinearCrossEntropy::new(targets, weight.precision(), None).of_packed(hidden, weight)
}

/// [`linear_cross_entropy`] over a vocabulary of which `part` is here: the same loss on every part; gradients of this part of the
/// weight, and of hidden through this part's logits, to be summed over the parts. With one part the bits are those of
/// [`linear_cross_entropy`].
///
/// The parts hear of each other once per block of tokens, 24 bytes a token, between a block's logits and their gradients. One
/// exchange for all tokens would have to compute the logits twice, a third more of the products, to save a few waits as short as
/// a message. It cannot deadlock: blocks are a function of the number of tokens, and the exchanges happen on the calling thread
/// outside of every kernel, in the same order on all parts.
///
/// # Shapes
/// `hidden` `[tokens, d_model]`, `weight` `[held, d_model]`, `targets` `[tokens]`, ids of the whole vocabulary; returns a scalar
///
/// # Errors
/// As there; what the exchange returns.
pub fn linear_cross_entropy_part(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    part: &VocabularyPart,
    precision: Precision,
) -> Result<Tensor> {
    part.check(hidden.dims(), weight.dims(), targets)?;
    LinearCrossEntropy::new(targets, precision, Some(part)).of_tensors(hidden, weight)
}

/// [`linear_cross_entropy_part`] without gradients, with a weight packed before.
///
/// # Errors
/// As there.
pub fn linear_cross_entropy_part_packed(
    hidden: &Tensor,
    weight: &PackedWeights,
    targets: &[u32],
    part: &VocabularyPart,
) -> Result<Tensor> {
    part.check(hidden.dims(), &weight.shape(), targets)?;
    LinearCrossEntropy::new(targets, weight.precision(), Some(part)).of_packed(hidden, weight)
}

/// Tokens whose logits exist at a time.
const BLOCK: usize = 384;
/// Rows per task of the softmax.
const TASK_ROWS: usize = 16;

/// How a loss is computed.
struct LinearCrossEntropy<'a> {
    targets: &'a [u32],
    precision: Precision,
    isa: Isa,
    wants_gradients: bool,
    /// The vocabulary's part, if not all of it is here.
    part: Option<&'a VocabularyPart>,
}

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    width: usize,
    /// Entries that are here.
    vocab: usize,
}

/// The loss, and the gradients of hidden and weight for an upstream gradient of 1 if they are wanted.
type Loss = (f32, Option<[Vec<f32>; 2]>);

impl<'a> LinearCrossEntropy<'a> {
    fn new(targets: &'a [u32], precision: Precision, part: Option<&'a VocabularyPart>) -> Self {
        Self { targets, precision, isa: select::current(), wants_gradients: false, part }
    }

    /// As an operation of sizes that have been checked.
    fn of_tensors(self, hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let own = Self { wants_gradients: tape::tracks(&[hidden, weight]), ..self };
        let (loss, gradients) = with_inputs(NAME, &[hidden, weight], |inputs| {
            let (hidden, weight) = (inputs[0], inputs[1]);
            let sizes = Sizes { tokens: hidden.rows(), width: hidden.width(), vocab: weight.rows() };
            own.loss(hidden.values, weight.values, sizes)
        })??;
        custom::apply(Computed { loss, gradients: Mutex::new(gradients), isa: own.isa }, &[hidden, weight])
    }

    /// Without gradients.
    fn of_packed(&self, hidden: &Tensor, weight: &PackedWeights) -> Result<Tensor> {
        let [vocab, width] = weight.shape();
        let sizes = Sizes { tokens: self.targets.len(), width, vocab };
        let (loss, _) =
            with_inputs(NAME, &[hidden], |inputs| self.loss_packed(inputs[0].values, weight, None, sizes))??;
        Ok(Tensor::new(loss, hidden.device())?)
    }

    fn counted(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORED).count().max(1)
    }

    /// Where a target is among the entries that are here.
    fn local(&self, target: u32) -> Option<usize> {
        self.part.map_or(Some(target as usize), |part| part.local(target))
    }

    fn loss(&self, hidden: &[f32], weight: &[f32], sizes: Sizes) -> Result<Loss> {
        let Sizes { width, vocab, .. } = sizes;
        let pack = |operand| PackedWeights::new(self.isa, self.precision, &operand);
        let forward_weight = pack(Operand::rows(weight, vocab, width, width));
        let backward_weight = self.wants_gradients.then(|| pack(Operand::columns(weight, width, vocab, width)));
        self.loss_packed(hidden, &forward_weight, backward_weight.as_ref(), sizes)
    }

    /// The same with the weight packed for the forward pass, and transposed for the backward pass if gradients are wanted.
    fn loss_packed(
        &self,
        hidden: &[f32],
        forward_weight: &PackedWeights,
        backward_weight: Option<&PackedWeights>,
        sizes: Sizes,
    ) -> Result<Loss> {
        let Sizes { tokens, width, vocab } = sizes;
        let mut gradients = self.wants_gradients.then(|| [vec![0.0; hidden.len()], Vec::new()]);
        let mut losses = vec![0.0; tokens];
        with_scratch_f32(BLOCK.min(tokens) * vocab, |scratch| -> Result<()> {
            for start in (0..tokens).step_by(BLOCK) {
                let rows = BLOCK.min(tokens - start);
                let logits = &mut scratch[..rows * vocab];
                let block = &hidden[start * width..][..rows * width];
                self.product(Operand::rows(block, rows, width, width), forward_weight, Start::Zero, logits);
                self.softmax(logits, vocab, start, &mut losses[start..start + rows])?;
                if let (Some([d_hidden, d_weight]), Some(packed)) = (&mut gradients, backward_weight) {
                    let logits = &*logits;
                    let into = &mut d_hidden[start * width..][..rows * width];
                    self.product(Operand::rows(logits, rows, vocab, vocab), packed, Start::Zero, into);
                    let by_word = Group {
                        a: Operand::columns(logits, vocab, rows, vocab),
                        b: Operand::columns(block, width, rows, width).into(),
                        start: if start == 0 { Start::Zero } else { Start::Output },
                        out_offset: 0,
                        out_stride: width,
                    };
                    // A vocabulary's worth of zeros would be written on one thread while the others wait.
                    if start == 0 {
                        *d_weight = gemm_new(self.isa, self.precision, &[by_word], vocab * width);
                    } else {
                        gemm(self.isa, self.precision, &[by_word], d_weight);
                    }
                }
            }
            Ok(())
        })?;
        if let Some([_, d_weight]) = &mut gradients {
            d_weight.resize(vocab * width, 0.0); // nothing has been written without tokens
        }
        Ok(((losses.iter().sum::<f64>() / self.counted() as f64) as f32, gradients))
    }

    fn product(&self, a: Operand<'_>, b: &PackedWeights, start: Start<'_>, out: &mut [f32]) {
        let group = Group { a, b: Weights::Packed(b), start, out_offset: 0, out_stride: b.shape()[0] };
        gemm(self.isa, self.precision, &[group], out);
    }

    /// The loss of each row of logits, which become the gradient of the mean loss if it is wanted.
    ///
    /// # Errors
    /// What the exchange with other parts returns.
    fn softmax(&self, logits: &mut [f32], vocab: usize, first_token: usize, losses: &mut [f64]) -> Result<()> {
        let targets = &self.targets[first_token..][..losses.len()];
        let scale = 1.0 / self.counted() as f32;
        let Some(part) = self.part else {
            // All in one sweep, while a row is in the cache.
            for_rows(logits, vocab, losses, |row, logits, loss| {
                let all = self.statistics(logits, targets[row]);
                *loss = self.finish(logits, targets[row], scale, [all, all]);
            });
            return Ok(());
        };
        let mut own = vec![PartStatistics::IGNORED; losses.len()];
        for_rows(logits, vocab, &mut own, |row, logits, own| *own = self.statistics(logits, targets[row]));
        let all = PartStatistics::merged(&part.parts.gather(&own)?, own.len())?;
        for_rows(logits, vocab, losses, |row, logits, loss| {
            *loss = self.finish(logits, targets[row], scale, [own[row], all[row]]);
        });
        Ok(())
    }

    /// Of a row of logits, which become the exponentials of their distances from their maximum.
    fn statistics(&self, logits: &mut [f32], target: u32) -> PartStatistics {
        if target == IGNORED {
            return PartStatistics::IGNORED;
        }
        let target = self.local(target).map_or(0.0, |at| logits[at]);
        let (max, sum) = vectorize!(self.isa, (logits: &mut [f32]) -> (f32, f32) { exponentials(logits) });
        PartStatistics { max: max.into(), sum: sum.into(), target: target.into() }
    }

    /// The loss of a row of exponentials, which become the gradient times `scale` if it is wanted, given the statistics of what is
    /// here and of all parts.
    fn finish(&self, exponentials: &mut [f32], target: u32, scale: f32, [own, all]: [PartStatistics; 2]) -> f64 {
        if target == IGNORED {
            exponentials.fill(0.0);
            return 0.0;
        }
        if self.wants_gradients {
            // The exponent is 0 where all is here, and the factor what it is without parts.
            scale_by(self.isa, exponentials, (own.max - all.max).exp() as f32 * scale / all.sum as f32);
            if let Some(at) = self.local(target) {
                exponentials[at] -= scale;
            }
        }
        f64::from(all.max as f32 - all.target as f32) + all.sum.ln()
    }
}

/// Calls `body` with each row of logits and what is kept of it.
fn for_rows<T: Send>(
    logits: &mut [f32],
    vocab: usize,
    kept: &mut [T],
    body: impl Fn(usize, &mut [f32], &mut T) + Sync,
) {
    let rows = kept.len();
    let (logits, kept) = (SharedMut::new(logits), SharedMut::new(kept));
    parallel::for_each_if(rows * vocab, 1 << 15, rows.div_ceil(TASK_ROWS), |task| {
        for row in task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows) {
            // SAFETY: each row belongs to one task.
            let (logits, kept) = unsafe { (logits.slice(row * vocab, vocab), one(kept, row)) };
            body(row, logits, kept);
        }
    });
}

/// # Safety
/// As [`SharedMut::slice`].
unsafe fn one<'a, T>(values: SharedMut<T>, index: usize) -> &'a mut T {
    // SAFETY: passed on from the caller.
    unsafe { &mut values.slice(index, 1)[0] }
}

fn scale_by(isa: Isa, values: &mut [f32], factor: f32) {
    vectorize!(isa, (values: &mut [f32], factor: f32) {
        values.iter_mut().for_each(|value| *value *= factor);
    });
}

/// Replaces a row by the exponentials of its distances from its maximum; returns the maximum and their sum.
#[inline(always)]
fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let max = row_max(row);
    row.iter_mut().for_each(|z| *z = (*z - max).exp_());
    (max, host::sum_by(row.len(), |i| row[i]))
}

const NAME: &str = "linear_cross_entropy";

/// A loss with its gradients, computed before it becomes an operation: an exchange between parts may fail.
struct Computed {
    loss: f32,
    /// Until the backward pass.
    gradients: Mutex<Option<[Vec<f32>; 2]>>,
    isa: Isa,
}

impl SliceOp for Computed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn forward(&self, _: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        (vec![self.loss], Vec::new())
    }

    fn backward(&self, _: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let kept = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut gradients) = kept else {
            return Err(Error::Argument(
                "linear_cross_entropy can be differentiated once; compute the loss again".into(),
            ));
        };
        let upstream = grad[0];
        if upstream != 1.0 {
            for values in &mut gradients {
                scale_by(self.isa, values, upstream);
            }
        }
        to.iter_mut().zip(gradients).for_each(|(to, gradient)| to.bring(|| gradient));
        Ok(())
    }
}
