//! Which experts are kept. Pure.

use super::ExpertUse;
use crate::{Error, Result};
use moe_core::CounterRng;
use serde::{Deserialize, Serialize};

/// What experts are kept for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ranking {
    /// How many rows they get.
    Frequency,
    /// What a row gets from them on average ([`ExpertUse::saliencies`]).
    Saliency,
    /// Nothing: a control.
    Random {
        /// Of the draws.
        seed: u64,
    },
}

/// How many experts are kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Budget {
    /// This share of each layer's, rounded.
    Share(f64),
    /// This share of all layers' together: layers whose experts rank higher keep more. Ranks are relative to the layer's mean.
    ShareOfAll(f64),
    /// So many of each layer.
    Counts(Vec<usize>),
}

impl Budget {
    /// Refuses what layers of these indices and numbers of experts cannot keep, where a token chooses `least`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a share outside of 0 to 1, counts of another number of layers, or a count that a layer does not have or
    /// that is below `least`.
    pub fn check(&self, layers: &[(usize, usize)], least: usize) -> Result<()> {
        let counts = match self {
            Self::Share(share) | Self::ShareOfAll(share) if *share > 0.0 && *share <= 1.0 => return Ok(()),
            Self::Share(share) | Self::ShareOfAll(share) => {
                let reason = format!("the share of experts to keep must be above 0 and at most 1, got {share}");
                return Err(Error::Argument(reason));
            }
            Self::Counts(counts) => counts,
        };
        if counts.len() != layers.len() {
            return Err(Error::Argument(format!(
                "expected a number of experts for each of the {} layers with experts, got {counts:?}",
                layers.len()
            )));
        }
        match counts.iter().zip(layers).find(|(count, (_, experts))| !(least..=*experts).contains(count)) {
            Some((count, (layer, experts))) => Err(Error::Argument(format!(
                "layer {layer} cannot keep {count} of its {experts} experts; a token chooses {least}"
            ))),
            None => Ok(()),
        }
    }
}

/// The experts to keep of each layer, ascending. Each layer keeps at least `least`, which is how many a token chooses.
///
/// # Errors
/// As [`Budget::check`].
pub fn keep(usage: &[ExpertUse], ranking: Ranking, budget: &Budget, least: usize) -> Result<Vec<Vec<usize>>> {
    budget.check(&usage.iter().map(|of| (of.layer, of.rows.len())).collect::<Vec<_>>(), least)?;
    let scores: Vec<Vec<f64>> = usage.iter().map(|of| ranking.scores(of)).collect();
    let counts = match budget {
        Budget::Counts(counts) => counts.clone(),
        Budget::Share(share) => {
            scores.iter().map(|of| ((of.len() as f64 * share).round() as usize).max(least)).collect()
        }
        Budget::ShareOfAll(share) => counts_of_all(&scores, *share, least),
    };
    Ok(scores.iter().zip(counts).map(|(of, count)| best(of, count)).collect())
}

impl Ranking {
    fn scores(self, usage: &ExpertUse) -> Vec<f64> {
        match self {
            Self::Frequency => usage.frequencies(),
            Self::Saliency => usage.saliencies(),
            Self::Random { seed } => {
                let mut rng = CounterRng::new(seed, usage.layer as u64);
                usage.rows.iter().map(|_| rng.uniform_f64()).collect()
            }
        }
    }
}

/// The indices of the `count` highest scores, ascending; of equal ones the first.
fn best(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// How many of each layer are among the best of all.
fn counts_of_all(scores: &[Vec<f64>], share: f64, least: usize) -> Vec<usize> {
    let all: usize = scores.iter().map(Vec::len).sum();
    let mut ranked = Vec::with_capacity(all);
    let mut counts = Vec::with_capacity(scores.len());
    for (layer, of) in scores.iter().enumerate() {
        let mean = of.iter().sum::<f64>() / of.len().max(1) as f64;
        let relative = |score: f64| if mean > 0.0 { score / mean } else { 0.0 };
        let first = best(of, least);
        ranked.extend((0..of.len()).filter(|e| !first.contains(e)).map(|e| (relative(of[e]), layer)));
        counts.push(first.len());
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let left = ((all as f64 * share).round() as usize).saturating_sub(counts.iter().sum());
    ranked.into_iter().take(left).for_each(|(_, layer)| counts[layer] += 1);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage() -> Vec<ExpertUse> {
        vec![
            ExpertUse { layer: 1, rows: vec![10, 0, 30, 10], contributions: vec![30.0, 0.0, 30.0, 5.0] },
            ExpertUse { layer: 3, rows: vec![5, 5], contributions: vec![1.0, 9.0] },
        ]
    }

    #[test]
    fn experts_are_kept_by_what_they_do() {
        let kept = |ranking, budget: Budget| keep(&usage(), ranking, &budget, 1).unwrap();
        assert_eq!(kept(Ranking::Frequency, Budget::Share(0.5)), [vec![0, 2], vec![0]]);
        // By rows 2, by row 0: what a row gets from expert 0 is three times as much.
        assert_eq!(kept(Ranking::Saliency, Budget::Counts(vec![1, 1])), [vec![0], vec![1]]);
        assert_eq!(kept(Ranking::Frequency, Budget::Counts(vec![1, 2])), [vec![2], vec![0, 1]]);
        // Relative to their layers 2 of the first layer and 1 of the second lead.
        assert_eq!(kept(Ranking::Saliency, Budget::ShareOfAll(0.5)), [vec![0, 2], vec![1]]);
        assert_eq!(kept(Ranking::Saliency, Budget::ShareOfAll(1.0)), [vec![0, 1, 2, 3], vec![0, 1]]);
        assert_eq!(kept(Ranking::Saliency, Budget::Share(0.01)), [vec![0], vec![1]]);
    }

    #[test]
    fn random_is_a_function_of_its_seed() {
        let kept = |seed| keep(&usage(), Ranking::Random { seed }, &Budget::Share(0.5), 1).unwrap();
        assert_eq!(kept(1), kept(1));
        assert!((2..20).any(|seed| kept(seed) != kept(1)));
    }

    #[test]
    fn impossible_budgets_are_refused() {
        let refused = |budget, least| keep(&usage(), Ranking::Frequency, &budget, least).unwrap_err().to_string();
        for (budget, least, part) in [
            (Budget::Share(0.0), 1, "above 0"),
            (Budget::ShareOfAll(1.1), 1, "at most 1"),
            (Budget::Counts(vec![2]), 1, "each of the 2 layers"),
            (Budget::Counts(vec![5, 1]), 1, "layer 1 cannot keep 5 of its 4"),
            (Budget::Counts(vec![2, 1]), 2, "layer 3 cannot keep 1 of its 2"),
        ] {
            let text = refused(budget, least);
            assert!(text.contains(part), "{text}");
        }
    }

    /// An expert that calibration has never seen has finite figures.
    #[test]
    fn unseen_experts_have_finite_figures() {
        let none = ExpertUse { layer: 0, rows: vec![0; 3], contributions: vec![0.0; 3] };
        assert!(none.saliencies().iter().chain(&none.frequencies()).all(|x| *x == 0.0));
        assert_eq!(keep(&[none], Ranking::Saliency, &Budget::Share(0.5), 1).unwrap(), [vec![0, 1]]);
    }
}
