//! AVX2: bytes widened to 16 bits where their products need it, eight outputs at a time.

use super::super::QuantFormat;
use super::Tile;
use crate::gemm::PANEL_COLS;
use std::arch::x86_64::*;

/// # Safety
/// The machine must have AVX2 and FMA; `tile` must be as [`super::run`] checks, and `tile.out` cover it and belong to
/// the caller.
pub(super) unsafe fn run(format: QuantFormat, tile: &Tile<'_>) {
    macro_rules! instance {
        ($kernel:ident, $size:expr, $first:expr, $($rows:literal),*) => {
            match tile.rows {
                // SAFETY: passed on from the caller.
                $($rows => unsafe { $kernel::<$rows>(tile, $first, $size) },)*
                _ => unreachable!("no kernel for {} rows", tile.rows),
            }
        };
    }
    for first in (0..tile.cols).step_by(8) {
        match format {
            QuantFormat::Int8 => instance!(int8, 0, first, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
            QuantFormat::Int4 { group_size } => instance!(int4, group_size, first, 1, 2, 3, 4, 5, 6),
        }
    }
}

/// `sums * a_scale + bias` of outputs `first..first + 8` to memory.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn store(tile: &Tile<'_>, row: usize, first: usize, sums: __m256) {
    let mut values = [0.0f32; 8];
    // SAFETY: `values` has eight elements.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), _mm256_mul_ps(sums, _mm256_set1_ps(tile.a_scales[row]))) };
    for (col, value) in (first..tile.cols).zip(values) {
        // SAFETY: the element lies in the tile.
        unsafe { tile.out.add(row * tile.out_stride + col).write(value + tile.bias.map_or(0.0, |b| b[col])) };
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn int8<const ROWS: usize>(tile: &Tile<'_>, first: usize, _group_size: usize) {
    // SAFETY: `run` checked that A holds `steps` times `rows` words and each panel `steps` times 32.
    unsafe {
        let mut sums = [_mm256_setzero_si256(); ROWS];
        let start = tile.b.as_ptr().add(first / PANEL_COLS * tile.panel_words + first % PANEL_COLS);
        let even_bytes = _mm256_set1_epi16(0x00ff);
        for step in 0..tile.a.len() / ROWS {
            let b = _mm256_loadu_si256(start.add(step * PANEL_COLS).cast());
            let (even, odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b)), _mm256_srai_epi16::<8>(b));
            let a = tile.a.as_ptr().add(step * ROWS).cast::<i32>();
            for (row, sum) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_epi32(*a.add(row));
                let low = _mm256_madd_epi16(_mm256_and_si256(a, even_bytes), even);
                let high = _mm256_madd_epi16(_mm256_srli_epi16::<8>(a), odd);
                *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(low, high));
            }
        }
        let offsets = _mm256_loadu_si256(tile.b_offsets.as_ptr().add(first).cast());
        let scales = _mm256_loadu_ps(tile.b_scales.as_ptr().add(first));
        for (row, sum) in sums.into_iter().enumerate() {
            store(tile, row, first, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, offsets)), scales));
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn int4<const ROWS: usize>(tile: &Tile<'_>, first: usize, group_size: usize) {
    // SAFETY: `run` checked that A holds whole groups and each panel as many, scales first.
    unsafe {
        let (nibbles, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        let mut totals = [_mm256_setzero_ps(); ROWS];
        let group_words = PANEL_COLS / 2 + group_size / 8 * PANEL_COLS;
        for group in 0..tile.a.len() / ROWS * 4 / group_size {
            let mut sums: [__m256i; ROWS] =
                std::array::from_fn(|row| _mm256_set1_epi32(tile.a_sums[group * ROWS + row] as i32));
            let panel = tile.b.as_ptr().add(first / PANEL_COLS * tile.panel_words + group * group_words);
            let start = panel.add(PANEL_COLS / 2 + first % PANEL_COLS);
            let a = tile.a.as_ptr().add(group * group_size / 4 * ROWS).cast::<i32>();
            for step in 0..group_size / 8 {
                let b = _mm256_loadu_si256(start.add(step * PANEL_COLS).cast());
                let (low, high) = (_mm256_and_si256(b, nibbles), _mm256_and_si256(_mm256_srli_epi16::<4>(b), nibbles));
                let a = a.add(2 * step * ROWS);
                for (row, sum) in sums.iter_mut().enumerate() {
                    // Two products of at most 15 * 127 fit 16 bits, four of them too.
                    let pairs = _mm256_add_epi16(
                        _mm256_maddubs_epi16(low, _mm256_set1_epi32(*a.add(row))),
                        _mm256_maddubs_epi16(high, _mm256_set1_epi32(*a.add(ROWS + row))),
                    );
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
            let pairs = _mm_loadu_si128(panel.add(first % PANEL_COLS / 2).cast());
            let scales = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(pairs)));
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scales, *total);
            }
        }
        for (row, total) in totals.into_iter().enumerate() {
            store(tile, row, first, total);
        }
    }
}
