//! Means, perplexities and their standard errors. Pure.

use serde::Serialize;

/// What a task is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of items whose likeliest choice is the right one, or whose continuation is greedy at every token.
    Acc,
    /// Share of items whose choice of the greatest log-likelihood per character is the right one.
    AccNorm,
    /// Share of items answered with exactly an accepted answer.
    ExactMatch,
    /// Exponential of the mean negative log-likelihood of an item.
    Perplexity,
}

impl Metric {
    /// As lm-eval writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::ExactMatch => "exact_match",
            Self::Perplexity => "perplexity",
        }
    }

    /// From the values of the items: log-likelihoods for [`Metric::Perplexity`], 0 or 1 for the others.
    pub fn estimate(self, values: &[f64]) -> Estimate {
        let mean = Estimate::mean(values);
        match self {
            Self::Perplexity => {
                let value = (-mean.value).exp();
                Estimate { value, stderr: mean.stderr.map(|stderr| stderr * value) }
            }
            Self::Acc | Self::AccNorm | Self::ExactMatch => mean,
        }
    }
}

/// A value with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The value; NaN of no items.
    pub value: f64,
    /// Its standard error over the items: of a mean the sample deviation over the root of their number, of a perplexity that
    /// of the mean in its exponent times the perplexity (lm-eval resamples instead). `None` for fewer than two items.
    pub stderr: Option<f64>,
}

impl Estimate {
    fn mean(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let value = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|x| (x - value).powi(2)).sum();
        let stderr = (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt());
        Self { value, stderr }
    }
}

/// The index of the greatest value, the first among equals.
pub(super) fn argmax(values: &[f64]) -> usize {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best }).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_of_three_right_of_four() {
        let acc = Metric::Acc.estimate(&[1.0, 0.0, 1.0, 1.0]);
        assert_eq!(acc.value, 0.75);
        // Squares 0.0625 * 3 + 0.5625 = 0.75; 0.75 / 3 / 4 = 0.0625.
        assert_eq!(acc.stderr, Some(0.25));
        assert_eq!(Metric::Acc.estimate(&[1.0]), Estimate { value: 1.0, stderr: None });
    }

    #[test]
    fn perplexity_of_two_items() {
        let got = Metric::Perplexity.estimate(&[-(2f64.ln()), -(8f64.ln())]);
        assert!((got.value - 4.0).abs() < 1e-12);
        // The exponent is ln 4 with the standard error ln 2.
        assert!((got.stderr.unwrap() - 4.0 * 2f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn the_first_wins_among_equals() {
        assert_eq!(argmax(&[-3.0, -1.0, -1.0]), 1);
        assert_eq!(argmax(&[f64::NEG_INFINITY, -1e300]), 1);
    }
}
