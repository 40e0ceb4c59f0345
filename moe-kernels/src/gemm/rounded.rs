//! [`Rounded`]: a right side that was rounded to bf16 before, row-major: packing it reads half the memory and rounds nothing.

use super::{Format, PANEL_COLS};
use crate::Isa;

/// An `[outer, inner]` view into bf16 values, as their bits; the products sum over `inner`.
#[derive(Debug, Clone, Copy)]
pub struct Rounded<'a> {
    values: &'a [u16],
    pub(super) outer: usize,
    pub(super) inner: usize,
    outer_stride: usize,
    inner_stride: usize,
}

impl<'a> Rounded<'a> {
    /// `values` as a row-major `[outer, inner]` matrix.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn rows(values: &'a [u16], outer: usize, inner: usize) -> Self {
        assert_eq!(Some(values.len()), outer.checked_mul(inner), "a matrix has all its values");
        Self { values, outer, inner, outer_stride: inner, inner_stride: 1 }
    }

    /// The transpose of a row-major `[inner, outer]` matrix.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn columns(values: &'a [u16], outer: usize, inner: usize) -> Self {
        assert_eq!(Some(values.len()), outer.checked_mul(inner), "a matrix has all its values");
        Self { values, outer, inner, outer_stride: 1, inner_stride: outer }
    }

    /// The `len` values of the inner dimension from `first` on.
    pub(super) fn part(self, first: usize, len: usize) -> Self {
        let values = if len == 0 { &[] } else { &self.values[first * self.inner_stride..] };
        Self { values, inner: len, ..self }
    }

    /// The values, and the distances of rows and of steps.
    pub(super) fn layout(&self) -> (&'a [u16], [usize; 2]) {
        (self.values, [self.outer_stride, self.inner_stride])
    }

    fn value(&self, row: usize, p: usize) -> u32 {
        if row < self.outer && p < self.inner {
            u32::from(self.values[row * self.outer_stride + p * self.inner_stride])
        } else {
            0
        }
    }
}

