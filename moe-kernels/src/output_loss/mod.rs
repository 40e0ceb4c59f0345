//! What losses fused with the output layer share: logits of one block of tokens at a time, which the loss turns into their
//! gradients while they are at hand, and an operation that keeps the gradients until the backward pass.

#[cfg(test)]
pub(crate) mod on_parts;

use crate::buffer::with_scratch_f32;
use crate::custom::{Input, SliceOp, Target};
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm, gemm_new};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Precision, Result, parallel};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Tokens whose logits exist at a time.
pub(crate) const BLOCK: usize = 384;
/// Rows per task of a softmax.
const TASK_ROWS: usize = 16;

/// An output layer and what it sees.
pub(crate) struct OutputLayer<'a> {
    pub(crate) isa: Isa,
    pub(crate) precision: Precision,
    /// `[tokens, width]`
    pub(crate) hidden: &'a [f32],
    /// `[vocab, width]`, for the forward pass.
    pub(crate) forward: &'a PackedWeights,
    /// The same transposed, if gradients are wanted.
    pub(crate) backward: Option<&'a PackedWeights>,
}

/// The gradients of hidden states and weight.
pub(crate) type Gradients = Option<[Vec<f32>; 2]>;

/// A weight `[vocab, width]` as the forward pass reads it, and as the backward pass does if gradients are wanted.
pub(crate) fn packed_both_ways(
    isa: Isa,
    precision: Precision,
    weight: &[f32],
    [vocab, width]: [usize; 2],
    wants_gradients: bool,
) -> (PackedWeights, Option<PackedWeights>) {
    let pack = |operand| PackedWeights::new(isa, precision, &operand);
    let backward = wants_gradients.then(|| pack(Operand::columns(weight, width, vocab, width)));
    (pack(Operand::rows(weight, vocab, width, width)), backward)
}

/// `a W^T`
pub(crate) fn product(isa: Isa, a: Operand<'_>, b: &PackedWeights, out: &mut [f32]) {
    let group = Group { a, b: Weights::Packed(b), start: Start::Zero, out_offset: 0, out_stride: b.shape()[0] };
    gemm(isa, b.precision(), &[group], out);
}

impl OutputLayer<'_> {
    /// Calls `turn` with the logits of each block of `tokens` tokens, `[rows, vocab]`; where gradients are wanted it leaves those
    /// of the logits there. Nothing of size `[tokens, vocab]` is ever kept.
    ///
    /// # Errors
    /// Those of `turn`.
    pub(crate) fn each_block(
        &self,
        tokens: usize,
        mut turn: impl FnMut(Range<usize>, &mut [f32]) -> Result<()>,
    ) -> Result<Gradients> {
        let [vocab, width] = self.forward.shape();
        let mut gradients = self.backward.map(|_| [vec![0.0; self.hidden.len()], Vec::new()]);
        with_scratch_f32(BLOCK.min(tokens) * vocab, |scratch| -> Result<()> {
            for start in (0..tokens).step_by(BLOCK) {
                let rows = BLOCK.min(tokens - start);
                let logits = &mut scratch[..rows * vocab];
                let block = &self.hidden[start * width..][..rows * width];
                product(self.isa, Operand::rows(block, rows, width, width), self.forward, logits);
                turn(start..start + rows, logits)?;
                if let (Some([d_hidden, d_weight]), Some(packed)) = (&mut gradients, self.backward) {
                    let logits = &*logits;
                    let into = &mut d_hidden[start * width..][..rows * width];
                    product(self.isa, Operand::rows(logits, rows, vocab, vocab), packed, into);
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
        Ok(gradients)
    }
}

/// Calls `body` with each row of logits and what is kept of it.
pub(crate) fn for_rows<T: Send>(
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

pub(crate) fn scale_by(isa: Isa, values: &mut [f32], factor: f32) {
    vectorize!(isa, (values: &mut [f32], factor: f32) {
        values.iter_mut().for_each(|value| *value *= factor);
    });
}

/// A loss with its gradients, computed before it becomes an operation: an exchange between parts may fail.
pub(crate) struct Computed {
    name: &'static str,
    loss: f32,
    /// Until the backward pass.
    gradients: Mutex<Gradients>,
    isa: Isa,
}

impl Computed {
    pub(crate) fn new(name: &'static str, loss: f32, gradients: Gradients, isa: Isa) -> Self {
        Self { name, loss, gradients: Mutex::new(gradients), isa }
    }
}

impl SliceOp for Computed {
    fn name(&self) -> &'static str {
        self.name
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
            return Err(Error::Argument(format!("{} can be differentiated once; compute the loss again", self.name)));
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
