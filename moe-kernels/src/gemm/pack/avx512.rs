//! Packing with vectors: a copy where rows are neighbours, a transposition of 16 x 16 words where steps are. The processor's own
//! rounding to bf16 takes numbers below 2^-126 as zero, as the products that read them do.

use super::{Format, Operand, Tile};
use std::arch::x86_64::*;

/// Rows `first..first + outer` of `from`, in tiles of `width` rows, the last of which may have fewer.
pub(super) struct Run<'a> {
    pub(super) from: &'a Operand<'a>,
    pub(super) first: usize,
    pub(super) outer: usize,
    pub(super) width: usize,
}

/// Steps fetched ahead where they lie far apart, which no hardware foresees.
const AHEAD: usize = 16;

/// [`copy_by`] with values in any format but [`Format::Rows`].
///
/// # Safety
/// The machine must have AVX-512 F, BW and DQ; the rest as there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) unsafe fn copy(run: &Run<'_>, format: Format, to: &mut [u32]) {
    let (inner, stride) = (run.from.inner, run.from.inner_stride);
    // SAFETY: steps at or past `inner` are not loaded, lanes outside the mask neither; the rest is passed on from the caller.
    unsafe {
        let load = |at: *const f32, p: usize, mask: __mmask16| {
            if p < inner { _mm512_maskz_loadu_ps(mask, at.add(p * stride)) } else { _mm512_setzero_ps() }
        };
        match format {
            Format::F32 => copy_by(run, inner, 1, to, |at, step, mask| _mm512_castps_si512(load(at, step, mask))),
            Format::Wide => copy_by(run, format.words(inner), 1, to, |at, step, mask| round_high(load(at, step, mask))),
            Format::Pairs | Format::Rows => copy_by(run, format.words(inner), 2, to, |at, step, mask| {
                let low = _mm512_srli_epi32::<16>(round_high(load(at, 2 * step, mask)));
                _mm512_or_si512(low, round_high(load(at, 2 * step + 1, mask)))
            }),
        }
    }
}

/// [`copy`] of pairs, rounded by the processor.
///
/// # Safety
/// The machine must have AVX-512 F, BW, DQ and BF16; the rest as there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn copy_pairs(run: &Run<'_>, to: &mut [u32]) {
    /// The lower halves of 16 words and their upper ones: values `i` and `16 + i` of 32.
    const PAIRS: [u16; 32] = {
        let mut pairs = [0; 32];
        let mut i = 0;
        while i < 32 {
            pairs[i] = i as u16 / 2 + if i % 2 == 1 { 16 } else { 0 };
            i += 1;
        }
        pairs
    };
    let (inner, stride) = (run.from.inner, run.from.inner_stride);
    // SAFETY: as in `copy`; `PAIRS` is 64 bytes, and a vector of bf16 and one of words are the same bytes.
    unsafe {
        let pairs = _mm512_loadu_si512(PAIRS.as_ptr().cast());
        copy_by(run, Format::Pairs.words(inner), 2, to, |at, step, mask| {
            let even = _mm512_maskz_loadu_ps(mask, at.add(2 * step * stride));
            let odd = if 2 * step + 1 < inner {
                _mm512_maskz_loadu_ps(mask, at.add((2 * step + 1) * stride))
            } else {
                _mm512_setzero_ps()
            };
            _mm512_permutexvar_epi16(pairs, std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even)))
        });
    }
}

/// Tiles step by step: a step's values are read where they lie side by side. `line` makes the words of step `step` out of the
/// 16 rows whose first values `at` points to, of which those of the mask exist; a step reads `per_word` values of each row.
///
/// # Safety
/// The machine must have AVX-512 F; `run.from` has `outer` contiguous and all of the run's rows; `to` has `words` words of each.
#[inline(always)]
unsafe fn copy_by(
    run: &Run<'_>,
    words: usize,
    per_word: usize,
    to: &mut [u32],
    line: impl Fn(*const f32, usize, __mmask16) -> __m512i,
) {
    let &Run { from, first, outer, width } = run;
    debug_assert!(from.outer_stride == 1 && first + outer <= from.outer && to.len() == outer * words);
    let copy = Copy { start: from.values[first..].as_ptr(), stride: from.inner_stride, words, per_word, line };
    let whole = outer - outer % width;
    for step in 0..words {
        // SAFETY: passed on from the caller. The sizes that occur most have code of their own.
        unsafe {
            let to = to.as_mut_ptr();
            let mut tile = 0;
            while tile < whole {
                match width {
                    12 => copy.step(step, (tile, 12), to),
                    32 => copy.step(step, (tile, 32), to),
                    _ => copy.step(step, (tile, width), to),
                }
                tile += width;
            }
            if whole < outer {
                copy.step(step, (whole, outer - whole), to);
            }
        }
    }
}

/// What all steps of one [`copy_by`] have in common.
struct Copy<L> {
    start: *const f32,
    stride: usize,
    words: usize,
    per_word: usize,
    line: L,
}

