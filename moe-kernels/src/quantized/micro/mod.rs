//! Micro-kernels: one tile of quantized rows times one or a few panels of weights, over all of `k`.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

use super::QuantFormat;
use crate::Isa;
use crate::gemm::PANEL_COLS;

/// One call of a micro-kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile<'a> {
    /// 1 to [`QuantFormat::tile_rows`].
    pub(super) rows: usize,
    /// Panels side by side: 1, 2 or 4.
    pub(super) panels: usize,
    /// Outputs that exist in these panels.
    pub(super) cols: usize,
    /// `[padded k / 4][rows]`
    pub(super) a: &'a [u32],
    /// `[rows]`
    pub(super) a_scales: &'a [f32],
    /// `[groups][rows]`
    pub(super) a_sums: &'a [u32],
    /// `[panels][panel_words]`
    pub(super) b: &'a [u32],
    pub(super) panel_words: usize,
    /// `[panels * 32]`; empty for 4 bits, as `b_offsets`.
    pub(super) b_scales: &'a [f32],
    pub(super) b_offsets: &'a [i32],
    /// `[cols]`
    pub(super) bias: Option<&'a [f32]>,
    /// `[rows, cols]` with `out_stride` between rows.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

/// Panels that a tile of `rows` is multiplied with in one sweep: as many sums as there are registers. Of 4 bits one, which is read as one
/// stream: four at once read 9 to 14% fewer bytes per second (two EPYC cores, 2026-11-27, 4096 outputs of 2048 inputs and one row, best of 400).
pub(super) fn panels_at_once(format: QuantFormat, rows: usize) -> usize {
    match (format, rows) {
        (QuantFormat::Int8, 0..=3) => 4,
        (QuantFormat::Int8, 4..=6) => 2,
        _ => 1,
    }
}

/// Runs one tile.
pub(super) fn run(isa: Isa, format: QuantFormat, tile: &Tile<'_>) {
    let steps = tile.a.len() / tile.rows;
    let words = match format {
        QuantFormat::Int8 => steps * PANEL_COLS,
        QuantFormat::Int4 { group_size } => steps * 4 / group_size * PANEL_COLS / 2 + steps / 2 * PANEL_COLS,
    };
    assert!((1..=format.tile_rows()).contains(&tile.rows) && tile.a_scales.len() == tile.rows);
    assert!(tile.panel_words == words && tile.b.len() == tile.panels * words);
    assert!(tile.cols <= tile.panels * PANEL_COLS && tile.cols > (tile.panels - 1) * PANEL_COLS);
    assert!(tile.bias.is_none_or(|b| b.len() == tile.cols));
    match format {
        QuantFormat::Int8 => {
            let outputs = tile.panels * PANEL_COLS;
            assert!(tile.b_scales.len() == outputs && tile.b_offsets.len() == outputs);
        }
        QuantFormat::Int4 { group_size } => assert_eq!(tile.a_sums.len(), steps * 4 / group_size * tile.rows),
    }
    match isa {
        // SAFETY: the caller's `out` covers the tile and belongs to this task alone.
        Isa::Portable => unsafe { portable::run(format, tile) },
        // SAFETY: as above, and this machine can run `isa`; the sizes of A and B were checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx if is_x86_feature_detected!("avx512vnni") => unsafe {
            vnni::run(format, tile)
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        _ => unsafe { avx2::run(format, tile) },
        #[cfg(not(target_arch = "x86_64"))]
        // SAFETY: as above.
        _ => unsafe { portable::run(format, tile) },
    }
}
