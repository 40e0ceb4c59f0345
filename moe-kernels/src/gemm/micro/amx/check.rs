//! Every variant of the tile kernel against plain sums, before a machine's tiles are used: one that a processor, an emulator
//! or a hypervisor gets wrong must not be found in a model's answers.
//!
//! The operands are small integers, whose sums are exact in any order: a right unit gives the same bits as the loops here.

use super::{PANEL_COLS, ROWS, SIDE, Start, Tile, TileUnit, run_on};
use std::fmt;

/// What one call of the kernel differs in from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Variant {
    /// 1 to 32; above 16 the second tile of A takes the rest.
    pub(super) rows: usize,
    /// Columns of C, of whole panels but for the last.
    pub(super) cols: usize,
    /// Words of depth.
    pub(super) steps: usize,
    /// What the sums start from.
    pub(super) from: From,
}

/// [`Start`] without its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    Zero,
    Bias,
    Output,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, cols, steps, from } = self;
        let tiles = match (self.panels(), *rows > SIDE) {
            (2, _) => "1x4",
            (_, true) => "2x2",
            (_, false) => "1x2",
        };
        write!(f, "{tiles} tiles, {rows} rows, {cols} columns, {steps} words of depth, sums from {from:?}")
    }
}

/// Of one panel and of two.
const COLS: [usize; 10] = [1, 15, 16, 17, 31, 32, 33, 47, 49, 64];
/// Ragged, whole, and several steps of the unit.
const STEPS: [usize; 6] = [1, 15, 16, 17, 32, 47];

/// Every number of rows with each of the columns and depths, and every start.
pub(super) fn variants() -> impl Iterator<Item = Variant> {
    let with_rows = |rows: usize| {
        let cols = COLS.into_iter().filter(move |&cols| rows <= SIDE || cols <= PANEL_COLS);
        cols.flat_map(move |cols| STEPS.into_iter().map(move |steps| (rows, cols, steps)))
    };
    let from = [From::Zero, From::Bias, From::Output];
    (1..=ROWS).flat_map(with_rows).enumerate().map(move |(index, (rows, cols, steps))| {
        // Rows and columns come round in other periods than the starts: each shape of tiles meets each start.
        Variant { rows, cols, steps, from: from[(index + index / from.len()) % from.len()] }
    })
}

/// Runs every variant on `unit`.
///
/// # Errors
/// The first variant whose result differs from plain sums in any bit, or that writes outside its part of the output.
///
/// # Safety
/// The machine must have what `unit` runs on.
pub(super) unsafe fn every_variant(unit: &mut impl TileUnit) -> Result<(), Variant> {
    // SAFETY: passed on from the caller.
    unsafe { each_of(variants(), unit) }
}

/// # Safety
/// As [`every_variant`].
unsafe fn each_of(variants: impl Iterator<Item = Variant>, unit: &mut impl TileUnit) -> Result<(), Variant> {
    for variant in variants {
        let case = Case::new(variant);
        // SAFETY: passed on from the caller.
        let got = unsafe { case.run(unit) };
        if got.iter().zip(case.want()).any(|(got, want)| got.to_bits() != want.to_bits()) {
            return Err(variant);
        }
    }
    Ok(())
}

/// Elements behind each row of the output that must stay as they are.
const MARGIN: usize = 3;
/// Words behind each row of A and each panel of B: strides are not sizes.
const GAP: usize = SIDE;

/// Operands of one call.
struct Case {
    variant: Variant,
    a: Vec<u32>,
    a_stride: usize,
    b: Vec<u32>,
    panel_stride: usize,
    bias: Vec<f32>,
    /// What the output holds before.
    before: Vec<f32>,
}

/// A small integer that depends on all of `at`.
fn integer(at: usize, seed: usize) -> f32 {
    ((at * 7 + at / 13 + seed * 5) % 11) as f32 - 5.0
}

impl Variant {
    fn panels(self) -> usize {
        self.cols.div_ceil(PANEL_COLS)
    }

    fn out_stride(self) -> usize {
        self.cols + MARGIN
    }
}

