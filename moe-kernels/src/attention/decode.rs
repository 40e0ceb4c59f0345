//! One new token of a sequence over packed pages, where every query head has a key head of its own: all its products have a single
//! row, so those of several heads and pages run side by side. The bits are those of a block.

use super::blocks::{Heads, Place, Sequence, Source, Strip};
use super::pages::PackedPages;
use crate::buffer::with_scratch_f32;
use crate::gemm::{Start, with_single_rows};
use crate::parallel::SharedMut;
use std::ops::Range;

/// Heads of one task at most: as many as run side by side.
const HEADS: usize = 6;

impl Heads {
    /// The pages of a sequence that is decoded here.
    pub(super) fn decoded<'a>(&self, sequence: &Sequence<'a>) -> Option<PackedPages<'a>> {
        match (sequence.keys, sequence.values) {
            (Source::Packed(pages), Source::Packed(_)) if self.group == 1 && sequence.new == 1 => Some(pages),
            _ => None,
        }
    }

    /// Key heads of each task of a sequence.
    pub(super) fn tasks_of(&self, sequence: &Sequence<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
        let heads = self.num_kv_heads;
        let tasks = if self.decoded(sequence).is_some() { heads.div_ceil(HEADS) } else { heads };
        (0..tasks).map(move |task| task * heads / tasks..(task + 1) * heads / tasks)
    }

    /// The output of some heads of a sequence's new token.
    ///
    /// # Safety
    /// The heads' part of the row at `to`, the first head's first, must belong to the caller.
    pub(super) unsafe fn decode(
        &self,
        of: &Sequence<'_>,
        pages: PackedPages<'_>,
        heads: Range<usize>,
        sinks: Option<&[f32]>,
        to: Place,
    ) {
        let (visible, count, isa, precision) = (of.len, heads.len(), self.isa, self.precision);
        let queries = of.queries.row(0, self.d_model());
        let queries = Strip::new(&queries[self.query_column(heads.start)..], self.head_dim);
        with_scratch_f32(count * visible, |probs| {
            let scores = SharedMut::new(probs);
            with_single_rows(isa, precision, &queries.by_row(count, self.head_dim), |queries| {
                let mut products = queries.beside(scores);
                // Page by page, as the keys lie in memory.
                for first in pages.starts(visible) {
                    for (row, head) in heads.clone().enumerate() {
                        let keys = pages.keys(head, first, visible);
                        pages.fetch_after_keys(head, first, visible);
                        // SAFETY: `probs` is borrowed here alone.
                        unsafe { products.push(row, keys, Start::Zero, row * visible + first) };
                    }
                }
                products.finish();
            });
            for (row, head) in probs.chunks_exact_mut(visible).zip(heads.clone()) {
                self.soften(row, visible - 1, sinks.map(|sinks| sinks[head]));
            }
            with_single_rows(isa, precision, &Strip::new(probs, visible).by_row(count, visible), |probs| {
                let mut products = probs.beside(to.into);
                for first in pages.starts(visible) {
                    for (row, head) in heads.clone().enumerate() {
                        let values = pages.values(head, first, visible);
                        pages.fetch_after_values(head, first, visible);
                        // SAFETY: the caller's part.
                        unsafe { products.push(row, values, Start::at(first), to.first + row * self.head_dim) };
                    }
                    products.finish();
                }
            });
        });
    }
}
