//! Softmax cross-entropy over the vocabulary, fused with the output layer: logits exist for one block of tokens at a time.
//!
//! With gradients, those of the hidden states and of the output layer are computed in the forward pass, while a block's
//! logits are at hand; the backward pass scales them. Nothing of size `[tokens, vocab_size]` is ever kept.

#[cfg(test)]
mod tests;

pub use moe_core::ops::IGNORED;

use crate::attention::row_max;
use crate::buffer::with_scratch_f32;
use crate::custom::{self, Input, SliceOp, Target, with_inputs};
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Precision, Result, parallel, select};
use candle_core::Tensor;
use moe_core::ops::check_targets;
use moe_core::ops::host::{self, Real};
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
    let op = LinearCrossEntropy {
        targets: targets.to_vec(),
        precision,
        isa: select::current(),
        wants_gradients: tape::tracks(&[hidden, weight]),
        gradients: Mutex::new(None),
    };
    custom::apply(op, &[hidden, weight])
}

/// [`linear_cross_entropy`] without gradients, with a weight packed before.
///
/// # Errors
/// As there.
pub fn linear_cross_entropy_packed(hidden: &Tensor, weight: &PackedWeights, targets: &[u32]) -> Result<Tensor> {
    let [vocab, width] = weight.shape();
    check_targets(hidden.dims(), &[vocab, width], targets)?;
    let op = LinearCrossEntropy {
        targets: targets.to_vec(),
        precision: weight.precision(),
        isa: select::current(),
        wants_gradients: false,
        gradients: Mutex::new(None),
    };
    let sizes = Sizes { tokens: targets.len(), width, vocab };
    let loss = with_inputs("linear_cross_entropy", &[hidden], |inputs| {
        op.loss_packed(inputs[0].values, weight, None, sizes).0
    })?;
    Ok(Tensor::new(loss, hidden.device())?)
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
    fn loss(&self, hidden: &[f32], weight: &[f32], sizes: Sizes) -> (f32, Option<[Vec<f32>; 2]>) {
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
    ) -> (f32, Option<[Vec<f32>; 2]>) {
        let Sizes { tokens, width, vocab } = sizes;
        let mut gradients = self.wants_gradients.then(|| [vec![0.0; hidden.len()], vec![0.0; vocab * width]]);
        let mut losses = vec![0.0; tokens];
        with_scratch_f32(BLOCK.min(tokens) * vocab, |scratch| {
            for start in (0..tokens).step_by(BLOCK) {
                let rows = BLOCK.min(tokens - start);
                let logits = &mut scratch[..rows * vocab];
                let block = &hidden[start * width..][..rows * width];
                self.product(Operand::rows(block, rows, width, width), forward_weight, Start::Zero, logits);
                self.softmax(logits, vocab, start, &mut losses[start..start + rows]);
                if let (Some([d_hidden, d_weight]), Some(packed)) = (&mut gradients, backward_weight) {
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
                let (max, sum) =
                    vectorize!(self.isa, (row_logits: &mut [f32]) -> (f32, f32) { exponentials(row_logits) });
                *loss = f64::from(max - at) + f64::from(sum).ln();
                if self.wants_gradients {
                    let factor = scale / sum;
                    scale_by(self.isa, row_logits, factor);
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

impl SliceOp for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (hidden, weight) = (inputs[0], inputs[1]);
        let sizes = Sizes { tokens: hidden.rows(), width: hidden.width(), vocab: weight.rows() };
        let (loss, gradients) = self.loss(hidden.values, weight.values, sizes);
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = gradients;
        (vec![loss], Vec::new())
    }

    fn backward(&self, _: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target<'_>]) -> Result<()> {
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