impl Case {
    fn new(variant: Variant) -> Self {
        let Variant { rows, cols, steps, .. } = variant;
        let padded = steps.next_multiple_of(SIDE);
        let (a_stride, panel_stride) = (padded + GAP, steps * PANEL_COLS + GAP);
        let half = |at: usize, seed| half::bf16::from_f32(integer(at, seed)).to_bits();
        let word = |at: usize, seed| u32::from(half(2 * at, seed)) | u32::from(half(2 * at + 1, seed)) << 16;
        let mut a: Vec<u32> = (0..rows * a_stride).map(|at| word(at, 1)).collect();
        for row in a.chunks_exact_mut(a_stride) {
            row[steps..padded].fill(0);
        }
        a.truncate((rows - 1) * a_stride + padded);
        let b = (0..variant.panels() * panel_stride).map(|at| word(at, 2)).collect();
        let bias = (0..cols).map(|col| integer(col, 3)).collect();
        let before = (0..rows * variant.out_stride()).map(|at| integer(at, 4)).collect();
        Self { variant, a, a_stride, b, panel_stride, bias, before }
    }

    /// The output after the kernel.
    ///
    /// # Safety
    /// As [`every_variant`].
    unsafe fn run(&self, unit: &mut impl TileUnit) -> Vec<f32> {
        let Variant { rows, cols, steps, from } = self.variant;
        let mut out = self.before.clone();
        let start = match from {
            From::Zero => Start::Zero,
            From::Bias => Start::Bias(&self.bias),
            From::Output => Start::Output,
        };
        let tile = Tile {
            rows,
            panels: self.variant.panels(),
            cols,
            steps,
            a: &self.a,
            a_stride: self.a_stride,
            b: &self.b,
            panel_stride: self.panel_stride,
            next: 0,
            out: out.as_mut_ptr(),
            out_stride: self.variant.out_stride(),
            start,
            streams: false,
        };
        // SAFETY: the caller's machine; the operands have the sizes that `micro::run` checks, `out` covers the tile.
        unsafe { run_on(unit, &tile) };
        out
    }

