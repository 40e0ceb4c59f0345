//! Plain loops over the packed words.

use super::super::QuantFormat;
use super::Tile;
use crate::gemm::PANEL_COLS;

/// # Safety
/// `tile` must be as [`super::run`] checks, and `tile.out` cover it and belong to the caller.
pub(super) unsafe fn run(format: QuantFormat, tile: &Tile<'_>) {
    for row in 0..tile.rows {
        for col in 0..tile.cols {
            let panel = &tile.b[col / PANEL_COLS * tile.panel_words..][..tile.panel_words];
            let lane = col % PANEL_COLS;
            let sum = match format {
                QuantFormat::Int8 => int8(tile, row, col, panel, lane),
                QuantFormat::Int4 { group_size } => int4(tile, row, panel, lane, group_size),
            };
            let value = sum * tile.a_scales[row] + tile.bias.map_or(0.0, |b| b[col]);
            // SAFETY: the element lies in the tile.
            unsafe { tile.out.add(row * tile.out_stride + col).write(value) };
        }
    }
}

fn int8(tile: &Tile<'_>, row: usize, col: usize, panel: &[u32], lane: usize) -> f32 {
    let mut sum = 0i32;
    for (a, b) in tile.a.chunks_exact(tile.rows).zip(panel.chunks_exact(PANEL_COLS)) {
        let (a, b) = (a[row].to_le_bytes(), b[lane].to_le_bytes());
        sum += (0..4).map(|i| i32::from(a[i]) * i32::from(b[i] as i8)).sum::<i32>();
    }
    (sum - tile.b_offsets[col]) as f32 * tile.b_scales[col]
}

fn int4(tile: &Tile<'_>, row: usize, panel: &[u32], lane: usize, group_size: usize) -> f32 {
    let mut total = 0.0f32;
    let groups = panel.chunks_exact(PANEL_COLS / 2 + group_size / 8 * PANEL_COLS);
    for (group, (a, b)) in tile.a.chunks_exact(group_size / 4 * tile.rows).zip(groups).enumerate() {
        let mut sum = tile.a_sums[group * tile.rows + row] as i32;
        let (scales, b) = b.split_at(PANEL_COLS / 2);
        for (a, b) in a.chunks_exact(2 * tile.rows).zip(b.chunks_exact(PANEL_COLS)) {
            let (low, high) = (a[row].to_le_bytes(), a[tile.rows + row].to_le_bytes());
            for (i, byte) in b[lane].to_le_bytes().into_iter().enumerate() {
                sum += i32::from(low[i] as i8) * i32::from(byte & 15) + i32::from(high[i] as i8) * i32::from(byte >> 4);
            }
        }
        let scale = f32::from_bits(scales[lane / 2] >> (lane % 2 * 16) << 16);
        total = (sum as f32).mul_add(scale, total);
    }
    total
}
