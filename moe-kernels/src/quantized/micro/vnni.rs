//! AVX-512 with `vpdpbusd`: four products of bytes per lane and step.

use super::super::QuantFormat;
use super::Tile;
use crate::gemm::PANEL_COLS;
use std::arch::x86_64::*;

/// Words of B fetched ahead: panels lie one after another, so this reaches into the next one too.
const AHEAD_WORDS: usize = 512;

/// The same for 4 bits, which take half the words.
const AHEAD_WORDS_INT4: usize = 1024;

/// # Safety
/// The machine must have AVX-512 F, BW and VNNI; `tile` must be as [`super::run`] checks, and `tile.out` cover it and
/// belong to the caller.
pub(super) unsafe fn run(format: QuantFormat, tile: &Tile<'_>) {
    // One instance per number of rows and panels, so that the sums stay in registers.
    macro_rules! int8 {
        ($($rows:literal x $panels:literal),*) => {
            match (tile.rows, tile.panels) {
                // SAFETY: passed on from the caller.
                $(($rows, $panels) => unsafe { int8::<$rows, { 2 * $panels }>(tile) },)*
                _ => unreachable!("no kernel for {} rows and {} panels", tile.rows, tile.panels),
            }
        };
    }
    macro_rules! int4 {
        ($group_size:expr, $($rows:literal),*) => {
            match (tile.rows, tile.panels) {
                // SAFETY: passed on from the caller.
                $(($rows, 1) => unsafe { int4::<$rows>(tile, $group_size) },)*
                _ => unreachable!("no kernel for {} rows and {} panels", tile.rows, tile.panels),
            }
        };
    }
    match format {
        QuantFormat::Int8 => {
            int8!(1 x 1, 2 x 1, 3 x 1, 4 x 1, 5 x 1, 6 x 1, 7 x 1, 8 x 1, 9 x 1, 10 x 1, 11 x 1, 12 x 1,
            1 x 2, 2 x 2, 3 x 2, 4 x 2, 5 x 2, 6 x 2, 1 x 4, 2 x 4, 3 x 4)
        }
        QuantFormat::Int4 { group_size } => int4!(group_size, 1, 2, 3, 4, 5, 6),
    }
}

/// Where vector `vector` (of 16 outputs) of step 0 begins.
#[inline(always)]
fn vector_start(tile: &Tile<'_>, vector: usize) -> *const u32 {
    tile.b.as_ptr().wrapping_add(vector / 2 * tile.panel_words + vector % 2 * 16)
}

/// `sums * a_scale + bias` to memory.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const VECTORS: usize>(tile: &Tile<'_>, row: usize, sums: [__m512; VECTORS]) {
    let scale = _mm512_set1_ps(tile.a_scales[row]);
    for (vector, sum) in sums.into_iter().enumerate() {
        let lanes = match tile.cols.saturating_sub(vector * 16) {
            some if some >= 16 => u16::MAX,
            some => (1u16 << some) - 1,
        };
        let mut value = _mm512_mul_ps(sum, scale);
        // SAFETY: lanes past `cols` are masked off; row `row` lies inside the tile.
        unsafe {
            let bias = tile
                .bias
                .map_or(_mm512_setzero_ps(), |b| _mm512_maskz_loadu_ps(lanes, b.as_ptr().wrapping_add(vector * 16)));
            value = _mm512_add_ps(value, bias);
            _mm512_mask_storeu_ps(tile.out.add(row * tile.out_stride).wrapping_add(vector * 16), lanes, value);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn int8<const ROWS: usize, const VECTORS: usize>(tile: &Tile<'_>) {
    // SAFETY: `run` checked that A holds `steps` times `rows` words and each panel `steps` times 32.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); VECTORS]; ROWS];
        let starts: [*const u32; VECTORS] = std::array::from_fn(|vector| vector_start(tile, vector));
        for step in 0..tile.a.len() / ROWS {
            let b: [__m512i; VECTORS] = std::array::from_fn(|vector| {
                let from = starts[vector].add(step * PANEL_COLS);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD_WORDS).cast());
                _mm512_loadu_si512(from.cast())
            });
            let a = tile.a.as_ptr().add(step * ROWS).cast::<i32>();
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_epi32(*a.add(row));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbusd_epi32(*sum, a, b);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let values = std::array::from_fn(|vector| {
                let offsets = _mm512_loadu_si512(tile.b_offsets.as_ptr().add(vector * 16).cast());
                let scales = _mm512_loadu_ps(tile.b_scales.as_ptr().add(vector * 16));
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[vector], offsets)), scales)
            });
            store::<VECTORS>(tile, row, values);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn int4<const ROWS: usize>(tile: &Tile<'_>, group_size: usize) {
    // SAFETY: `run` checked that A holds whole groups and the one panel as many, scales first.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let mut totals = [[_mm512_setzero_ps(); 2]; ROWS];
        for group in 0..tile.a.len() / ROWS * 4 / group_size {
            let scales_at = tile.b.as_ptr().add(group * (PANEL_COLS / 2 + group_size / 8 * PANEL_COLS));
            // Lines of scales shift what the steps fetch ahead by a line in each group: without this one of it would be left out.
            _mm_prefetch::<_MM_HINT_T0>(scales_at.wrapping_add(AHEAD_WORDS_INT4).cast());
            let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
            for (row, sums) in sums.iter_mut().enumerate() {
                *sums = [_mm512_set1_epi32(*tile.a_sums.as_ptr().add(group * ROWS + row) as i32); 2];
            }
            let a = tile.a.as_ptr().add(group * group_size / 4 * ROWS).cast::<i32>();
            for step in 0..group_size / 8 {
                let b: [__m512i; 2] = std::array::from_fn(|vector| {
                    let from = scales_at.add(PANEL_COLS / 2 + step * PANEL_COLS + vector * 16);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD_WORDS_INT4).cast());
                    _mm512_loadu_si512(from.cast())
                });
                for (half, b) in
                    [b.map(|b| _mm512_and_si512(b, low)), b.map(|b| _mm512_and_si512(_mm512_srli_epi32::<4>(b), low))]
                        .into_iter()
                        .enumerate()
                {
                    let a = a.add((2 * step + half) * ROWS);
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let a = _mm512_set1_epi32(*a.add(row));
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = _mm512_dpbusd_epi32(*sum, b, a);
                        }
                    }
                }
            }
            let scales: [__m512; 2] = std::array::from_fn(|vector| {
                let pairs = _mm256_loadu_si256(scales_at.add(vector * 8).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(pairs)))
            });
            for (totals, sums) in totals.iter_mut().zip(sums) {
                for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scales) {
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
                }
            }
        }
        for (row, totals) in totals.into_iter().enumerate() {
            store::<2>(tile, row, totals);
        }
    }
}
