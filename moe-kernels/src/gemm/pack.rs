//! Packing of one tile or panel: rounding to bf16 where asked, and bringing `inner` to the outside.

use super::{Format, Operand};
use crate::Isa;

/// `value` rounded to bf16, to nearest even; a NaN stays one.
#[inline(always)]
pub fn bf16_round(value: f32) -> f32 {
    f32::from_bits(bf16_high(value))
}

/// The bits of the rounded value, the lower half zero. Without branches, so that loops over it vectorise.
#[inline(always)]
fn bf16_high(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    let quiet = (bits | 0x0040_0000) & 0xffff_0000;
    if value.is_nan() { quiet } else { rounded }
}

#[inline(always)]
fn pair(even: f32, odd: f32) -> u32 {
    (bf16_high(even) >> 16) | bf16_high(odd)
}

/// What one call packs: rows `first..first + rows` of `from`, in a tile that is `width` wide.
struct Tile<'a> {
    format: Format,
    from: &'a Operand<'a>,
    first: usize,
    rows: usize,
    width: usize,
}

impl Tile<'_> {
    /// Words of each of its rows; there must be room for all of them in `to`.
    fn checked_words(&self, to: &[u32]) -> usize {
        debug_assert!(self.first + self.rows <= self.from.outer && self.rows <= self.width);
        let words = self.format.words(self.from.inner);
        debug_assert_eq!(to.len(), self.width * words);
        words
    }
}

