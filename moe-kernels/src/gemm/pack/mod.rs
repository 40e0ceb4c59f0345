//! Packing of one tile or panel: rounding to bf16 where asked, and bringing `inner` to the outside.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use super::{Format, Operand};
use crate::Isa;
use crate::select::vectorize;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::transpose_16x16;

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
    if isa >= Isa::Avx512 && from.outer_stride == 1 && format != Format::Rows && first + outer <= from.outer {
        let run = avx512::Run { from, first, outer, width };
        // SAFETY: this machine has the features of `isa`; `from` has the rows, and `to` the words of each.
        return unsafe {
            if isa >= Isa::Avx512Bf16 && format == Format::Pairs {
                avx512::copy_pairs(&run, to)
            } else {
                avx512::copy(&run, format, to)
            }
        };
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
        return vectorize!(isa, (from: &Operand<'_>, first: usize, to: &mut [u32]) { row_by_row(from, first, to) });
    }
    if width == 1 && from.inner_stride == 1 {
        let row = &from.values[first * from.outer_stride..][..from.inner];
        return vectorize!(isa, (format: Format, row: &[f32], to: &mut [u32]) { one_row(format, row, to) });
    }
    let tile = Tile { format, from, first, rows, width };
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && from.outer_stride == 1 && rows == width {
        let run = avx512::Run { from, first, outer: width, width };
        // SAFETY: this machine has the features of `isa`; the sizes are those of `from` and `to`.
        return unsafe { avx512::copy(&run, format, to) };
    }
    if from.outer_stride == 1 {
        return vectorize!(isa, (tile: &Tile<'_> = &tile, to: &mut [u32]) { along_outer(tile, to) });
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && from.inner_stride == 1 {
        // SAFETY: this machine has the features of `isa`; the sizes are those of `from` and `to`.
        return unsafe {
            if isa >= Isa::Avx512Bf16 && format == Format::Pairs {
                avx512::transpose_pairs(&tile, to)
            } else {
                avx512::transpose(&tile, to)
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 && from.inner_stride == 1 {
        // SAFETY: as above.
        return unsafe { avx2::transpose(&tile, to) };
    }
    vectorize!(isa, (tile: &Tile<'_> = &tile, to: &mut [u32]) { along_inner(tile, to) });
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
    along_inner_from(tile, 0, to);
}

/// The same for steps from `begin` on, which is even.
#[inline(always)]
fn along_inner_from(tile: &Tile<'_>, begin: usize, to: &mut [u32]) {
    let &Tile { format, from, first, rows, width } = tile;
    let value = |row: usize, p: usize| from.values[(first + row) * from.outer_stride + p * from.inner_stride];
    for row in 0..rows {
        for p in begin..from.inner {
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
