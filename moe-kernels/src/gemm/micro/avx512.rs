//! AVX-512: up to 12 rows times 32 columns, or fewer rows times 64 or 128, in 24 registers of sums.

use super::{Format, PANEL_COLS, Start, Tile};
use std::arch::x86_64::*;

/// Words of B fetched ahead in the sweep over several panels, where each is read once.
const AHEAD_WORDS: usize = 512;

/// # Safety
/// The machine must have AVX-512 F, BW and DQ, and `vdpbf16ps` for [`Format::Pairs`]; `tile` must be as
/// [`super::run`] checks, and `tile.out` cover it and belong to the caller.
pub(super) unsafe fn run(a_format: Format, tile: &Tile<'_>) {
    // One instance per number of rows and panels, so that the sums stay in registers.
    macro_rules! instance {
        ($kernel:ident: $($rows:literal x $panels:literal),*) => {
            match (tile.rows, tile.panels) {
                // SAFETY: passed on from the caller.
                $(($rows, $panels) => unsafe { $kernel::<$rows, $panels, { 2 * $panels }>(tile) },)*
                _ => unreachable!("no kernel for {} rows and {} panels", tile.rows, tile.panels),
            }
        };
        ($kernel:ident) => {
            instance!($kernel: 1 x 1, 2 x 1, 3 x 1, 4 x 1, 5 x 1, 6 x 1, 7 x 1, 8 x 1, 9 x 1, 10 x 1, 11 x 1, 12 x 1,
                1 x 2, 2 x 2, 3 x 2, 4 x 2, 5 x 2, 6 x 2, 1 x 4, 2 x 4, 3 x 4)
        };
    }
    match a_format {
        Format::F32 => instance!(f32_tile),
        Format::Pairs => instance!(pairs_tile),
        Format::Wide => instance!(wide_tile),
        Format::Rows => unreachable!("tiles alone read rows"),
    }
}

/// Tiles of one row and one panel, for [`Format::F32`] and [`Format::Pairs`].
///
/// # Safety
/// As [`run`]; the tiles must be as [`super::run_beside`] checks, at most [`super::MOST_BESIDE`] of them.
pub(super) unsafe fn run_beside(a_format: Format, tiles: &[Tile<'_>]) {
    macro_rules! instance {
        ($kernel:ident) => {
            // SAFETY: passed on from the caller.
            unsafe {
                match tiles {
                    [] => {}
                    [a] => $kernel([a]),
                    [a, b] => $kernel([a, b]),
                    [a, b, c] => $kernel([a, b, c]),
                    [a, b, c, d] => $kernel([a, b, c, d]),
                    [a, b, c, d, e] => $kernel([a, b, c, d, e]),
                    [a, b, c, d, e, f] => $kernel([a, b, c, d, e, f]),
                    _ => unreachable!("no kernel for {} tiles", tiles.len()),
                }
            }
        };
    }
    if a_format == Format::F32 { instance!(f32_beside) } else { instance!(pairs_beside) }
}

/// Lanes of vector `vector` (of 16 columns) that exist.
fn lanes(cols: usize, vector: usize) -> __mmask16 {
    match cols.saturating_sub(vector * 16) {
        0 => 0,
        some if some >= 16 => u16::MAX,
        some => (1 << some) - 1,
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_sums<const ROWS: usize, const VECTORS: usize>(tile: &Tile<'_>) -> [[__m512; VECTORS]; ROWS] {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate() {
        for (vector, sum) in sums.iter_mut().enumerate() {
            let from = match tile.start {
                Start::Zero => {
                    fetch_output(tile, row, vector);
                    continue;
                }
                Start::Added => unreachable!("a kernel finishes sums, and others add them"),
                Start::Bias(bias) => bias.as_ptr(),
                // SAFETY: row `row` lies inside the tile.
                Start::Output => unsafe { tile.out.add(row * tile.out_stride).cast_const() },
            };
            if matches!(tile.start, Start::Bias(_)) {
                fetch_output(tile, row, vector);
            }
            // SAFETY: lanes past `cols` are masked off.
            *sum = unsafe { _mm512_maskz_loadu_ps(lanes(tile.cols, vector), from.wrapping_add(vector * 16)) };
        }
    }
    sums
}

/// Fetches a line of the output to be written, which else would be waited for with the sums in hand. It need not exist.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch_output(tile: &Tile<'_>, row: usize, vector: usize) {
    if !tile.streams {
        let at = tile.out.wrapping_add(row * tile.out_stride + vector * 16);
        _mm_prefetch::<_MM_HINT_ET0>(at.cast_const().cast());
    }
}

/// Takes the sums by value: of a reference the compiler may keep them in memory, and write all of them in every step.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_sums<const ROWS: usize, const VECTORS: usize>(tile: &Tile<'_>, sums: [[__m512; VECTORS]; ROWS]) {
    let is_aligned = tile.out.addr().is_multiple_of(64) && tile.out_stride.is_multiple_of(16);
    if tile.streams && is_aligned && tile.cols == 16 * VECTORS {
        for (row, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                // SAFETY: row `row` lies inside the tile, has all columns, and begins at 64 bytes.
                unsafe { _mm512_stream_ps(tile.out.add(row * tile.out_stride + vector * 16), *sum) };
            }
        }
        return;
    }
    for (row, sums) in sums.iter().enumerate() {
        for (vector, sum) in sums.iter().enumerate() {
            // SAFETY: row `row` lies inside the tile; lanes past `cols` are masked off.
            unsafe {
                let to = tile.out.add(row * tile.out_stride).wrapping_add(vector * 16);
                _mm512_mask_storeu_ps(to, lanes(tile.cols, vector), *sum);
            }
        }
    }
}