    /// The same in plain loops.
    fn want(&self) -> Vec<f32> {
        let Variant { rows, cols, steps, from } = self.variant;
        let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        let mut out = self.before.clone();
        for (row, out) in out.chunks_exact_mut(self.variant.out_stride()).enumerate().take(rows) {
            for (col, out) in out.iter_mut().enumerate().take(cols) {
                let panel = &self.b[col / PANEL_COLS * self.panel_stride..];
                let terms = (0..steps).map(|p| {
                    let x = halves(self.a[row * self.a_stride + p]);
                    let w = halves(panel[p * PANEL_COLS + col % PANEL_COLS]);
                    x[0] * w[0] + x[1] * w[1]
                });
                let start = match from {
                    From::Zero => 0.0,
                    From::Bias => self.bias[col],
                    From::Output => *out,
                };
                *out = start + terms.sum::<f32>();
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    //! The check on the model of the tiles, right and with one fault at a time.

    use super::super::model::Model;
    use super::super::{Sums, TileUnit};
    use super::*;

    /// What a faulty unit gets wrong.
    #[derive(Debug, Clone, Copy)]
    enum Fault {
        /// One element of one tile of sums, when so many rows are configured, wide or not.
        Element { rows: [usize; 2], wide: bool, sum: usize, row: usize, col: usize },
        /// The product of one kind: `one_by_two` on sums 0 and 1, on 2 and 3, `two_by_two`.
        Product(usize),
        /// Every product after the first so many since `configure`: depth.
        AfterSteps(usize),
        /// The distance between rows of A.
        Stride,
        /// The values that the sums start from.
        Load,
    }

    struct Faulty {
        model: Model,
        fault: Fault,
        configured: ([usize; 2], bool),
        products: usize,
    }

    impl Faulty {
        /// The operand in place of A: none of the product if the fault is in it.
        fn loses(&mut self, kind: usize) -> bool {
            self.products += usize::from(kind != 1);
            match self.fault {
                Fault::Product(bad) => bad == kind,
                Fault::AfterSteps(steps) => self.products > steps,
                _ => false,
            }
        }

        fn stride(&self, a_stride: usize) -> usize {
            if matches!(self.fault, Fault::Stride) { SIDE } else { a_stride }
        }
    }

    impl TileUnit for Faulty {
        fn configure(&mut self, rows: [usize; 2], wide: bool) {
            (self.configured, self.products) = ((rows, wide), 0);
            self.model.configure(rows, wide);
        }

        unsafe fn load(&mut self, sums: &Sums, count: usize) {
            let zeros = Sums([[0.0; SIDE * SIDE]; 4]);
            // SAFETY: passed on from the caller.
            unsafe { self.model.load(if matches!(self.fault, Fault::Load) { &zeros } else { sums }, count) };
        }

        unsafe fn store(&mut self, sums: &mut Sums, count: usize) {
            // SAFETY: passed on from the caller.
            unsafe { self.model.store(sums, count) };
            if let Fault::Element { rows, wide, sum, row, col } = self.fault
                && self.configured == (rows, wide)
            {
                sums.0[sum][row * SIDE + col] += 1.0;
            }
        }

        unsafe fn one_by_two<const SECOND: bool>(&mut self, a: *const u32, a_stride: usize, b: *const u32) {
            if !self.loses(usize::from(SECOND)) {
                // SAFETY: passed on from the caller; a smaller stride stays inside A.
                unsafe { self.model.one_by_two::<SECOND>(a, self.stride(a_stride), b) };
            }
        }

        unsafe fn two_by_two(&mut self, a: [*const u32; 2], a_stride: usize, b: *const u32) {
            if !self.loses(2) {
                // SAFETY: as above.
                unsafe { self.model.two_by_two(a, self.stride(a_stride), b) };
            }
        }
    }

    impl Faulty {
        fn new(fault: Fault) -> Self {
            Self { model: Model::default(), fault, configured: ([0; 2], false), products: 0 }
        }
    }

    #[track_caller]
    fn found(fault: Fault) -> Variant {
        // SAFETY: a model runs anywhere.
        unsafe { every_variant(&mut Faulty::new(fault)) }.expect_err(&format!("{fault:?} must be found"))
    }

    #[test]
    fn a_right_unit_passes() {
        // SAFETY: a model runs anywhere.
        assert_eq!(unsafe { every_variant(&mut Model::default()) }, Ok(()));
    }

    /// All 48 shapes of tiles that a call can have, each tile of sums at its corners.
    #[test]
    fn a_fault_in_one_element_of_any_shape_is_found() {
        let narrow = (1..=ROWS).map(|rows| (rows, false));
        for (rows, wide) in narrow.chain((1..=SIDE).map(|rows| (rows, true))) {
            let parts = [rows.min(SIDE), rows.saturating_sub(SIDE)];
            for sum in 0..4 {
                let lower = !wide && sum >= 2;
                let last = parts[usize::from(lower)];
                for row in [0, last.saturating_sub(1)].into_iter().take(last) {
                    for col in [0, SIDE - 1] {
                        let fault = Fault::Element { rows: parts, wide, sum, row, col };
                        // Only its own variants can show it: the others would take the test's time.
                        let own = variants().filter(|v| (v.rows, v.panels() == 2) == (rows, wide));
                        // SAFETY: a model runs anywhere.
                        let result = unsafe { each_of(own, &mut Faulty::new(fault)) };
                        assert!(result.is_err(), "{fault:?} must be found");
                    }
                }
            }
        }
    }

    #[test]
    fn a_fault_in_any_kind_of_product_is_found_and_named() {
        for (kind, name) in ["1x2", "1x4", "2x2"].into_iter().enumerate() {
            let variant = found(Fault::Product(kind));
            assert!(variant.to_string().starts_with(name), "{variant}");
        }
        for steps in 0..3 {
            let variant = found(Fault::AfterSteps(steps));
            assert!(variant.steps > steps * SIDE, "{variant}");
        }
        assert!(found(Fault::Stride).rows > 1);
        assert_ne!(found(Fault::Load).from, From::Zero);
    }

    #[test]
    fn each_shape_of_tiles_meets_each_start_and_depth() {
        let shapes = |v: &Variant| (v.panels(), v.rows > SIDE);
        for shape in [(1, false), (2, false), (1, true)] {
            for from in [From::Zero, From::Bias, From::Output] {
                for steps in STEPS {
                    let meets = |v: Variant| shapes(&v) == shape && v.from == from && v.steps == steps;
                    assert!(variants().any(meets), "{shape:?} {from:?} {steps}");
                }
            }
        }
    }
}
