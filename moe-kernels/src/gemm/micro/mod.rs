//! Micro-kernels: one tile of A times one or a few panels of B, for as many steps as are packed.
//!
//! Every one of them runs the same chain of fused multiply-adds per element of C; see [`super`].

pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::{Format, PANEL_COLS, Start};
use crate::Isa;

/// One call of a micro-kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile<'a> {
    /// 1 to [`Format::tile_rows`].
    pub(super) rows: usize,
    /// Panels side by side: 1, 2 or 4.
    pub(super) panels: usize,
    /// Columns of C that exist in these panels.
    pub(super) cols: usize,
    /// Words of B per column.
    pub(super) steps: usize,
    /// `[steps][rows]`, twice that for [`Format::Wide`]; `[rows][steps]` for [`Format::Rows`].
    pub(super) a: &'a [u32],
    /// Words from row to row, for [`Format::Rows`].
    pub(super) a_stride: usize,
    /// `[steps][32]` at each multiple of `panel_stride`.
    pub(super) b: &'a [u32],
    pub(super) panel_stride: usize,
    /// Words from B to what the next call of another B will read: fetched ahead, and need not exist.
    pub(super) next: isize,
    /// `[rows, cols]` with `out_stride` between rows.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// What the sums start from; a bias has `cols` entries.
    pub(super) start: Start<'a>,
    /// Whether the sums go past the caches, where a kernel can do that: nobody will find them there.
    pub(super) streams: bool,
}

/// Panels that a tile of `rows` is multiplied with in one sweep when nothing is read twice: more streams from memory,
/// as many accumulators as there are registers.
pub(super) fn panels_at_once(a_format: Format, rows: usize) -> usize {
    if a_format == Format::Rows {
        return if rows <= 16 { 2 } else { 1 };
    }
    match rows {
        0..=3 => 4,
        4..=6 => 2,
        _ => 1,
    }
}

/// Products that [`run_beside`] runs at once: enough chains to keep the multipliers busy, and few enough that all addresses stay in
/// registers.
pub(super) const MOST_BESIDE: usize = 6;

/// Runs up to [`MOST_BESIDE`] tiles of one row and one panel each, all of as many steps.
pub(super) fn run_beside(isa: Isa, a_format: Format, tiles: &[Tile<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && matches!(a_format, Format::F32 | Format::Pairs) {
        let steps = tiles.first().map_or(0, |tile| tile.steps);
        for tile in tiles {
            assert!(tile.rows == 1 && tile.panels == 1 && tile.steps == steps && tile.a.len() == steps);
            assert!(tile.b.len() >= steps * PANEL_COLS && (1..=PANEL_COLS).contains(&tile.cols));
        }
        // SAFETY: this machine can run `isa`; the sizes of A and B were checked; each `out` covers its tile and belongs to this
        // task alone.
        return unsafe { avx512::run_beside(a_format, tiles) };
    }
    tiles.iter().for_each(|tile| run(isa, a_format, tile));
}

/// Orders what [`Tile::streams`] has stored before whatever tells other threads that it is there.
pub(super) fn finish_stream() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence; every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Runs one tile. `a_format` tells how A is packed; B is [`Format::F32`] with A of that format, else [`Format::Pairs`].
pub(super) fn run(isa: Isa, a_format: Format, tile: &Tile<'_>) {
    let a_words = match a_format {
        Format::Wide => 2 * tile.steps * tile.rows,
        Format::Rows => (tile.rows - 1) * tile.a_stride + tile.steps.next_multiple_of(16),
        _ => tile.steps * tile.rows,
    };
    assert!((1..=a_format.tile_rows()).contains(&tile.rows) && tile.a.len() == a_words);
    assert!(tile.b.len() >= (tile.panels - 1) * tile.panel_stride + tile.steps * PANEL_COLS);
    assert!(tile.cols <= tile.panels * PANEL_COLS && tile.cols > (tile.panels - 1) * PANEL_COLS);
    if a_format == Format::Rows {
        assert!(tile.panels == 1 || tile.panels == 2 && tile.rows <= 16);
        // SAFETY: the caller's `out` covers the tile and belongs to this task alone; A has this format on machines with
        // tiles only.
        return unsafe { amx::run(tile) };
    }
    match isa {
        // SAFETY: the caller's `out` covers the tile and belongs to this task alone.
        Isa::Portable => unsafe { portable::run(a_format, tile) },
        // SAFETY: as above, and this machine can run `isa`; the sizes of A and B were checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::run(a_format, tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::run(a_format, tile) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unsafe { portable::run(a_format, tile) },
    }
}
