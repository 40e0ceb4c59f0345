//! [`Beside`]: products of one row with one panel each, side by side. A row's sums over a panel are two chains of multiply-adds, of
//! which each waits for the one before; those of several products fill the time.

use super::{Format, Operand, PANEL_COLS, Panels, Precision, Start, micro, pack};
use crate::parallel::SharedMut;
use crate::{Isa, buffer};

/// Rows packed one by one.
#[derive(Clone, Copy)]
pub(crate) struct SingleRows<'a> {
    isa: Isa,
    precision: Precision,
    format: Format,
    words: &'a [u32],
    words_per_row: usize,
}

/// Calls `body` with each row of `operand` packed for `isa` by itself.
pub(crate) fn with_single_rows<R>(
    isa: Isa,
    precision: Precision,
    operand: &Operand<'_>,
    body: impl FnOnce(SingleRows<'_>) -> R,
) -> R {
    let format = Format::of_a(isa, precision);
    let words_per_row = format.words(operand.inner);
    buffer::with_scratch(operand.outer * words_per_row, |words| {
        for (row, to) in words.chunks_exact_mut(words_per_row.max(1)).enumerate() {
            pack::pack(isa, format, operand, row, 1, to);
        }
        body(SingleRows { isa, precision, format, words, words_per_row })
    })
}

/// Products that wait for others to be run with.
pub(crate) struct Beside<'a> {
    rows: SingleRows<'a>,
    out: SharedMut<f32>,
    waiting: Vec<micro::Tile<'a>>,
}

impl<'a> SingleRows<'a> {
    /// A place for products into `out`.
    pub(crate) fn beside(self, out: SharedMut<f32>) -> Beside<'a> {
        Beside { rows: self, out, waiting: Vec::with_capacity(micro::MOST_BESIDE) }
    }
}

impl<'a> Beside<'a> {
    /// Row `row`'s part of the inner dimension times `panels`, to `out` from `offset` on: run with those that follow, in
    /// [`Beside::finish`] at the latest. What waits together is run in any order, so between two pieces of one product it must
    /// be finished.
    ///
    /// # Safety
    /// The product's part of `out` must exist and belong to the caller until it has been run.
    pub(crate) unsafe fn push(&mut self, row: usize, panels: Panels<'a>, start: Start<'a>, offset: usize) {
        debug_assert!(panels.first.is_multiple_of(PANEL_COLS));
        let SingleRows { precision, format, words, words_per_row, .. } = self.rows;
        let b_format = Format::of_b(precision);
        let (from, steps) = (b_format.words(panels.first), b_format.words(panels.len));
        let row = &words[row * words_per_row..][..words_per_row];
        let a = match format {
            Format::Wide => &row[2 * from..][..2 * steps],
            Format::Rows => &row[from..][..steps.next_multiple_of(16)],
            Format::F32 | Format::Pairs => &row[from..][..steps],
        };
        for col in (0..panels.cols).step_by(PANEL_COLS) {
            if self.waiting.len() == micro::MOST_BESIDE || self.waiting.first().is_some_and(|tile| tile.steps != steps)
            {
                self.finish();
            }
            self.waiting.push(micro::Tile {
                rows: 1,
                panels: 1,
                cols: PANEL_COLS.min(panels.cols - col),
                steps,
                a,
                a_stride: words_per_row,
                b: &panels.words[col / PANEL_COLS * panels.stride..],
                panel_stride: panels.stride,
                next: 0,
                out: self.out.at(offset + col),
                out_stride: 0,
                start,
                streams: false,
            });
        }
    }

    /// Runs what waits.
    pub(crate) fn finish(&mut self) {
        micro::run_beside(self.rows.isa, self.rows.format, &self.waiting);
        self.waiting.clear();
    }
}
