//! Packing with AVX2: a transposition of 8 x 8 values where steps are neighbours in memory.

use super::{Format, Tile, along_inner_from};
use std::arch::x86_64::*;

/// Rows and steps of a block.
const BLOCK: usize = 8;

/// # Safety
/// The machine must have AVX2; `tile.from` has `inner` contiguous and all of the tile's rows; `to` has `width` words of each step,
/// and `rows <= width`.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose(tile: &Tile<'_>, to: &mut [u32]) {
    let &Tile { format, from, first, rows, width } = tile;
    debug_assert!(from.inner_stride == 1);
    tile.checked_words(to);
    let whole = from.inner / BLOCK * BLOCK;
    for half in (0..rows).step_by(BLOCK) {
        let lanes = BLOCK.min(rows - half);
        for start in (0..whole).step_by(BLOCK) {
            let mut block = [_mm256_setzero_si256(); BLOCK];
            for (row, line) in block.iter_mut().enumerate().take(lanes) {
                // SAFETY: the row exists, with eight values from `start` on.
                *line = unsafe {
                    let row = from.values.as_ptr().add((first + half + row) * from.outer_stride);
                    _mm256_loadu_si256(row.add(start).cast())
                };
            }
            transpose_8x8(&mut block);
            let mut store = |step: usize, line: __m256i| {
                let to = &mut to[step * width + half..][..lanes];
                if let Some(to) = to.first_chunk_mut::<BLOCK>() {
                    // SAFETY: eight words.
                    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), line) };
                } else {
                    let mut words = [0u32; BLOCK];
                    // SAFETY: as above.
                    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), line) };
                    to.copy_from_slice(&words[..lanes]);
                }
            };
            match format {
                Format::F32 => block.iter().enumerate().for_each(|(step, line)| store(start + step, *line)),
                Format::Wide => {
                    block.iter().enumerate().for_each(|(step, line)| store(start + step, round_high(*line)))
                }
                Format::Pairs | Format::Rows => {
                    for (step, pair) in block.chunks_exact(2).enumerate() {
                        let low = _mm256_srli_epi32::<16>(round_high(pair[0]));
                        store(start / 2 + step, _mm256_or_si256(low, round_high(pair[1])));
                    }
                }
            }
        }
    }
    along_inner_from(tile, whole, to);
}

/// [`super::bf16_high`] of 8 values.
#[inline]
#[target_feature(enable = "avx2")]
fn round_high(bits: __m256i) -> __m256i {
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let value = _mm256_castsi256_ps(bits);
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
    let merged = _mm256_blendv_epi8(rounded, quiet, nan);
    _mm256_and_si256(merged, _mm256_set1_epi32(0xffff_0000_u32 as i32))
}

#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8x8(rows: &mut [__m256i; BLOCK]) {
    let mut quads = [_mm256_setzero_si256(); BLOCK];
    // 1. Inside each group of four rows, each 128-bit lane: columns 4 lane + 0..4.
    for group in 0..2 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| rows[4 * group + i]);
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        quads[4 * group] = _mm256_unpacklo_epi64(ab_low, cd_low);
        quads[4 * group + 1] = _mm256_unpackhi_epi64(ab_low, cd_low);
        quads[4 * group + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
        quads[4 * group + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
    // 2. Lanes of the two groups side by side.
    for column in 0..4 {
        rows[column] = _mm256_permute2x128_si256::<0x20>(quads[column], quads[4 + column]);
        rows[4 + column] = _mm256_permute2x128_si256::<0x31>(quads[column], quads[4 + column]);
    }
}
