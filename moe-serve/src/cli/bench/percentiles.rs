//! Percentiles of a list of times.

/// Times in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Percentiles(Vec<f64>);

impl Percentiles {
    pub(super) fn new(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self(times)
    }

    /// The smallest time that `percent` of all do not exceed (nearest rank); 0 of none.
    pub(super) fn at(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let times = Percentiles::new((1..=10).rev().map(f64::from).collect());
        assert_eq!([1.0, 50.0, 51.0, 90.0, 99.0, 100.0].map(|p| times.at(p)), [1.0, 5.0, 6.0, 9.0, 10.0, 10.0]);
        assert_eq!(Percentiles::new(vec![]).at(50.0), 0.0);
        assert_eq!(Percentiles::new(vec![3.0]).at(1.0), 3.0);
    }
}
