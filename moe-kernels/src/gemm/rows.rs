//! [`PackedRows`]: a left side packed once and multiplied with panels that lie in pieces, one piece after the other. Rows that are
//! each a tile of their own can be multiplied side by side ([`super::beside`]).

use super::{Format, Operand, PANEL_COLS, Precision, Start, micro, pack};
use crate::parallel::SharedMut;
use crate::{Isa, buffer};

/// Words that `len` values of the inner dimension take in a panel, per column.
pub(crate) fn panel_words(precision: Precision, len: usize) -> usize {
    Format::of_b(precision).words(len)
}

/// The left side of products on one thread, packed.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<'a> {
    pub(super) isa: Isa,
    pub(super) precision: Precision,
    pub(super) format: Format,
    words: &'a [u32],
    rows: usize,
    pub(super) tile_rows: usize,
    pub(super) words_per_row: usize,
}

/// Panels `[panel][words][32]`, and which part of the inner dimension they are.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(crate) words: &'a [u32],
    /// Words from one panel to the next.
    pub(crate) stride: usize,
    /// Columns in all panels.
    pub(crate) cols: usize,
    /// The part of the inner dimension: its first value, a multiple of 32, and how many.
    pub(crate) first: usize,
    pub(crate) len: usize,
}

impl Panels<'_> {
    /// Fetches all of them into the second-level cache, for products that come soon.
    pub(crate) fn fetch(&self, precision: Precision) {
        let used = PANEL_COLS * Format::of_b(precision).words(self.len);
        for panel in self.words.chunks(self.stride.max(1)).take(self.cols.div_ceil(PANEL_COLS)) {
            for line in panel[..used.min(panel.len())].chunks(16) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a prefetch reads nothing; it may point anywhere.
                unsafe {
                    std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast());
                }
                #[cfg(not(target_arch = "x86_64"))]
                let _ = line;
            }
        }
    }
}

/// Calls `body` with the rows of `operand` packed for `isa`, in tiles as large as they come out even.
pub(crate) fn with_packed_rows<R>(
    isa: Isa,
    precision: Precision,
    operand: &Operand<'_>,
    body: impl FnOnce(PackedRows<'_>) -> R,
) -> R {
    let (rows, most) = (operand.outer, Format::of_a(isa, precision).tile_rows());
    with_tiles(isa, precision, operand, rows.div_ceil(rows.div_ceil(most).max(1)).max(1), body)
}

/// The same with each row in a tile of its own.
pub(crate) fn with_single_rows<R>(
    isa: Isa,
    precision: Precision,
    operand: &Operand<'_>,
    body: impl FnOnce(PackedRows<'_>) -> R,
) -> R {
    with_tiles(isa, precision, operand, 1, body)
}

fn with_tiles<R>(
    isa: Isa,
    precision: Precision,
    operand: &Operand<'_>,
    tile_rows: usize,
    body: impl FnOnce(PackedRows<'_>) -> R,
) -> R {
    let format = Format::of_a(isa, precision);
    let (rows, words_per_row) = (operand.outer, format.words(operand.inner));
    buffer::with_scratch(rows * words_per_row, |words| {
        for first in (0..rows).step_by(tile_rows) {
            let count = tile_rows.min(rows - first);
            let to = &mut words[first * words_per_row..][..count * words_per_row];
            pack::pack(isa, format, operand, first, count, to);
        }
        body(PackedRows { isa, precision, format, words, rows, tile_rows, words_per_row })
    })
}

impl<'a> PackedRows<'a> {
    /// The words of `rows` rows from `first` on, which are a tile, of `steps` steps from `from` on.
    pub(super) fn tile(&self, (first, rows): (usize, usize), (from, steps): (usize, usize)) -> &'a [u32] {
        let tile = &self.words[first * self.words_per_row..][..rows * self.words_per_row];
        match self.format {
            Format::Wide => &tile[2 * from * rows..][..2 * steps * rows],
            Format::Rows => &tile[from..][..(rows - 1) * self.words_per_row + steps.next_multiple_of(16)],
            Format::F32 | Format::Pairs => &tile[from * rows..][..steps * rows],
        }
    }

    /// The rows' part of the inner dimension times `panels`, into `out` from `offset` on, with `stride` between rows. A product
    /// over several pieces goes through them in order, all but the first with [`Start::Output`]: the chain of additions is then
    /// that of one piece.
    ///
    /// # Safety
    /// The product's part of `out` must exist and belong to the caller.
    pub(crate) unsafe fn times(
        &self,
        panels: Panels<'_>,
        start: Start<'_>,
        out: SharedMut<f32>,
        (offset, stride): (usize, usize),
    ) {
        debug_assert!(panels.first.is_multiple_of(PANEL_COLS));
        let b_format = Format::of_b(self.precision);
        let (from, steps) = (b_format.words(panels.first), b_format.words(panels.len));
        let count = panels.cols.div_ceil(PANEL_COLS);
        for first_row in (0..self.rows).step_by(self.tile_rows) {
            let rows = self.tile_rows.min(self.rows - first_row);
            let a = self.tile((first_row, rows), (from, steps));
            let mut panel = 0;
            while panel < count {
                let wide = micro::panels_at_once(self.format, rows).min(count - panel);
                let wide = if wide == 3 { 2 } else { wide };
                let col = panel * PANEL_COLS;
                micro::run(
                    self.isa,
                    self.format,
                    &micro::Tile {
                        rows,
                        panels: wide,
                        cols: (wide * PANEL_COLS).min(panels.cols - col),
                        steps,
                        a,
                        a_stride: self.words_per_row,
                        b: &panels.words[panel * panels.stride..],
                        panel_stride: panels.stride,
                        next: (wide * panels.stride) as isize,
                        out: out.at(offset + first_row * stride + col),
                        out_stride: stride,
                        start,
                        streams: false,
                    },
                );
                panel += wide;
            }
        }
    }
}
