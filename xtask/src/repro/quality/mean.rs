//! Means over seeds and how sure they are; differences seed by seed, in which what both owe to the seed (data order, initial
//! draws) falls away. Pure.

/// A mean and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Mean {
    pub(super) mean: f64,
    /// Half the width of the 95% interval; `None` of one value.
    pub(super) margin: Option<f64>,
    pub(super) count: usize,
}

/// Quantiles of Student's t that leave 2.5% above, for 1 to 20 degrees of freedom.
const T: [f64; 20] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086,
];
/// For more of them, a little too wide.
const T_LARGE: f64 = 2.086;

impl Mean {
    /// `None` of no values.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        if count == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        let margin = (count > 1).then(|| {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let deviation = (squares / (count - 1) as f64).sqrt();
            T.get(count - 2).copied().unwrap_or(T_LARGE) * deviation / (count as f64).sqrt()
        });
        Some(Self { mean, margin, count })
    }

    /// Of values of two runs by seed, the first minus the second.
    pub(super) fn of_differences(pairs: &[(f64, f64)]) -> Option<Self> {
        Self::of(&pairs.iter().map(|(a, b)| a - b).collect::<Vec<_>>())
    }

    /// Whether the interval excludes 0.
    pub(super) fn is_clear(&self) -> bool {
        self.margin.is_some_and(|margin| self.mean.abs() > margin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_owe_to_the_seed_falls_away() {
        let of = Mean::of_differences(&[(2.01, 2.0), (3.03, 3.0), (1.02, 1.0)]).unwrap();
        assert!((of.mean - 0.02).abs() < 1e-12 && of.count == 3);
        // Deviation 0.01, t 4.303, root of 3.
        assert!((of.margin.unwrap() - 4.303 * 0.01 / 3f64.sqrt()).abs() < 1e-9, "{of:?}");
        assert!(!of.is_clear());
        assert!(Mean::of_differences(&[(2.0, 1.0), (3.01, 2.0)]).unwrap().is_clear());
    }

    #[test]
    fn one_value_says_nothing_of_how_sure_it_is() {
        let one = Mean::of_differences(&[(1.0, 2.0)]).unwrap();
        assert_eq!((one.mean, one.margin, one.is_clear()), (-1.0, None, false));
        assert_eq!(Mean::of(&[]), None);
    }
}
