//! What a row of a table is measured with. A new dimension is a table of its values, a field of [`Row`], and its place in
//! [`Row::COLUMNS`], [`Row::names`] and [`Row::all`]; the command line and the report take it from there.

use anyhow::{Context, Result};
use moe_core::Capacity;
use moe_kernels::Precision;
use moe_models::Recompute;

/// A value by the word that chooses it.
pub(crate) type Named<T> = (&'static str, T);

const PRECISIONS: [Named<Precision>; 2] = [("bf16", Precision::Bf16), ("f32", Precision::F32)];

/// The paper's router with DeepSpeed's bound on an expert's rows, and without any.
const ROUTERS: [Named<Capacity>; 2] = [
    ("capacity", Capacity { train_factor: Some(1.25), eval_factor: Some(1.25), min_capacity: 4 }),
    ("dropless", Capacity::UNLIMITED),
];

/// Sequences of each micro-batch; micro-batches run one after the other.
const MICRO_BATCHES: [Named<usize>; 2] = [("1x8", 8), ("2x4", 4)];

/// What a backward pass computes again.
const RECOMPUTE: [Named<Recompute>; 3] =
    [("none", Recompute::None), ("block", Recompute::Block), ("moe", Recompute::Moe)];

/// How one row is measured.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) precision: Named<Precision>,
    pub(crate) router: Named<Capacity>,
    pub(crate) micro_batch_size: Named<usize>,
    pub(crate) recompute: Named<Recompute>,
}

impl Row {
    /// What the names are of, in the order of [`Row::names`].
    pub(crate) const COLUMNS: [&str; 4] = ["type", "router", "batches", "recompute"];
    /// Of the row that is measured with more and more experts.
    pub(crate) const GROWTH: [&str; 4] = ["bf16", "dropless", "1x8", "none"];

    pub(crate) fn names(&self) -> [&'static str; 4] {
        [self.precision.0, self.router.0, self.micro_batch_size.0, self.recompute.0]
    }

    pub(crate) fn all() -> Vec<Self> {
        let mut rows = Vec::new();
        let [none, again @ ..] = RECOMPUTE;
        for micro_batch_size in MICRO_BATCHES {
            for router in ROUTERS {
                rows.extend(PRECISIONS.map(|precision| Self { precision, router, micro_batch_size, recompute: none }));
            }
        }
        // What recomputation takes and saves is seen in one row.
        let like = rows.iter().copied().find(|row| row.names() == Self::GROWTH);
        rows.extend(like.into_iter().flat_map(|row| again.map(|recompute| Self { recompute, ..row })));
        rows
    }

    /// The rows that `words` choose: of each column those that are named, or all if none is.
    pub(crate) fn chosen(words: &[String]) -> Vec<Self> {
        let all = Self::all();
        let has = |column: usize, word: &str| all.iter().any(|row| row.names()[column] == word);
        let is_chosen = |row: &Self| {
            row.names().into_iter().enumerate().all(|(column, name)| {
                let named: Vec<&String> = words.iter().filter(|word| has(column, word)).collect();
                named.is_empty() || named.into_iter().any(|word| word == name)
            })
        };
        all.iter().copied().filter(is_chosen).collect()
    }

    /// The one row of these names.
    pub(crate) fn of(names: &[String]) -> Result<Self> {
        let same = |row: &Self| row.names().into_iter().eq(names.iter().map(String::as_str));
        Self::all().into_iter().find(same).with_context(|| format!("no row is measured with {}", names.join(", ")))
    }
}
