//! [`LossOps`]: the loss of a language model.

use super::{Distillation, DistilledLoss, SoftTargets, StudentOutput, VocabularyPart, WeightOps};
use crate::{Error, Result, Weight};
use candle_core::Tensor;

/// A target that does not count.
pub const IGNORED: u32 = u32::MAX;

/// The output layer together with its loss.
pub trait LossOps: WeightOps {
    /// Mean over the counted targets of `-log softmax(hidden weight^T)[target]`, in nats; 0 if no target counts.
    ///
    /// # Shapes
    /// `hidden` `[tokens, d_model]`, `weight` `[vocab_size, d_model]`, `targets` `[tokens]` ([`IGNORED`] entries do not
    /// count); returns a scalar
    ///
    /// # Errors
    /// If the sizes differ or a target is outside the vocabulary.
    fn linear_cross_entropy(&self, hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<Tensor>;

    /// [`LossOps::linear_cross_entropy`] where only `part` of the vocabulary is here: the same loss on every part, and gradients
    /// through this part's logits alone. Those of `hidden` are still to be summed over the parts, by whoever split them.
    ///
    /// Every part has the same tokens and calls it alike; without tokens no part hears of another.
    ///
    /// # Shapes
    /// `hidden` `[tokens, d_model]`, `weight` `[held, d_model]`, `targets` `[tokens]`, ids of the whole vocabulary; returns a
    /// scalar
    ///
    /// # Errors
    /// As there; what `part` returns.
    fn linear_cross_entropy_part(
        &self,
        hidden: &Tensor,
        weight: &Weight,
        targets: &[u32],
        part: &VocabularyPart,
    ) -> Result<Tensor>;

    /// The cross-entropy of a student plus its divergence from what a teacher says, `KL(teacher || student)`, both means over the
    /// counted targets. The teacher gets no gradient.
    ///
    /// Where the student's output layer is a part of one, so is the teacher's, of the same entries, and all is as in
    /// [`LossOps::linear_cross_entropy_part`].
    ///
    /// # Errors
    /// If the sizes differ, a target or an entry is outside the vocabulary, or `how` is not valid; what the parts return.
    ///
    /// # Source
    /// Paper section 4.2, equation 1 (`L + alpha L_KD`); the temperature as in Megatron-DeepSpeed's `calculate_mos_loss`. Differs:
    /// the divergence is masked like the cross-entropy.
    fn linear_distillation(
        &self,
        student: StudentOutput<'_>,
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> Result<DistilledLoss>;
}

/// Refuses targets that do not fit.
///
/// # Errors
/// [`Error::Input`] naming the sizes or the target.
pub fn check_targets(hidden: &[usize], weight: &[usize], targets: &[u32]) -> Result<()> {
    let (&[tokens, width], &[vocab, weight_width]) = (hidden, weight) else {
        return Err(Error::Input(format!("hidden {hidden:?} and weight {weight:?} must have two dimensions each")));
    };
    if targets.len() != tokens || width != weight_width {
        return Err(Error::Input(format!(
            "hidden [{tokens}, {width}] needs a weight of its width and {tokens} targets, got [{vocab}, {weight_width}] \
             and {}",
            targets.len()
        )));
    }
    match targets.iter().find(|&&t| t != IGNORED && t as usize >= vocab) {
        Some(target) => Err(Error::Input(format!("target {target} is outside the vocabulary of {vocab}"))),
        None => Ok(()),
    }
}
