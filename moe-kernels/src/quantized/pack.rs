//! From integers to panels, and input rows to integers on the way.

use super::QuantFormat;
use crate::Isa;
use crate::gemm::PANEL_COLS;
use crate::select::vectorize;

/// Added to a small number, it leaves the number's nearest integer (ties to even) in the low bits.
const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23

#[inline(always)]
pub(super) fn nearest(x: f32) -> i32 {
    (x + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32
}

/// Bits of the largest magnitude; those of an infinity or a NaN are above all others.
#[inline(always)]
pub(super) fn largest(row: &[f32]) -> u32 {
    row.iter().fold(0, |most, v| most.max(v.to_bits() & 0x7fff_ffff))
}

/// Least scale of values that are not all zero. A smaller one has no exact integers to offer anyway (it is subnormal, with
/// few bits left), and its inverse may be infinite: 0 times that is no number.
pub(super) const LEAST_SCALE: f32 = f32::MIN_POSITIVE;

/// The scale that takes `largest`, a finite magnitude, to `steps`, and its inverse; 0 and 0 for zeros.
pub(super) fn scale_and_inverse(largest: f32, steps: f32) -> (f32, f32) {
    if largest == 0.0 {
        return (0.0, 0.0);
    }
    let scale = (largest / steps).max(LEAST_SCALE);
    (scale, 1.0 / scale)
}

/// Up to 32 rows of `k` integers as one panel, with an offset per row.
pub(super) fn int8_panel(rows: &[i8], k: usize, to: &mut [u32], offsets: &mut [i32]) {
    for ((lane, row), offset) in rows.chunks_exact(k.max(1)).enumerate().zip(offsets) {
        for (p, &q) in row.iter().enumerate() {
            to[p / 4 * PANEL_COLS + lane] |= u32::from(q as u8) << (p % 4 * 8);
        }
        *offset = 128 * row.iter().map(|&q| i32::from(q)).sum::<i32>();
    }
}

/// Up to 32 rows of `k` integers as one panel of groups; `scales` are those of the rows, one after the other.
pub(super) fn int4_panel(rows: &[i8], scales: &[f32], k: usize, group_size: usize, to: &mut [u32]) {
    let group_words = PANEL_COLS / 2 + group_size / 8 * PANEL_COLS;
    for group in to.chunks_exact_mut(group_words) {
        // Eight zeros, stored as 8 each.
        group[PANEL_COLS / 2..].fill(0x8888_8888);
    }
    let groups = k.div_ceil(group_size);
    for (lane, row) in rows.chunks_exact(k.max(1)).enumerate() {
        for (index, (integers, group)) in row.chunks(group_size).zip(to.chunks_exact_mut(group_words)).enumerate() {
            group[lane / 2] |= scales[lane * groups + index].to_bits() >> 16 << (lane % 2 * 16);
            for (p, &q) in integers.iter().enumerate() {
                let word = &mut group[PANEL_COLS / 2 + p / 8 * PANEL_COLS + lane];
                let shift = p % 4 * 8 + p % 8 / 4 * 4;
                *word = *word & !(15 << shift) | ((i32::from(q) + 8) as u32) << shift;
            }
        }
    }
}

/// A tile of input rows as words of four, with the scale of each row, and for 4 bits -8 times the sum of each of its
/// groups, `[group][row]`.
pub(super) fn quantize_tile(
    isa: Isa,
    format: QuantFormat,
    values: &[f32],
    k: usize,
    words: &mut [u32],
    scales: &mut [u32],
    sums: &mut [u32],
) {
    let rows = scales.len();
    let padded = format.padded(k);
    let mut bytes = [0u8; 1024];
    for (row, values) in values.chunks_exact(k).enumerate() {
        let largest = vectorize!(isa, (values: &[f32]) -> u32 { largest(values) });
        let finite = largest < f32::INFINITY.to_bits();
        let (scale, factor) = if finite { scale_and_inverse(f32::from_bits(largest), 127.0) } else { (f32::NAN, 0.0) };
        scales[row] = scale.to_bits();
        // 8 bits take inputs from 0 to 255, 4 bits from -127 to 127: the products' other side has the sign.
        let zero = if format == QuantFormat::Int8 { 128 } else { 0 };
        for start in (0..padded).step_by(bytes.len()) {
            let len = bytes.len().min(padded - start);
            let some = &values[start.min(k)..(start + len).min(k)];
            vectorize!(isa, (bytes: &mut [u8] = &mut bytes, some: &[f32], factor: f32, zero: i32) {
                for (byte, v) in bytes.iter_mut().zip(some) {
                    *byte = (nearest((v * factor).max_(-127.0).min_(127.0)) + zero) as u8;
                }
            });
            bytes[some.len()..len].fill(zero as u8);
            for (step, four) in bytes[..len].chunks_exact(4).enumerate() {
                words[(start / 4 + step) * rows + row] = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
            }
            if let QuantFormat::Int4 { group_size } = format {
                // Groups may be longer than the buffer, never cut at other than its end.
                for (part, bytes) in bytes[..len].chunks(32).enumerate() {
                    let group = (start + part * 32) / group_size;
                    let sum: i32 = bytes.iter().map(|&b| i32::from(b as i8)).sum();
                    let at = &mut sums[group * rows + row];
                    let before = if (start + part * 32) % group_size == 0 { 0 } else { *at as i32 };
                    *at = (before - 8 * sum) as u32;
                }
            } else {
                sums[row] = 0;
            }
        }
    }
}

/// Minimum and maximum without regard to NaN, so that they vectorise.
trait Bound {
    fn max_(self, other: Self) -> Self;
    fn min_(self, other: Self) -> Self;
}

impl Bound for f32 {
    #[inline(always)]
    fn max_(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn min_(self, other: Self) -> Self {
        if self < other { self } else { other }
    }
}
