//! AMX tiles: up to 32 rows times 32 columns, or 16 rows times 64, in four tiles of sums.
//!
//! The tile instructions sit behind [`TileUnit`], with two implementations: the hardware, and a model of its documented
//! semantics that runs the same kernel in tests on machines without it.

#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
mod check;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware;
#[cfg(test)]
mod model;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(in crate::gemm) use hardware::{is_available, peak_rounds};

use super::{PANEL_COLS, Start, Tile};

/// Rows of a tile of A for one call: two hardware tiles.
pub(in crate::gemm) const ROWS: usize = 32;
/// Rows, words per row and columns of a hardware tile.
const SIDE: usize = 16;

/// Four tiles of sums, row-major each.
#[repr(C, align(64))]
struct Sums([[f32; SIDE * SIDE]; 4]);

/// What the kernel asks of the tile registers: sums 0 to 3, multiplied into from memory.
///
/// A tile of A is `[rows][16]` words with `a_stride` words between rows, one of B `[16][16]` words with 32 words between
/// rows; each word holds two bf16, the even one low.
trait TileUnit {
    /// Sets the shapes: `rows[0]` rows for the first tile of A and its sums, `rows[1]` for the second. With `wide`, all sums
    /// belong to the first.
    fn configure(&mut self, rows: [usize; 2], wide: bool);
    /// # Safety
    /// The first `count` sums must exist.
    unsafe fn load(&mut self, sums: &Sums, count: usize);
    /// # Safety
    /// As `load`.
    unsafe fn store(&mut self, sums: &mut Sums, count: usize);
    /// Sums 0 and 1 (2 and 3 with `SECOND`) gain the product of A with two tiles of B side by side.
    ///
    /// # Safety
    /// The operands must be readable.
    unsafe fn one_by_two<const SECOND: bool>(&mut self, a: *const u32, a_stride: usize, b: *const u32);
    /// Sums 0 and 1 gain the product of the first tile of A with two tiles of B, sums 2 and 3 that of the second.
    ///
    /// # Safety
    /// The operands must be readable.
    unsafe fn two_by_two(&mut self, a: [*const u32; 2], a_stride: usize, b: *const u32);
}

/// Words of B fetched ahead of one sweep: panels lie one after another, so this reaches into the next one too.
const AHEAD_WORDS: usize = 1024;

/// # Safety
/// The machine must have AMX with bf16 unless this is a test; `tile` must be as [`super::run`] checks, and `tile.out`
/// cover it and belong to the caller.
pub(super) unsafe fn run(tile: &Tile<'_>) {
    #[cfg(test)]
    if !crate::gemm::has_amx() {
        // SAFETY: passed on from the caller.
        return unsafe { run_on(&mut model::Model::default(), tile) };
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    // SAFETY: passed on from the caller.
    unsafe {
        run_on(&mut hardware::Hardware, tile);
    }
}

/// # Safety
/// As [`run`].
unsafe fn run_on(unit: &mut impl TileUnit, tile: &Tile<'_>) {
    let rows = [tile.rows.min(SIDE), tile.rows.saturating_sub(SIDE)];
    let wide = tile.panels == 2;
    let count = if rows[1] > 0 || wide { 4 } else { 2 };
    let mut sums = Sums([[0.0; SIDE * SIDE]; 4]);
    if !matches!(tile.start, Start::Zero) {
        each_row(tile, &mut sums, |row, col, part| match tile.start {
            Start::Zero => {}
            Start::Added => unreachable!("a kernel finishes sums, and others add them"),
            Start::Bias(bias) => part.copy_from_slice(&bias[col..col + part.len()]),
            // SAFETY: the part lies inside the tile.
            Start::Output => unsafe {
                let from = tile.out.add(row * tile.out_stride + col);
                part.copy_from_slice(std::slice::from_raw_parts(from, part.len()));
            },
        });
    }
    unit.configure(rows, wide);
    // SAFETY: `count` sums are configured; `super::run` checked that A and B hold as many steps, A padded to whole tiles.
    unsafe {
        unit.load(&sums, count);
        let a = tile.a.as_ptr();
        let block = |unit: &mut _, at: usize, b: *const u32, panel_stride: usize| {
            multiply(unit, rows[1] > 0, wide, a.add(at), tile.a_stride, b, panel_stride);
        };
        let whole = tile.steps / SIDE * SIDE;
        for step in (0..whole).step_by(SIDE) {
            let b = tile.b.as_ptr().add(step * PANEL_COLS);
            if rows[1] == 0 {
                prefetch(b, tile);
            }
            block(unit, step, b, tile.panel_stride);
        }
        if whole < tile.steps {
            // The last rows of B with zeros after them: A is padded, B is not.
            let mut rest = [0u32; 2 * SIDE * PANEL_COLS];
            let len = (tile.steps - whole) * PANEL_COLS;
            for (panel, rest) in rest.chunks_exact_mut(SIDE * PANEL_COLS).enumerate().take(tile.panels) {
                rest[..len].copy_from_slice(&tile.b[panel * tile.panel_stride + whole * PANEL_COLS..][..len]);
            }
            block(unit, whole, rest.as_ptr(), SIDE * PANEL_COLS);
        }
        unit.store(&mut sums, count);
    }
    each_row(tile, &mut sums, |row, col, part| {
        // SAFETY: the part lies inside the tile.
        unsafe {
            let to = tile.out.add(row * tile.out_stride + col);
            std::slice::from_raw_parts_mut(to, part.len()).copy_from_slice(part);
        }
    });
}

/// One step over 16 words of `k`.
///
/// # Safety
/// The operands must be readable.
unsafe fn multiply(
    unit: &mut impl TileUnit,
    tall: bool,
    wide: bool,
    a: *const u32,
    a_stride: usize,
    b: *const u32,
    panel_stride: usize,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        if tall {
            unit.two_by_two([a, a.add(SIDE * a_stride)], a_stride, b);
            return;
        }
        unit.one_by_two::<false>(a, a_stride, b);
        if wide {
            unit.one_by_two::<true>(a, a_stride, b.add(panel_stride));
        }
    }
}

/// Fetches what the sweep will read soon.
fn prefetch(b: *const u32, tile: &Tile<'_>) {
    #[cfg(target_arch = "x86_64")]
    for panel in 0..tile.panels {
        let from = b.wrapping_add(panel * tile.panel_stride + AHEAD_WORDS);
        for line in 0..SIDE * PANEL_COLS / 16 {
            // SAFETY: a prefetch may point anywhere.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line * 16).cast());
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (b, tile);
}

/// Calls `body` with row, first column and values of every part of the sums that exists.
fn each_row(tile: &Tile<'_>, sums: &mut Sums, mut body: impl FnMut(usize, usize, &mut [f32])) {
    for (index, sums) in sums.0.iter_mut().enumerate() {
        let (first_row, first_col) =
            if tile.panels == 2 { (0, index * SIDE) } else { (index / 2 * SIDE, index % 2 * SIDE) };
        let cols = SIDE.min(tile.cols.saturating_sub(first_col));
        let rows = SIDE.min(tile.rows.saturating_sub(first_row));
        for (row, values) in sums.chunks_exact_mut(SIDE).enumerate().take(rows) {
            if cols > 0 {
                body(first_row + row, first_col, &mut values[..cols]);
            }
        }
    }
}
