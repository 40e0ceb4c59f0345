//! Plain loops: the reference of the other micro-kernels, and what runs where they cannot.

use super::{Format, PANEL_COLS, Start, Tile};

fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}

/// # Safety
/// `tile.out` must cover the tile and belong to the caller.
pub(super) unsafe fn run(a_format: Format, tile: &Tile<'_>) {
    for row in 0..tile.rows {
        // SAFETY: row `row` of the tile has `cols` elements.
        let out = unsafe { std::slice::from_raw_parts_mut(tile.out.add(row * tile.out_stride), tile.cols) };
        match tile.start {
            Start::Zero => out.fill(0.0),
            Start::Bias(bias) => out.copy_from_slice(bias),
            Start::Output => {}
            Start::Added => unreachable!("a kernel finishes sums, and others add them"),
        }
        for (panel, out) in out.chunks_mut(PANEL_COLS).enumerate() {
            let b = &tile.b[panel * tile.panel_stride..][..tile.steps * PANEL_COLS];
            for (step, b) in b.chunks_exact(PANEL_COLS).enumerate() {
                multiply_step(a_format, tile, row, step, b, out);
            }
        }
    }
}

fn multiply_step(a_format: Format, tile: &Tile<'_>, row: usize, step: usize, b: &[u32], out: &mut [f32]) {
    let (even, odd) = match a_format {
        Format::F32 => {
            let a = f32::from_bits(tile.a[step * tile.rows + row]);
            return out.iter_mut().zip(b).for_each(|(sum, &b)| *sum = a.mul_add(f32::from_bits(b), *sum));
        }
        Format::Pairs => {
            let word = tile.a[step * tile.rows + row];
            (low(word), high(word))
        }
        Format::Wide => {
            let at = |p: usize| f32::from_bits(tile.a[(2 * step + p) * tile.rows + row]);
            (at(0), at(1))
        }
        Format::Rows => unreachable!("tiles alone read rows"),
    };
    for (sum, &b) in out.iter_mut().zip(b) {
        *sum = even.mul_add(low(b), odd.mul_add(high(b), *sum));
    }
}
