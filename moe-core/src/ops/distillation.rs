//! What a student learns from a teacher beside its text: [`SoftTargets`], and how far they count ([`Distillation`]). Plain data.

use super::{PartStatistics, VocabularyPart, check_targets};
use crate::{Error, Result, Weight};
use candle_core::Tensor;

/// How far a student follows its teacher.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// What the divergence from the teacher counts beside the cross-entropy: `alpha` of the paper.
    pub weight: f64,
    /// What logits of both are divided by before their softmax, `T`; the divergence counts `T^2` times, so that its gradient has
    /// one size at every temperature.
    pub temperature: f64,
}

impl Default for Distillation {
    /// Megatron-DeepSpeed's: both 1.
    fn default() -> Self {
        Self { weight: 1.0, temperature: 1.0 }
    }
}

impl Distillation {
    /// Refuses values that mean nothing.
    ///
    /// # Errors
    /// [`Error::Input`] naming the value.
    pub fn validate(&self) -> Result<()> {
        let Self { weight, temperature } = *self;
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(Error::Input(format!("the weight of the divergence must be 0 or more, got {weight}")));
        }
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::Input(format!("the temperature must be above 0, got {temperature}")));
        }
        Ok(())
    }

    /// Factor of the mean divergence in the loss.
    pub fn factor(&self) -> f64 {
        self.weight * self.temperature * self.temperature
    }
}

/// What a teacher says of each token.
#[derive(Debug, Clone, Copy)]
pub enum SoftTargets<'a> {
    /// What its output layer makes of its hidden states, which have no gradient: `hidden` `[tokens, d_model of the teacher]`,
    /// `weight` `[vocab_size, d_model of the teacher]`, or as many entries of it as there are of the student's.
    Layer {
        /// What the teacher's output layer sees.
        hidden: &'a Tensor,
        /// The teacher's output layer.
        weight: &'a Weight,
    },
    /// The probabilities of some entries, at the loss's temperature. What is left of a token's probability is that of all its
    /// other entries together: the divergence is between distributions over the named entries and one more, so it is at most
    /// that of the whole distributions.
    TopK {
        /// Entries of each token.
        k: usize,
        /// `[tokens, k]`, different for a token
        ids: &'a [u32],
        /// `[tokens, k]`, of sum 1 at most
        probs: &'a [f32],
    },
}

/// A student's side of a distilled loss.
#[derive(Debug, Clone, Copy)]
pub struct StudentOutput<'a> {
    /// `[tokens, d_model]`
    pub hidden: &'a Tensor,
    /// `[vocab_size, d_model]`, or as many rows of it as `part` says
    pub weight: &'a Weight,
    /// `[tokens]`; where a target does not count ([`super::IGNORED`]), the teacher does not either
    pub targets: &'a [u32],
    /// The vocabulary's part, if not all of it is here.
    pub part: Option<&'a VocabularyPart>,
}

/// A distilled loss and what it is made of.
#[derive(Debug, Clone)]
pub struct DistilledLoss {
    /// Cross-entropy plus the divergence times [`Distillation::factor`]: a scalar, nats per counted token.
    pub loss: Tensor,
    /// The cross-entropy.
    pub cross_entropy: f64,
    /// The divergence as it enters the sum.
    pub kd: f64,
}

impl StudentOutput<'_> {
    /// Refuses sizes that do not fit each other.
    ///
    /// # Errors
    /// [`Error::Input`] naming the sizes, the target or the entry.
    pub fn check(&self, soft: &SoftTargets<'_>) -> Result<()> {
        let (hidden, weight) = (self.hidden.dims(), self.weight.dims());
        match self.part {
            Some(part) => part.check(hidden, weight, self.targets)?,
            None => check_targets(hidden, weight, self.targets)?,
        }
        let (tokens, held) = (self.targets.len(), weight[0]);
        match soft {
            SoftTargets::Layer { hidden, weight } => match (hidden.dims(), weight.dims()) {
                (&[rows, width], &[entries, of]) if rows == tokens && width == of && entries == held => Ok(()),
                (hidden, weight) => Err(Error::Input(format!(
                    "the teacher of {tokens} tokens and {held} entries of a vocabulary needs hidden states [{tokens}, width] and a \
                     weight [{held}, width], got {hidden:?} and {weight:?}"
                ))),
            },
            SoftTargets::TopK { k, ids, probs } => {
                let size = self.part.map_or(held, |part| part.size);
                if *k == 0 || *k > size || ids.len() != tokens * k || probs.len() != ids.len() {
                    return Err(Error::Input(format!(
                        "the teacher's {k} entries for each of {tokens} tokens need as many ids and probabilities, at least one \
                         and at most {size} a token, got {} and {}",
                        ids.len(),
                        probs.len()
                    )));
                }
                match ids.iter().find(|&&id| id as usize >= size) {
                    Some(id) => {
                        Err(Error::Input(format!("the teacher's entry {id} is outside the vocabulary of {size}")))
                    }
                    None => Ok(()),
                }
            }
        }
    }

    /// Where an entry of the vocabulary is among those that are here.
    pub fn local(&self, id: u32) -> Option<usize> {
        self.part.map_or(Some(id as usize), |part| part.local(id))
    }

    /// What is left of a token's probability for entries that the teacher does not name, given those that it does.
    pub fn rest(&self, named: &[f32]) -> f64 {
        let size = self.part.map_or(self.weight.dims()[0], |part| part.size);
        // Where all are named, what rounding leaves belongs to none.
        let sum: f64 = named.iter().map(|&p| f64::from(p)).sum();
        if named.len() < size { (1.0 - sum).max(0.0) } else { 0.0 }
    }

    /// Statistics over all parts, from those of what is here: of each token alike.
    ///
    /// # Errors
    /// What the exchange returns.
    pub fn merged(&self, own: Vec<PartStatistics>) -> Result<Vec<PartStatistics>> {
        match self.part {
            Some(part) => PartStatistics::merged(&part.parts.gather(&own)?, own.len()),
            None => Ok(own),
        }
    }
}
