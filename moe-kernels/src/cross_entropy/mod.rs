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
use crate::custom::{self, with_inputs};
use crate::gemm::PackedWeights;
use crate::output_loss::{Computed, Gradients, OutputLayer, for_rows, packed_both_ways, scale_by};
use crate::select::vectorize;
use crate::{Isa, Precision, Result, select};
use candle_core::Tensor;
use moe_core::ops::host::{self, Real};
use moe_core::ops::{PartStatistics, VocabularyPart, check_targets};
use moe_core::tape;

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

/// How a loss is computed.
struct LinearCrossEntropy<'a> {
    targets: &'a [u32],
    precision: Precision,
    isa: Isa,
    wants_gradients: bool,
    /// The vocabulary's part, if not all of it is here.
    part: Option<&'a VocabularyPart>,
}

impl<'a> LinearCrossEntropy<'a> {
    fn new(targets: &'a [u32], precision: Precision, part: Option<&'a VocabularyPart>) -> Self {
        Self { targets, precision, isa: select::current(), wants_gradients: false, part }
    }

    /// As an operation of sizes that have been checked.
    fn of_tensors(self, hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let own = Self { wants_gradients: tape::tracks(&[hidden, weight]), ..self };
        let (loss, gradients) = with_inputs(NAME, &[hidden, weight], |inputs| {
            let [hidden, weight] = [inputs[0], inputs[1]];
            let sizes = [weight.rows(), weight.width()];
            let (forward, backward) =
                packed_both_ways(own.isa, own.precision, weight.values, sizes, own.wants_gradients);
            own.loss(hidden.values, &forward, backward.as_ref())
        })??;
        custom::apply(Computed::new(NAME, loss, gradients, own.isa), &[hidden, weight])
    }

    /// Without gradients.
    fn of_packed(&self, hidden: &Tensor, weight: &PackedWeights) -> Result<Tensor> {
        let (loss, _) = with_inputs(NAME, &[hidden], |inputs| self.loss(inputs[0].values, weight, None))??;
        Ok(Tensor::new(loss, hidden.device())?)
    }

    fn counted(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORED).count().max(1)
    }

    /// Where a target is among the entries that are here.
    fn local(&self, target: u32) -> Option<usize> {
        self.part.map_or(Some(target as usize), |part| part.local(target))
    }

    /// With the weight packed for the forward pass, and transposed for the backward pass if gradients are wanted.
    fn loss(
        &self,
        hidden: &[f32],
        forward: &PackedWeights,
        backward: Option<&PackedWeights>,
    ) -> Result<(f32, Gradients)> {
        let [vocab, _] = forward.shape();
        let mut losses = vec![0.0; self.targets.len()];
        let layer = OutputLayer { isa: self.isa, precision: self.precision, hidden, forward, backward };
        let gradients = layer.each_block(losses.len(), |tokens, logits| {
            self.softmax(logits, vocab, tokens.start, &mut losses[tokens])
        })?;
        Ok(((losses.iter().sum::<f64>() / self.counted() as f64) as f32, gradients))
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

/// Replaces a row by the exponentials of its distances from its maximum; returns the maximum and their sum.
#[inline(always)]
fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let max = row_max(row);
    row.iter_mut().for_each(|z| *z = (*z - max).exp_());
    (max, host::sum_by(row.len(), |i| row[i]))
}

const NAME: &str = "linear_cross_entropy";
