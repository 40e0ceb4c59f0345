//! The tile product in plain loops, as Intel documents `tdpbf16ps`: for each element, the even and the odd products of a
//! step are summed apart in ascending order, then both sums are added and the result is added to the element.

use super::{PANEL_COLS, SIDE, Sums, TileUnit};

#[derive(Default)]
pub(super) struct Model {
    sums: [Vec<f32>; 4],
    rows: [usize; 2],
    wide: bool,
}

impl Model {
    /// # Safety
    /// The operands must be readable.
    unsafe fn product(&mut self, sum: usize, rows: usize, a: *const u32, a_stride: usize, b: *const u32) {
        let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        for row in 0..rows {
            for col in 0..SIDE {
                let mut parts = [0.0f32; 2];
                for k in 0..SIDE {
                    // SAFETY: passed on from the caller.
                    let (x, w) = unsafe { (*a.add(row * a_stride + k), *b.add(k * PANEL_COLS + col)) };
                    for ((part, x), w) in parts.iter_mut().zip(halves(x)).zip(halves(w)) {
                        *part = x.mul_add(w, *part);
                    }
                }
                self.sums[sum][row * SIDE + col] += parts[0] + parts[1];
            }
        }
    }
}

impl TileUnit for Model {
    fn configure(&mut self, rows: [usize; 2], wide: bool) {
        assert!(rows.iter().all(|&r| r <= SIDE) && rows[0] > 0 && !(wide && rows[1] > 0), "{rows:?}");
        (self.rows, self.wide) = (rows, wide);
    }

    unsafe fn load(&mut self, sums: &Sums, count: usize) {
        self.sums = sums.0.each_ref().map(|s| s.to_vec());
        assert!(count <= 2 || self.wide || self.rows[1] > 0, "sums without a tile");
    }

    unsafe fn store(&mut self, sums: &mut Sums, count: usize) {
        for (to, from) in sums.0.iter_mut().zip(&self.sums).take(count) {
            to.copy_from_slice(from);
        }
    }

    unsafe fn one_by_two<const SECOND: bool>(&mut self, a: *const u32, a_stride: usize, b: *const u32) {
        let first = if SECOND { 2 } else { 0 };
        for half in 0..2 {
            // SAFETY: passed on from the caller.
            unsafe { self.product(first + half, self.rows[0], a, a_stride, b.add(half * SIDE)) };
        }
    }

    unsafe fn two_by_two(&mut self, a: [*const u32; 2], a_stride: usize, b: *const u32) {
        for (tall, a) in a.into_iter().enumerate() {
            for half in 0..2 {
                // SAFETY: passed on from the caller.
                unsafe { self.product(2 * tall + half, self.rows[tall], a, a_stride, b.add(half * SIDE)) };
            }
        }
    }
}