/// [`pack`] of `outer` rows from `first` on, in tiles of `width` one after the other; the last may be narrower, and rows past the
/// end of `from` become zeros. Where rows are neighbours in memory each step is read once, for all tiles.
pub(super) fn pack_run(
    isa: Isa,
    format: Format,
    from: &Operand<'_>,
    (first, outer): (usize, usize),
    width: usize,
    to: &mut [u32],
) {
    let words = format.words(from.inner);
    debug_assert_eq!(to.len(), outer * words);
    if words == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512Bf16 && from.outer_stride == 1 && format == Format::Pairs && first + outer <= from.outer {
        // SAFETY: this machine has the features of `isa`; `from` has the rows, and `to` the words of each.
        return unsafe { bf16::copy_run(from, (first, outer), width, to) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && from.outer_stride == 1 && format != Format::Rows && first + outer <= from.outer {
        // SAFETY: this machine has the features of `isa`; `from` has the rows, and `to` the words of each.
        return unsafe { avx512::copy_run(format, from, (first, outer), width, to) };
    }
    for (tile, to) in to.chunks_mut(width * words).enumerate() {
        pack(isa, format, from, first + tile * width, to.len() / words, to);
    }
}

/// Writes rows `first..first + width` of `from` as `[inner][width]` words ([`Format::Rows`]: `[width][inner]`); rows past
/// its end become zeros.
pub(super) fn pack(isa: Isa, format: Format, from: &Operand<'_>, first: usize, width: usize, to: &mut [u32]) {
    debug_assert_eq!(to.len(), width * format.words(from.inner));
    if from.inner == 0 {
        return;
    }
    let rows = width.min(from.outer - first);
    if rows < width {
        to.fill(0);
    }
    if format == Format::Rows {
        debug_assert_eq!(rows, width, "tiles of A have the rows there are");
        return isa.vectorize(|| row_by_row(from, first, to));
    }
    if width == 1 && from.inner_stride == 1 {
        let row = &from.values[first * from.outer_stride..][..from.inner];
        return isa.vectorize(|| one_row(format, row, to));
    }
    let tile = Tile { format, from, first, rows, width };
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && from.outer_stride == 1 {
        // SAFETY: this machine has the features of `isa`; the sizes are those of `from` and `to`.
        return unsafe { avx512::copy(&tile, to) };
    }
    if from.outer_stride == 1 {
        return isa.vectorize(|| along_outer(&tile, to));
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512Bf16 && format == Format::Pairs && from.inner_stride == 1 {
        // SAFETY: this machine has the features of `isa`; the sizes are those of `from` and `to`.
        return unsafe { bf16::transpose(&tile, to) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: this machine has the features of `isa`; the sizes are those of `from` and `to`.
        return unsafe { avx512::transpose(&tile, to) };
    }
    isa.vectorize(|| along_inner(&tile, to));
}

/// A single row: nothing to transpose.
#[inline(always)]
fn one_row(format: Format, row: &[f32], to: &mut [u32]) {
    match format {
        Format::F32 => to.iter_mut().zip(row).for_each(|(word, value)| *word = value.to_bits()),
        Format::Wide => {
            to.iter_mut().zip(row).for_each(|(word, &value)| *word = bf16_high(value));
            to[row.len()..].fill(0);
        }
        Format::Pairs | Format::Rows => {
            let pairs = row.chunks_exact(2);
            let (whole, rest) = to.split_at_mut(row.len() / 2);
            rest.fill(0);
            if let ([last], Some(word)) = (pairs.remainder(), rest.first_mut()) {
                *word = pair(*last, 0.0);
            }
            whole.iter_mut().zip(pairs).for_each(|(word, values)| *word = pair(values[0], values[1]));
        }
    }
}

/// [`Format::Rows`]: each row by itself, filled up with zeros.
#[inline(always)]
fn row_by_row(from: &Operand<'_>, first: usize, to: &mut [u32]) {
    let words = Format::Rows.words(from.inner);
    if from.inner_stride == 1 {
        for (row, to) in to.chunks_exact_mut(words).enumerate() {
            one_row(Format::Rows, &from.values[(first + row) * from.outer_stride..][..from.inner], to);
        }
        return;
    }
    // Sixteen words of every row at a time, so that what is read stays in the cache.
    let value = |row: usize, p: usize| {
        if p < from.inner { from.values[(first + row) * from.outer_stride + p * from.inner_stride] } else { 0.0 }
    };
    for start in (0..words).step_by(16) {
        for (row, to) in to.chunks_exact_mut(words).enumerate() {
            for (word, p) in to[start..start + 16].iter_mut().zip((2 * start..).step_by(2)) {
                *word = pair(value(row, p), value(row, p + 1));
            }
        }
    }
}

/// `outer` is contiguous: a copy per step of `inner`.
#[inline(always)]
fn along_outer(tile: &Tile<'_>, to: &mut [u32]) {
    let &Tile { format, from, first, rows, width } = tile;
    let at = |p: usize| &from.values[first + p * from.inner_stride..][..rows];
    match format {
        Format::F32 | Format::Wide => {
            for (p, words) in to.chunks_exact_mut(width).enumerate() {
                if p >= from.inner {
                    words.fill(0);
                    continue;
                }
                for (word, &value) in words.iter_mut().zip(at(p)) {
                    *word = if format == Format::F32 { value.to_bits() } else { bf16_high(value) };
                }
            }
        }
        Format::Pairs | Format::Rows => {
            for (p, words) in to.chunks_exact_mut(width).enumerate() {
                let even = at(2 * p);
                if 2 * p + 1 < from.inner {
                    for ((word, &low), &high) in words.iter_mut().zip(even).zip(at(2 * p + 1)) {
                        *word = pair(low, high);
                    }
                } else {
                    words.iter_mut().zip(even).for_each(|(word, &low)| *word = pair(low, 0.0));
                }
            }
        }
    }
}

/// `inner` is contiguous (or nothing is): a transposition.
#[inline(always)]
fn along_inner(tile: &Tile<'_>, to: &mut [u32]) {
    let &Tile { format, from, first, rows, width } = tile;
    let value = |row: usize, p: usize| from.values[(first + row) * from.outer_stride + p * from.inner_stride];
    for row in 0..rows {
        for p in 0..from.inner {
            let v = value(row, p);
            match format {
                Format::F32 => to[p * width + row] = v.to_bits(),
                Format::Wide => to[p * width + row] = bf16_high(v),
                Format::Pairs | Format::Rows if p % 2 == 0 => to[p / 2 * width + row] = bf16_high(v) >> 16,
                Format::Pairs | Format::Rows => to[p / 2 * width + row] |= bf16_high(v),
            }
        }
        if format == Format::Wide && from.inner % 2 == 1 {
            to[from.inner * width + row] = 0;
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::transpose_16x16;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Format, Operand, Tile};
    use std::arch::x86_64::*;

    /// Transposes 16 x 16 words at a time.
    ///
    /// # Safety
    /// The machine must have AVX-512 F, BW and DQ; `from` has `inner` contiguous and at least `first + rows` rows; `to`
    /// has `width * format.words(inner)` words and `rows <= width`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) unsafe fn transpose(tile: &Tile<'_>, to: &mut [u32]) {
        let &Tile { format, from, first, rows, width } = tile;
        debug_assert!(from.inner_stride == 1);
        let words = tile.checked_words(to);
        for half in (0..rows).step_by(16) {
            let lanes = 16.min(width - half);
            let mask = ((1u32 << lanes) - 1) as __mmask16;
            for start in (0..words).step_by(16) {
                let mut block = [_mm512_setzero_si512(); 16];
                for (row, line) in block.iter_mut().enumerate().take(rows - half) {
                    // SAFETY: row `first + half + row` exists; loads past its `inner` elements are masked off.
                    *line = unsafe {
                        let from_row = from.values.as_ptr().add((first + half + row) * from.outer_stride);
                        load_words(format, from_row, start, from.inner)
                    };
                }
                transpose_16x16(&mut block);
                for (step, line) in block.iter().enumerate().take(words - start) {
                    // SAFETY: word `(start + step) * width + half` and the `lanes` after it lie inside `to`.
                    unsafe {
                        let at = to.as_mut_ptr().add((start + step) * width + half);
                        _mm512_mask_storeu_epi32(at.cast(), mask, *line);
                    }
                }
            }
        }
    }

    /// One vector per 16 values of a step, the last one masked: most tiles are 12 wide.
    ///
    /// # Safety
    /// The machine must have AVX-512 F, BW and DQ; `from` has `outer` contiguous and at least `first + rows` rows; `to` has
    /// `width * format.words(inner)` words and `rows <= width`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) unsafe fn copy(tile: &Tile<'_>, to: &mut [u32]) {
        let &Tile { format, from, first, rows, width } = tile;
        debug_assert!(from.outer_stride == 1);
        let words = tile.checked_words(to);
        for start in (0..rows).step_by(16) {
            let mask = low_bits(rows - start);
            let row = from.values[first + start..].as_ptr();
            let into = to[start..].as_mut_ptr();
            // SAFETY: lanes past `rows` are masked off, and steps at or past `inner` are not loaded.
            let load = |p: usize| unsafe {
                if p < from.inner {
                    _mm512_maskz_loadu_ps(mask, row.add(p * from.inner_stride))
                } else {
                    _mm512_setzero_ps()
                }
            };
            for step in 0..words {
                let line = match format {
                    Format::F32 => _mm512_castps_si512(load(step)),
                    Format::Wide => round_high(load(step)),
                    Format::Pairs | Format::Rows => {
                        let low = _mm512_srli_epi32::<16>(round_high(load(2 * step)));
                        _mm512_or_si512(low, round_high(load(2 * step + 1)))
                    }
                };
                // SAFETY: step `step` has `width` words, of which `start` and the masked ones after it exist.
                unsafe { _mm512_mask_storeu_epi32(into.add(step * width).cast(), mask, line) };
            }
        }
    }

    /// [`copy`] of neighbouring tiles, step by step: a step's values are read where they lie side by side.
    ///
    /// # Safety
    /// The machine must have AVX-512 F, BW and DQ; `from` has `outer` contiguous and at least `first + outer` rows; `to` has
    /// `outer * format.words(inner)` words.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) unsafe fn copy_run(
        format: Format,
        from: &Operand<'_>,
        (first, outer): (usize, usize),
        width: usize,
        to: &mut [u32],
    ) {
        debug_assert!(from.outer_stride == 1 && first + outer <= from.outer);
        let words = format.words(from.inner);
        let start = from.values[first..].as_ptr();
        let into = to.as_mut_ptr();
        for step in 0..words {
            for tile in (0..outer).step_by(width) {
                let rows = width.min(outer - tile);
                for lane in (0..rows).step_by(16) {
                    let mask = low_bits(rows - lane);
                    // SAFETY: lanes past the tile's rows are masked off, and steps at or past `inner` are not loaded.
                    let load = |p: usize| unsafe {
                        if p < from.inner {
                            _mm512_maskz_loadu_ps(mask, start.add(p * from.inner_stride + tile + lane))
                        } else {
                            _mm512_setzero_ps()
                        }
                    };
                    let line = match format {
                        Format::F32 => _mm512_castps_si512(load(step)),
                        Format::Wide => round_high(load(step)),
                        Format::Pairs | Format::Rows => {
                            let low = _mm512_srli_epi32::<16>(round_high(load(2 * step)));
                            _mm512_or_si512(low, round_high(load(2 * step + 1)))
                        }
                    };
                    // SAFETY: the tile begins at `tile * words`, and its step `step` has `rows` words.
                    unsafe { _mm512_mask_storeu_epi32(into.add(tile * words + step * rows + lane).cast(), mask, line) };
                }
            }
        }
    }

    pub(super) fn low_bits(count: usize) -> __mmask16 {
        if count >= 16 { u16::MAX } else { ((1u32 << count) - 1) as __mmask16 }
    }

    /// Words `start..start + 16` of one row.
    ///
    /// # Safety
    /// `row` points to `inner` floats.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    unsafe fn load_words(format: Format, row: *const f32, start: usize, inner: usize) -> __m512i {
        // SAFETY: lanes at or past `inner` are masked off.
        let load = |p: usize| unsafe { _mm512_maskz_loadu_ps(low_bits(inner.saturating_sub(p)), row.wrapping_add(p)) };
        match format {
            Format::F32 => _mm512_castps_si512(load(start)),
            Format::Wide => round_high(load(start)),
            Format::Pairs | Format::Rows => {
                let (low, high) = (round_high(load(2 * start)), round_high(load(2 * start + 16)));
                // The upper halves of 32 words in order; a word of the result is (even, odd).
                const UPPER: [i16; 32] = {
                    let mut ids = [0; 32];
                    let mut i = 0;
                    while i < 32 {
                        ids[i] = 2 * i as i16 + 1;
                        i += 1;
                    }
                    ids
                };
                // SAFETY: `UPPER` is 64 bytes.
                let upper = unsafe { _mm512_loadu_si512(UPPER.as_ptr().cast()) };
                _mm512_permutex2var_epi16(low, upper, high)
            }
        }
    }

    /// `super::bf16_high` on 16 values.
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
}

/// Pairs, rounded by the processor. It takes numbers below 2^-126 as zero, as the products that read them do.
#[cfg(target_arch = "x86_64")]
mod bf16 {
    use super::avx512::{low_bits, transpose_16x16};
    use super::{Format, Operand, Tile};
    use std::arch::x86_64::*;

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

    /// [`super::avx512::transpose`] of pairs.
    ///
    /// # Safety
    /// The machine must have AVX-512 F, BW, DQ and BF16; `from` has `inner` contiguous and at least `first + rows` rows; `to`
    /// has `width` words of each pair, and `rows <= width`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(super) unsafe fn transpose(tile: &Tile<'_>, to: &mut [u32]) {
        let &Tile { from, first, rows, width, .. } = tile;
        debug_assert!(from.inner_stride == 1);
        let words = tile.checked_words(to);
        for half in (0..rows).step_by(16) {
            let mask = low_bits(width - half);
            for start in (0..words).step_by(16) {
                let left = from.inner - 2 * start;
                let (low_mask, high_mask) = (low_bits(left), low_bits(left.saturating_sub(16)));
                let mut block = [_mm512_setzero_si512(); 16];
                for (row, line) in block.iter_mut().enumerate().take(rows - half) {
                    // SAFETY: row `first + half + row` exists; loads past its `inner` elements are masked off. A vector of bf16
                    // and one of words are the same 64 bytes.
                    *line = unsafe {
                        let at = from.values.as_ptr().add((first + half + row) * from.outer_stride + 2 * start);
                        let low = _mm512_maskz_loadu_ps(low_mask, at);
                        let high = _mm512_maskz_loadu_ps(high_mask, at.wrapping_add(16));
                        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
                    };
                }
                transpose_16x16(&mut block);
                for (step, line) in block.iter().enumerate().take(words - start) {
                    // SAFETY: word `(start + step) * width + half` and the masked ones after it lie inside `to`.
                    unsafe {
                        let at = to.as_mut_ptr().add((start + step) * width + half);
                        _mm512_mask_storeu_epi32(at.cast(), mask, *line);
                    }
                }
            }
        }
    }

    /// [`super::avx512::copy_run`] of pairs.
    ///
    /// # Safety
    /// The machine must have AVX-512 F, BW, DQ and BF16; `from` has `outer` contiguous and at least `first + outer` rows; `to`
    /// has a word of each pair of each row.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(super) unsafe fn copy_run(from: &Operand<'_>, (first, outer): (usize, usize), width: usize, to: &mut [u32]) {
        debug_assert!(from.outer_stride == 1 && first + outer <= from.outer);
        let words = Format::Pairs.words(from.inner);
        let start = from.values[first..].as_ptr();
        let into = to.as_mut_ptr();
        // SAFETY: `PAIRS` is 64 bytes.
        let pairs = unsafe { _mm512_loadu_si512(PAIRS.as_ptr().cast()) };
        for step in 0..words {
            for tile in (0..outer).step_by(width) {
                let rows = width.min(outer - tile);
                for lane in (0..rows).step_by(16) {
                    let mask = low_bits(rows - lane);
                    // SAFETY: lanes past the tile's rows are masked off, and a step past `inner` is not loaded; the tile begins at
                    // `tile * words`, and its step `step` has `rows` words. A vector of bf16 and one of words are the same bytes.
                    unsafe {
                        let at = start.add(2 * step * from.inner_stride + tile + lane);
                        let even = _mm512_maskz_loadu_ps(mask, at);
                        let odd = if 2 * step + 1 < from.inner {
                            _mm512_maskz_loadu_ps(mask, at.add(from.inner_stride))
                        } else {
                            _mm512_setzero_ps()
                        };
                        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
                        let line = _mm512_permutexvar_epi16(pairs, both);
                        _mm512_mask_storeu_epi32(into.add(tile * words + step * rows + lane).cast(), mask, line);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let specials = [0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, 1.003_906_3, 1.011_718_8];
        let spread = (0..20_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        for value in specials.into_iter().chain(spread).filter(|v| !v.is_nan()) {
            let want = half::bf16::from_f32(value).to_f32();
            assert_eq!(bf16_round(value).to_bits(), want.to_bits(), "{value:e}");
        }
        assert!(bf16_round(f32::NAN).is_nan() && bf16_round(f32::from_bits(0x7fff_ffff)).is_nan());
    }

    #[test]
    fn packing_is_the_same_on_every_isa_and_from_either_orientation() {
        for (outer, inner) in [(1, 1), (5, 3), (12, 16), (31, 33), (32, 32), (40, 70)] {
            let rows: Vec<f32> = (0..outer * inner).map(|i| ((i * 37) % 101) as f32 * 0.0137 - 0.5).collect();
            let columns: Vec<f32> = (0..outer * inner).map(|i| rows[i % outer * inner + i / outer]).collect();
            for format in [Format::F32, Format::Pairs, Format::Wide] {
                for (first, width) in [(0, 12.min(outer)), (0, 32), (outer - 1, 1), (outer / 2, 32)] {
                    let pack_from = |isa, from: &Operand<'_>| {
                        let mut to = vec![u32::MAX; width * format.words(inner)];
                        pack(isa, format, from, first, width, &mut to);
                        to
                    };
                    let want = pack_from(Isa::Portable, &Operand::rows(&rows, outer, inner, inner));
                    for isa in Isa::available() {
                        let label = format!("{isa} {format:?} {outer}x{inner} from {first} width {width}");
                        assert_eq!(pack_from(isa, &Operand::rows(&rows, outer, inner, inner)), want, "{label}");
                        assert_eq!(pack_from(isa, &Operand::columns(&columns, outer, inner, outer)), want, "{label}");
                    }
                }
            }
        }
    }
}
