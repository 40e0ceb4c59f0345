//! AVX2 and FMA: the tile in parts of up to 6 rows times 16 columns, in 12 registers of sums.

use super::{Format, PANEL_COLS, Start, Tile};
use std::arch::x86_64::*;

/// Columns of one part.
const COLS: usize = 16;
/// Rows of one part.
const ROWS: usize = 6;

/// One part of a tile.
struct Part<'a> {
    tile: &'a Tile<'a>,
    /// First row of the part.
    row: usize,
    /// First word of its columns in B, and its columns that exist.
    b: *const u32,
    cols: usize,
    /// `[rows, 16]` sums.
    sums: [[f32; COLS]; ROWS],
}

/// # Safety
/// The machine must have AVX2 and FMA; `tile` must be as [`super::run`] checks, and `tile.out` cover it and belong to the
/// caller.
pub(super) unsafe fn run(a_format: Format, tile: &Tile<'_>) {
    for col in (0..tile.cols).step_by(COLS) {
        for row in (0..tile.rows).step_by(ROWS) {
            let rows = ROWS.min(tile.rows - row);
            let cols = COLS.min(tile.cols - col);
            let b = tile.b.as_ptr().wrapping_add(col / PANEL_COLS * tile.panel_stride + col % PANEL_COLS);
            let mut part = Part { tile, row, b, cols, sums: [[0.0; COLS]; ROWS] };
            // SAFETY: passed on from the caller; the part lies inside the tile.
            unsafe {
                part.load(rows, col);
                match rows {
                    1 => part.multiply::<1>(a_format),
                    2 => part.multiply::<2>(a_format),
                    3 => part.multiply::<3>(a_format),
                    4 => part.multiply::<4>(a_format),
                    5 => part.multiply::<5>(a_format),
                    _ => part.multiply::<6>(a_format),
                }
                part.store(rows, col);
            }
        }
    }
}

impl Part<'_> {
    /// # Safety
    /// `tile.out` must cover the part.
    unsafe fn load(&mut self, rows: usize, col: usize) {
        for (row, sums) in self.sums.iter_mut().enumerate().take(rows) {
            match self.tile.start {
                Start::Zero => {}
                Start::Bias(bias) => sums[..self.cols].copy_from_slice(&bias[col..][..self.cols]),
                Start::Added => unreachable!("a kernel finishes sums, and others add them"),
                Start::Output => {
                    // SAFETY: the row has `cols` elements from `col` on.
                    let from = unsafe { self.tile.out.add((self.row + row) * self.tile.out_stride + col) };
                    // SAFETY: as above.
                    sums[..self.cols].copy_from_slice(unsafe { std::slice::from_raw_parts(from, self.cols) });
                }
            }
        }
    }

    /// # Safety
    /// `tile.out` must cover the part and belong to the caller.
    unsafe fn store(&self, rows: usize, col: usize) {
        for (row, sums) in self.sums.iter().enumerate().take(rows) {
            // SAFETY: the row has `cols` elements from `col` on, and no one else uses them.
            unsafe {
                let to = self.tile.out.add((self.row + row) * self.tile.out_stride + col);
                std::slice::from_raw_parts_mut(to, self.cols).copy_from_slice(&sums[..self.cols]);
            }
        }
    }

    /// # Safety
    /// As [`run`]; the part has `N` rows.
    unsafe fn multiply<const N: usize>(&mut self, a_format: Format) {
        // SAFETY: passed on from the caller.
        unsafe {
            match a_format {
                Format::F32 => self.multiply_f32::<N>(),
                Format::Wide => self.multiply_wide::<N>(),
                Format::Pairs | Format::Rows => unreachable!("AVX2 has no product of bf16 pairs"),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn sums<const N: usize>(&self) -> [[__m256; 2]; N] {
        let mut sums = [[_mm256_setzero_ps(); 2]; N];
        for (sums, from) in sums.iter_mut().zip(&self.sums) {
            // SAFETY: a row of sums has 16 elements.
            *sums = unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] };
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn keep<const N: usize>(&mut self, sums: [[__m256; 2]; N]) {
        for (to, [low, high]) in self.sums.iter_mut().zip(sums) {
            // SAFETY: a row of sums has 16 elements.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), low);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), high);
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn multiply_f32<const N: usize>(&mut self) {
        let (rows, steps) = (self.tile.rows, self.tile.steps);
        // SAFETY: `super::run` checked that A holds `steps` times `rows` words and B as many steps of 32.
        unsafe {
            let mut sums = self.sums::<N>();
            for step in 0..steps {
                let b = self.b.add(step * PANEL_COLS).cast::<f32>();
                let b = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                let a = self.tile.a.as_ptr().add(step * rows + self.row).cast::<f32>();
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_broadcast_ss(&*a.add(row));
                    sums[0] = _mm256_fmadd_ps(a, b[0], sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, b[1], sums[1]);
                }
            }
            self.keep(sums);
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn multiply_wide<const N: usize>(&mut self) {
        let (rows, steps) = (self.tile.rows, self.tile.steps);
        // SAFETY: as in `multiply_f32`, with two words of A per step.
        unsafe {
            let mut sums = self.sums::<N>();
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            for step in 0..steps {
                let b = self.b.add(step * PANEL_COLS).cast::<__m256i>();
                let words = [_mm256_loadu_si256(b), _mm256_loadu_si256(b.add(1))];
                let a = self.tile.a.as_ptr().add(2 * step * rows + self.row).cast::<f32>();
                let odd = words.map(|w| _mm256_castsi256_ps(_mm256_and_si256(w, upper)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_broadcast_ss(&*a.add(rows + row));
                    sums[0] = _mm256_fmadd_ps(a, odd[0], sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, odd[1], sums[1]);
                }
                let even = words.map(|w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_broadcast_ss(&*a.add(row));
                    sums[0] = _mm256_fmadd_ps(a, even[0], sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, even[1], sums[1]);
                }
            }
            self.keep(sums);
        }
    }
}