/// Writes rows `first..first + outer` in panels one after the other, `[panel][words][32]`; rows past the end become zeros.
pub(super) fn pack(isa: Isa, from: &Rounded<'_>, (first, outer): (usize, usize), to: &mut [u32]) {
    let words = Format::Pairs.words(from.inner);
    debug_assert!(to.len() == outer * words && outer.is_multiple_of(PANEL_COLS));
    if words == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && from.outer_stride == 1 && first + outer <= from.outer && from.inner.is_multiple_of(2) {
        // SAFETY: this machine has the features of `isa`; the panels have all their rows, of whole pairs.
        return unsafe { avx512::interleave(from, (first, outer), to) };
    }
    for (panel, to) in to.chunks_exact_mut(PANEL_COLS * words).enumerate() {
        let first = first + panel * PANEL_COLS;
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx512
            && from.inner_stride == 1
            && first + PANEL_COLS <= from.outer
            && from.inner.is_multiple_of(2)
        {
            // SAFETY: this machine has the features of `isa`; the panel has all its rows, of whole pairs.
            unsafe { avx512::transpose(from, first, to) };
            continue;
        }
        let _ = isa;
        for (step, line) in to.chunks_exact_mut(PANEL_COLS).enumerate() {
            for (row, word) in line.iter_mut().enumerate() {
                *word = from.value(first + row, 2 * step) | from.value(first + row, 2 * step + 1) << 16;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::super::pack::transpose_16x16;
    use super::{PANEL_COLS, Rounded};
    use std::arch::x86_64::*;

    /// Steps fetched ahead.
    const AHEAD: usize = 16;

    /// Rows are neighbours: pairs of steps are interleaved, for all panels at once, so that a step is read where its values lie
    /// side by side. Steps lie far apart, which no hardware foresees: they are fetched ahead.
    ///
    /// # Safety
    /// The machine must have AVX-512 F and BW; `from` has outer stride 1, `outer` rows from `first` on, which are whole panels, and
    /// an even `inner`; `to` has a word of each pair of each row.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn interleave(from: &Rounded<'_>, (first, outer): (usize, usize), to: &mut [u32]) {
        // Pair `i` of the lower and of the upper 16 rows: the even step's value, then the odd one's.
        const PAIRS: [[u16; 32]; 2] = {
            let mut pairs = [[0; 32]; 2];
            let mut i = 0;
            while i < 32 {
                let value = i as u16 / 2 + if i % 2 == 1 { 32 } else { 0 };
                pairs[0][i] = value;
                pairs[1][i] = value + 16;
                i += 1;
            }
            pairs
        };
        // SAFETY: an array has 64 bytes.
        let [lower, upper] = PAIRS.each_ref().map(|ids| unsafe { _mm512_loadu_si512(ids.as_ptr().cast()) });
        let words = from.inner / 2;
        let start = from.values[first..].as_ptr();
        for step in 0..words {
            for panel in 0..outer / PANEL_COLS {
                // SAFETY: steps `2 * step` and the next have 32 values from the panel's first row on; the panel's line has 32
                // words. What is fetched ahead need not exist.
                unsafe {
                    let at = |p: usize| start.wrapping_add(p * from.inner_stride + panel * PANEL_COLS).cast();
                    _mm_prefetch::<_MM_HINT_T0>(at(2 * step + AHEAD));
                    _mm_prefetch::<_MM_HINT_T0>(at(2 * step + AHEAD + 1));
                    let (even, odd) =
                        (_mm512_loadu_si512(at(2 * step).cast()), _mm512_loadu_si512(at(2 * step + 1).cast()));
                    let line = to.as_mut_ptr().add(panel * words * PANEL_COLS + step * PANEL_COLS);
                    _mm512_storeu_si512(line.cast(), _mm512_permutex2var_epi16(even, lower, odd));
                    _mm512_storeu_si512(line.add(16).cast(), _mm512_permutex2var_epi16(even, upper, odd));
                }
            }
        }
    }

    /// Steps are neighbours: words of two are transposed, 16 x 16 at a time.
    ///
    /// # Safety
    /// As [`interleave`], with inner stride 1.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) unsafe fn transpose(from: &Rounded<'_>, first: usize, to: &mut [u32]) {
        let words = from.inner / 2;
        for half in [0, 16] {
            for start in (0..words).step_by(16) {
                let count = 16.min(words - start);
                let mask = ((1u32 << count) - 1) as __mmask16;
                let mut block = [_mm512_setzero_si512(); 16];
                for (row, line) in block.iter_mut().enumerate() {
                    // SAFETY: the row exists; words past its end are masked off.
                    *line = unsafe {
                        let row = from.values.as_ptr().add((first + half + row) * from.outer_stride);
                        _mm512_maskz_loadu_epi32(mask, row.cast::<i32>().add(start))
                    };
                }
                transpose_16x16(&mut block);
                for (step, line) in block.iter().enumerate().take(count) {
                    // SAFETY: step `start + step` has 32 words.
                    unsafe {
                        _mm512_storeu_si512(to.as_mut_ptr().add((start + step) * PANEL_COLS + half).cast(), *line)
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Operand, Precision, bf16_round, pack as gemm_pack};
    use super::*;

    #[test]
    fn packing_is_that_of_the_values_that_were_rounded() {
        for (outer, inner) in [(1, 1), (32, 2), (64, 33), (70, 34), (96, 70), (31, 16)] {
            let rows: Vec<f32> = (0..outer * inner).map(|i| ((i * 37) % 101) as f32 * 0.0137 - 0.5).collect();
            let columns: Vec<f32> = (0..outer * inner).map(|i| rows[i % outer * inner + i / outer]).collect();
            let bits = |values: &[f32]| -> Vec<u16> {
                values.iter().map(|v| (bf16_round(*v).to_bits() >> 16) as u16).collect()
            };
            let (rounded_rows, rounded_columns) = (bits(&rows), bits(&columns));
            for (first, count) in [(0, 32), (0, 96), (outer / 32 * 32, 32)] {
                let words = Format::of_b(Precision::Bf16).words(inner);
                let mut want = vec![u32::MAX; count * words];
                let operand = Operand::rows(&rows, outer, inner, inner);
                // Panels wholly past the end are never packed.
                let count = count.min((outer - first).next_multiple_of(32));
                gemm_pack::pack_run(
                    Isa::Portable,
                    Format::Pairs,
                    &operand,
                    (first, count),
                    32,
                    &mut want[..count * words],
                );
                for isa in Isa::available() {
                    for from in
                        [Rounded::rows(&rounded_rows, outer, inner), Rounded::columns(&rounded_columns, outer, inner)]
                    {
                        let mut got = vec![u32::MAX; count * words];
                        pack(isa, &from, (first, count), &mut got);
                        assert_eq!(got, want[..count * words], "{isa} {outer} x {inner} from {first}");
                    }
                }
            }
        }
    }
}