impl<L: Fn(*const f32, usize, __mmask16) -> __m512i> Copy<L> {
    /// One step of the tile of `rows` rows from row `tile` on.
    ///
    /// # Safety
    /// As [`copy_by`].
    #[inline(always)]
    unsafe fn step(&self, step: usize, (tile, rows): (usize, usize), to: *mut u32) {
        for lane in (0..rows).step_by(16) {
            let lanes = rows - lane;
            let spills = step * rows + lane + 16 <= self.words * rows;
            // SAFETY: the tile begins at `tile * words`, and its step `step` has `rows` words; 16 of them lie inside the tile if
            // they are still to be written. What is fetched ahead need not exist.
            unsafe {
                let at = self.start.add(tile + lane);
                for value in 0..self.per_word {
                    let ahead = at.wrapping_add((self.per_word * step + AHEAD + value) * self.stride);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
                let line = (self.line)(at, step, low_bits(lanes));
                store_line(to.add(tile * self.words + step * rows + lane), line, lanes, spills);
            }
        }
    }
}

/// Stores the first `lanes` words of a line; if `spills`, whatever is behind them is overwritten too, which is faster.
///
/// # Safety
/// The machine must have AVX-512 F; `to` has room for `lanes` words, for 16 if `spills`.
#[inline(always)]
unsafe fn store_line(to: *mut u32, line: __m512i, lanes: usize, spills: bool) {
    // SAFETY: passed on from the caller; the mask leaves out what there is no room for.
    unsafe {
        if spills || lanes >= 16 {
            _mm512_storeu_si512(to.cast(), line);
        } else {
            _mm512_mask_storeu_epi32(to.cast(), low_bits(lanes), line);
        }
    }
}

fn low_bits(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { ((1u32 << count) - 1) as __mmask16 }
}

/// [`transpose_by`] with values in any format.
///
/// # Safety
/// The machine must have AVX-512 F, BW and DQ; the rest as there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) unsafe fn transpose(tile: &Tile<'_>, to: &mut [u32]) {
    /// The upper halves of 32 words in order; a word of the result is (even, odd).
    const UPPER: [u16; 32] = {
        let mut ids = [0; 32];
        let mut i = 0;
        while i < 32 {
            ids[i] = 2 * i as u16 + 1;
            i += 1;
        }
        ids
    };
    // SAFETY: `UPPER` is 64 bytes; the rest is passed on from the caller.
    unsafe {
        let upper = _mm512_loadu_si512(UPPER.as_ptr().cast());
        match tile.format {
            Format::F32 => transpose_by(tile, to, 1, |[low, _]| _mm512_castps_si512(low)),
            Format::Wide => transpose_by(tile, to, 1, |[low, _]| round_high(low)),
            Format::Pairs | Format::Rows => transpose_by(tile, to, 2, |[low, high]| {
                _mm512_permutex2var_epi16(round_high(low), upper, round_high(high))
            }),
        }
    }
}

/// [`transpose`] of pairs, rounded by the processor.
///
/// # Safety
/// The machine must have AVX-512 F, BW, DQ and BF16; the rest as there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn transpose_pairs(tile: &Tile<'_>, to: &mut [u32]) {
    // SAFETY: passed on from the caller; a vector of bf16 and one of words are the same bytes.
    unsafe {
        transpose_by(tile, to, 2, |[low, high]| {
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        });
    }
}

/// Transposes 16 x 16 words at a time; `line` makes 16 words of a row out of the next 16 or 32 of its values, zeros behind the
/// last.
///
/// # Safety
/// The machine must have AVX-512 F; `tile.from` has `inner` contiguous and all of the tile's rows; `to` has `width` words of each
/// step, and `rows <= width`.
#[inline(always)]
unsafe fn transpose_by(tile: &Tile<'_>, to: &mut [u32], per_word: usize, line: impl Fn([__m512; 2]) -> __m512i) {
    let &Tile { from, first, rows, width, .. } = tile;
    debug_assert!(from.inner_stride == 1);
    let words = tile.checked_words(to);
    for half in (0..rows).step_by(16) {
        let lanes = 16.min(width - half);
        for start in (0..words).step_by(16) {
            let left = from.inner.saturating_sub(per_word * start);
            let masks = [low_bits(left), low_bits(left.saturating_sub(16))];
            // SAFETY: AVX-512 F is there.
            let mut block = unsafe { [_mm512_setzero_si512(); 16] };
            for (row, to) in block.iter_mut().enumerate().take(rows - half) {
                // SAFETY: row `first + half + row` exists; loads past its `inner` elements are masked off.
                *to = unsafe {
                    let at = from.values.as_ptr().add((first + half + row) * from.outer_stride);
                    let at = at.wrapping_add(per_word * start);
                    let low = _mm512_maskz_loadu_ps(masks[0], at);
                    let high = if per_word == 2 { _mm512_maskz_loadu_ps(masks[1], at.wrapping_add(16)) } else { low };
                    line([low, high])
                };
            }
            // SAFETY: AVX-512 F is there.
            unsafe { transpose_16x16(&mut block) };
            for (step, line) in block.iter().enumerate().take(words - start) {
                let at = (start + step) * width + half;
                // SAFETY: the `lanes` words from `at` on lie inside `to`; 16 of them do, and are still to be written, if they spill.
                unsafe { store_line(to.as_mut_ptr().add(at), *line, lanes, half == 0 && at + 16 <= to.len()) };
            }
        }
    }
}

/// [`super::bf16_high`] of 16 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn round_high(value: __m512) -> __m512i {
    let bits = _mm512_castps_si512(value);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
    let merged = _mm512_mask_mov_epi32(rounded, nan, quiet);
    _mm512_and_si512(merged, _mm512_set1_epi32(0xffff_0000_u32 as i32))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(in crate::gemm) fn transpose_16x16(rows: &mut [__m512i; 16]) {
    let mut quads = [_mm512_setzero_si512(); 16];
    // 1. Inside each group of four rows, each 128-bit lane: columns 4 lane + 0..4.
    for group in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| rows[4 * group + i]);
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        quads[4 * group] = _mm512_unpacklo_epi64(ab_low, cd_low);
        quads[4 * group + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        quads[4 * group + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        quads[4 * group + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    // 2. Lanes of the four groups side by side.
    for column in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|group| quads[4 * group + column]);
        let (ab_even, cd_even) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let (ab_odd, cd_odd) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        rows[column] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        rows[4 + column] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        rows[8 + column] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        rows[12 + column] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
}
