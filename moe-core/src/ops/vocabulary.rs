//! A vocabulary in parts: what a part says of a token, and how the parts' words become one softmax. Knows neither who holds the
//! parts nor how they hear of each other.

use crate::{Error, Result};
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

/// What some entries of a vocabulary say of one token. In f64, so that a part's f32 stays what it is and the parts of a reference
/// in f64 lose nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PartStatistics {
    /// The largest logit.
    pub max: f64,
    /// Sum of the exponentials of the logits' distances from `max`.
    pub sum: f64,
    /// The target's logit; 0 where these entries do not have it.
    pub target: f64,
}

impl PartStatistics {
    /// Of a token whose target does not count.
    pub const IGNORED: Self = Self { max: 0.0, sum: 1.0, target: 0.0 };

    /// Of the entries of `self` and `next` together, in this order.
    fn and(self, next: Self) -> Self {
        let max = if self.max > next.max { self.max } else { next.max };
        let of = |part: Self| part.sum * (part.max - max).exp();
        Self { max, sum: of(self) + of(next), target: self.target + next.target }
    }

    /// Of each of `tokens` tokens, from those of all parts, in the parts' order: the bits depend on nothing else, and those of a
    /// part alone stay.
    ///
    /// # Errors
    /// [`Error::Input`] if a part says something of another number of tokens, or there is none.
    pub fn merged(parts: &[Vec<Self>], tokens: usize) -> Result<Vec<Self>> {
        if let Some(index) = parts.iter().position(|part| part.len() != tokens) {
            let got = parts[index].len();
            return Err(Error::Input(format!(
                "part {index} of the vocabulary has statistics of {got} tokens, not {tokens}"
            )));
        }
        let Some((first, rest)) = parts.split_first() else {
            return Err(Error::Input("a vocabulary needs at least one part, got none".into()));
        };
        Ok((0..tokens).map(|t| rest.iter().fold(first[t], |all, part| all.and(part[t]))).collect())
    }
}

/// How the parts of a vocabulary hear of each other.
pub trait VocabularyParts: Debug + Send + Sync {
    /// The statistics of every part about some tokens, in the parts' order, `own` among them. Every part calls it as often, with
    /// the same tokens.
    ///
    /// # Errors
    /// If the others cannot be heard.
    fn gather(&self, own: &[PartStatistics]) -> Result<Vec<Vec<PartStatistics>>>;
}

/// One part of a vocabulary.
#[derive(Debug, Clone)]
pub struct VocabularyPart {
    /// The entries whose rows of the output matrix are here.
    pub held: Range<usize>,
    /// Entries of all parts.
    pub size: usize,
    /// The other parts, and this one among them.
    pub parts: Arc<dyn VocabularyParts>,
}

impl VocabularyPart {
    /// Where a target is among the entries held.
    pub fn local(&self, target: u32) -> Option<usize> {
        self.held.contains(&(target as usize)).then(|| target as usize - self.held.start)
    }

    /// Refuses a weight `[held, d_model]` or targets that do not fit.
    ///
    /// # Errors
    /// [`Error::Input`] naming the sizes or the target.
    pub fn check(&self, hidden: &[usize], weight: &[usize], targets: &[u32]) -> Result<()> {
        let Range { start, end } = self.held;
        let fits = start <= end && end <= self.size && weight.first() == Some(&(end - start));
        match weight {
            &[_, width] if fits => super::check_targets(hidden, &[self.size, width], targets),
            _ => Err(Error::Input(format!(
                "entries {start}..{end} of a vocabulary of {} need a weight of as many rows, got {weight:?}",
                self.size
            ))),
        }
    }
}
