//! [`Beside`]: products of one row with one panel each, side by side. A row's sums over a panel are two chains of multiply-adds, of
//! which each waits for the one before; those of several products fill the time.

use super::rows::PackedRows;
use super::{Format, PANEL_COLS, Panels, Start, micro};
use crate::parallel::SharedMut;

/// Products that wait for others to be run with.
pub(crate) struct Beside<'a> {
    rows: PackedRows<'a>,
    out: SharedMut<f32>,
    waiting: Vec<micro::Tile<'a>>,
}

impl<'a> PackedRows<'a> {
    /// A place for products into `out` of rows that are each a tile ([`super::with_single_rows`]).
    pub(crate) fn beside(self, out: SharedMut<f32>) -> Beside<'a> {
        debug_assert_eq!(self.tile_rows, 1);
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
        let b_format = Format::of_b(self.rows.precision);
        let (from, steps) = (b_format.words(panels.first), b_format.words(panels.len));
        let a = self.rows.tile((row, 1), (from, steps));
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
                a_stride: self.rows.words_per_row,
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
