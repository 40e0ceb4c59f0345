//! The times that the example `exchange` prints, and what follows from them.

use serde::{Deserialize, Serialize};

/// One form at one size.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub(super) struct Row {
    pub(super) ranks: usize,
    pub(super) ranks_per_node: usize,
    pub(super) load: String,
    /// Of a pair of ranks, in the mean.
    pub(super) bytes: usize,
    pub(super) form: String,
    /// With the ranks of a tensor group, where that matters.
    pub(super) name: String,
    pub(super) tensor_ranks: Option<usize>,
    pub(super) intra_node_messages: Option<usize>,
    pub(super) inter_node_messages: Option<usize>,
    pub(super) median_seconds: f64,
    pub(super) least_seconds: f64,
    pub(super) repetitions: usize,
}

impl Row {
    /// The time of the flat form over this one's, in the same circumstances.
    pub(super) fn gain(&self, all: &[Self]) -> Option<f64> {
        let same = |row: &&Self| (row.ranks, &row.load, row.bytes) == (self.ranks, &self.load, self.bytes);
        all.iter().filter(same).find(|row| row.form == "flat").map(|flat| flat.median_seconds / self.median_seconds)
    }
}

/// Values in the order of their first appearance.
pub(super) fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    values.fold(Vec::new(), |mut all, value| {
        if !all.contains(&value) {
            all.push(value);
        }
        all
    })
}

/// The size up to which a form gains, from `(bytes, gain)` by size: between the last size with a gain and the next, where the
/// gain is 1 on a line through the logarithms. None if it gains at all sizes, or at none.
pub(super) fn crossover(gains: &[(usize, f64)]) -> Option<f64> {
    let pair = gains.windows(2).find(|pair| pair[0].1 >= 1.0 && pair[1].1 < 1.0)?;
    let [(x0, y0), (x1, y1)] = [pair[0], pair[1]].map(|(bytes, gain)| ((bytes as f64).ln(), gain.ln()));
    Some((x0 + (x1 - x0) * y0 / (y0 - y1)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crossover_lies_where_the_gain_is_lost() {
        let near = |gains: &[(usize, f64)], want: f64| (crossover(gains).unwrap() / want - 1.0).abs() < 1e-9;
        assert!(near(&[(64, 4.0), (128, 2.0), (512, 0.5)], 256.0));
        assert!(near(&[(64, 1.0), (128, 0.5)], 64.0));
        assert_eq!(crossover(&[(64, 2.0), (128, 1.5)]), None);
        assert_eq!(crossover(&[(64, 0.9), (128, 0.5)]), None);
    }
}