/// Vector `vector` of step `step` of B.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_b<const VECTORS: usize>(tile: &Tile<'_>, step: usize, vector: usize) -> __m512i {
    let at = vector / 2 * tile.panel_stride + step * PANEL_COLS + vector % 2 * 16;
    // SAFETY: every panel has `steps` times 32 words; a prefetch may point anywhere.
    unsafe {
        let from = tile.b.as_ptr().add(at);
        if VECTORS > 2 {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD_WORDS).cast());
        } else {
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_offset(tile.next).cast());
        }
        _mm512_loadu_si512(from.cast())
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn f32_tile<const ROWS: usize, const PANELS: usize, const VECTORS: usize>(tile: &Tile<'_>) {
    // SAFETY: `run` checked that A holds `steps` times `rows` words and B as many steps.
    unsafe {
        let mut sums = load_sums::<ROWS, VECTORS>(tile);
        for step in 0..tile.steps {
            let mut b = [_mm512_setzero_ps(); VECTORS];
            for (vector, b) in b.iter_mut().enumerate() {
                *b = _mm512_castsi512_ps(load_b::<VECTORS>(tile, step, vector));
            }
            let a = tile.a.as_ptr().add(step * ROWS).cast::<f32>();
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.add(row));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
        }
        store_sums(tile, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs_tile<const ROWS: usize, const PANELS: usize, const VECTORS: usize>(tile: &Tile<'_>) {
    // SAFETY: as in `f32_tile`; a vector of words and one of bf16 pairs are the same 64 bytes.
    unsafe {
        let mut sums = load_sums::<ROWS, VECTORS>(tile);
        for step in 0..tile.steps {
            let mut b = [_mm512_setzero_si512(); VECTORS];
            for (vector, b) in b.iter_mut().enumerate() {
                *b = load_b::<VECTORS>(tile, step, vector);
            }
            let a = tile.a.as_ptr().add(step * ROWS).cast::<i32>();
            for (row, sums) in sums.iter_mut().enumerate() {
                let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(row)));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbf16_ps(*sum, a, std::mem::transmute::<__m512i, __m512bh>(b));
                }
            }
        }
        store_sums(tile, sums);
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn wide_tile<const ROWS: usize, const PANELS: usize, const VECTORS: usize>(tile: &Tile<'_>) {
    // SAFETY: as in `f32_tile`, with two words of A per step.
    unsafe {
        let mut sums = load_sums::<ROWS, VECTORS>(tile);
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        for step in 0..tile.steps {
            let a = tile.a.as_ptr().add(2 * step * ROWS).cast::<f32>();
            // A pair's odd element first, as `vdpbf16ps` has it.
            for odd in [true, false] {
                let mut b = [_mm512_setzero_ps(); VECTORS];
                for (vector, b) in b.iter_mut().enumerate() {
                    let words = load_b::<VECTORS>(tile, step, vector);
                    *b = _mm512_castsi512_ps(if odd {
                        _mm512_and_si512(words, upper)
                    } else {
                        _mm512_slli_epi32::<16>(words)
                    });
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(if odd { ROWS } else { 0 } + row));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_fmadd_ps(a, b, *sum);
                    }
                }
            }
        }
        store_sums(tile, sums);
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn f32_beside<const TILES: usize>(tiles: [&Tile<'_>; TILES]) {
    // SAFETY: A holds `steps` words of each tile, B as many steps.
    unsafe {
        let mut sums = tiles.map(|tile| load_sums::<1, 2>(tile)[0]);
        let (a, b) = (tiles.map(|tile| tile.a.as_ptr()), tiles.map(|tile| tile.b.as_ptr()));
        for step in 0..tiles[0].steps {
            for (sums, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                let a = _mm512_set1_ps(f32::from_bits(*a.add(step)));
                for (vector, sum) in sums.iter_mut().enumerate() {
                    let b = _mm512_loadu_ps(b.add(step * PANEL_COLS + vector * 16).cast());
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
        }
        tiles.iter().zip(sums).for_each(|(tile, sums)| store_sums(tile, [sums]));
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs_beside<const TILES: usize>(tiles: [&Tile<'_>; TILES]) {
    // SAFETY: as in `f32_beside`; a vector of words and one of bf16 pairs are the same 64 bytes.
    unsafe {
        let mut sums = tiles.map(|tile| load_sums::<1, 2>(tile)[0]);
        let (a, b) = (tiles.map(|tile| tile.a.as_ptr()), tiles.map(|tile| tile.b.as_ptr()));
        for step in 0..tiles[0].steps {
            for (sums, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(step) as i32));
                for (vector, sum) in sums.iter_mut().enumerate() {
                    let b = _mm512_loadu_si512(b.add(step * PANEL_COLS + vector * 16).cast());
                    *sum = _mm512_dpbf16_ps(*sum, a, std::mem::transmute::<__m512i, __m512bh>(b));
                }
            }
        }
        tiles.iter().zip(sums).for_each(|(tile, sums)| store_sums(tile, [sums]));
    }
}
