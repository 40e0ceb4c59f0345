//! The matrix product under every other operation: groups of products of different sizes over one queue of tiles.
//!
//! Each group computes `C[i, j] = start + sum_p A[i, p] B[j, p]` with f32 sums. Operands are packed first:
//!
//! ```text
//! A: tiles of up to 12 rows     [tile][p][rows]           one word per f32, or per pair of bf16 (p, p + 1)
//! B: panels of 32 columns       [panel][p][32]
//! ```
//!
//! # One order of summation
//! Each element of `C` is one chain of fused multiply-adds over `p`, beginning with [`Start`]: in ascending order for f32,
//! and in the order 1, 0, 3, 2, 5, 4, … for bf16, which is what `vdpbf16ps` does in hardware (checked on it). So a row
//! of `C` has the same bits whatever other rows are in the batch, on any number of threads, and with any [`Isa`] but one:
//! [`Isa::Amx`] sums the even and the odd products of each 32 values of `p` apart and adds both to the element, as its tiles
//! do, so its bits in bf16 are its own (and as independent of batch and threads). `vdpbf16ps` and tiles take numbers below
//! 2^-126 as zero.

mod ahead;
mod beside;
mod micro;
mod pack;
mod rounded;
mod rows;
mod run;
#[cfg(test)]
mod tests;

use crate::parallel::SharedMut;
use crate::{Isa, Result, buffer, parallel};
pub use pack::bf16_round;
pub use rounded::Rounded;
pub(crate) use rows::{Panels, panel_words, with_packed_rows, with_single_rows};
use run::LEAST_WORK;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// What the multiplier reads; sums are f32 in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Inputs as they are.
    #[default]
    F32,
    /// Inputs rounded to bf16, to nearest even.
    Bf16,
}

/// Columns of a panel of B.
pub(crate) const PANEL_COLS: usize = 32;

/// A `[outer, inner]` view into f32 values; the products sum over `inner`.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    values: &'a [f32],
    outer: usize,
    inner: usize,
    outer_stride: usize,
    inner_stride: usize,
}

impl<'a> Operand<'a> {
    /// `values` as a row-major `[outer, inner]` matrix with `row_stride` elements from row to row.
    ///
    /// # Panics
    /// If the last row ends outside `values`.
    pub fn rows(values: &'a [f32], outer: usize, inner: usize, row_stride: usize) -> Self {
        Self::strided(values, [outer, inner], [row_stride, 1])
    }

    /// The transpose of a row-major `[inner, outer]` matrix with `row_stride` elements from row to row.
    ///
    /// # Panics
    /// If the last row ends outside `values`.
    pub fn columns(values: &'a [f32], outer: usize, inner: usize, row_stride: usize) -> Self {
        Self::strided(values, [outer, inner], [1, row_stride])
    }

    /// The `len` values of the inner dimension from `first` on.
    fn part(self, first: usize, len: usize) -> Self {
        let values = if len == 0 { &[] } else { &self.values[first * self.inner_stride..] };
        Self { values, inner: len, ..self }
    }

    fn strided(values: &'a [f32], [outer, inner]: [usize; 2], [outer_stride, inner_stride]: [usize; 2]) -> Self {
        if outer > 0 && inner > 0 {
            let span = |count: usize, stride: usize| (count - 1).checked_mul(stride);
            let last = span(outer, outer_stride).zip(span(inner, inner_stride)).and_then(|(a, b)| a.checked_add(b));
            assert!(
                last.is_some_and(|last| last < values.len()),
                "an operand of {outer} x {inner} must lie inside its {} values",
                values.len()
            );
        }
        Self { values, outer, inner, outer_stride, inner_stride }
    }
}

/// What the sums of a product start from.
#[derive(Debug, Clone, Copy, Default)]
pub enum Start<'a> {
    /// Zero.
    #[default]
    Zero,
    /// One value per column, `[n]`.
    Bias(&'a [f32]),
    /// What the output holds.
    Output,
    /// Zero; the finished sums are then added to what the output holds.
    Added,
}

impl<'a> Start<'a> {
    /// The bias if there is one.
    pub fn bias(bias: Option<&'a [f32]>) -> Self {
        bias.map_or(Self::Zero, Self::Bias)
    }

    /// Of the piece of a product that begins at `first` of its inner dimension.
    pub(crate) fn at(first: usize) -> Self {
        if first == 0 { Self::Zero } else { Self::Output }
    }
}

/// The right side of a product, `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// Packed on the way.
    Plain(Operand<'a>),
    /// Rounded before, packed on the way; for [`Precision::Bf16`].
    Rounded(Rounded<'a>),
    /// Packed before.
    Packed(&'a PackedWeights),
}

impl Weights<'_> {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Plain(operand) => [operand.outer, operand.inner],
            Self::Rounded(rounded) => [rounded.outer, rounded.inner],
            Self::Packed(packed) => packed.shape,
        }
    }

    /// The `len` values of the inner dimension from `first` on, of weights that are not packed.
    fn part(self, first: usize, len: usize) -> Self {
        match self {
            Self::Plain(operand) => Self::Plain(operand.part(first, len)),
            Self::Rounded(rounded) => Self::Rounded(rounded.part(first, len)),
            Self::Packed(_) => self,
        }
    }

    /// Packs columns of C `first..first + cols` of weights that are not.
    fn pack(&self, isa: Isa, format: Format, (first, cols): (usize, usize), to: &mut [u32]) {
        match self {
            Self::Plain(operand) => pack::pack_run(isa, format, operand, (first, cols), PANEL_COLS, to),
            Self::Rounded(rounded) => rounded::pack(isa, rounded, (first, cols), to),
            Self::Packed(_) => unreachable!("packed weights are read as they are"),
        }
    }
}

impl<'a> From<Rounded<'a>> for Weights<'a> {
    fn from(rounded: Rounded<'a>) -> Self {
        Self::Rounded(rounded)
    }
}

impl<'a> From<Operand<'a>> for Weights<'a> {
    fn from(operand: Operand<'a>) -> Self {
        Self::Plain(operand)
    }
}

/// Weights in the layout the micro-kernels read, `[panel][k][32]`: for weights that are used again.
#[derive(Debug, Clone)]
pub struct PackedWeights {
    words: buffer::Words,
    shape: [usize; 2],
    precision: Precision,
}

impl PackedWeights {
    /// Packs an `[n, k]` operand, on all threads.
    ///
    /// # Panics
    /// If this machine cannot run `isa`.
    pub fn new(isa: Isa, precision: Precision, weights: &Operand<'_>) -> Self {
        isa.require();
        let mut packed = Self::zeros(precision, [weights.outer, weights.inner], buffer::Words::zeros);
        let (format, len) = (Format::of_b(precision), packed.panel_words());
        let shared = SharedMut::new(packed.words.as_mut_slice());
        let panels = weights.outer.div_ceil(PANEL_COLS);
        parallel::for_each_if(weights.outer * weights.inner, LEAST_WORK, panels, |panel| {
            // SAFETY: each panel belongs to one task.
            let to = unsafe { shared.slice(panel * len, len) };
            pack::pack(isa, format, weights, panel * PANEL_COLS, PANEL_COLS, to);
        });
        packed
    }

    /// Packs an `[n, k]` matrix of which `rows` gives some rows at a time, row-major, on all threads at once.
    ///
    /// # Errors
    /// Those of `rows`, one of them if there are several.
    ///
    /// # Panics
    /// If this machine cannot run `isa`, or `rows` gives more or fewer values.
    pub fn from_rows(
        isa: Isa,
        precision: Precision,
        [n, k]: [usize; 2],
        rows: impl Fn(Range<usize>) -> Result<Vec<f32>> + Sync,
    ) -> Result<Self> {
        isa.require();
        let mut packed = Self::zeros(precision, [n, k], buffer::Words::lasting);
        let (format, len) = (Format::of_b(precision), packed.panel_words());
        let shared = SharedMut::new(packed.words.as_mut_slice());
        rows_at_a_time([n, k], |range| {
            let values = rows(range.clone())?;
            let part = Operand::rows(&values, range.len(), k, k);
            for (at, panel) in (range.start / PANEL_COLS..range.end.div_ceil(PANEL_COLS)).enumerate() {
                // SAFETY: rows begin at a panel, so each panel belongs to one call.
                let to = unsafe { shared.slice(panel * len, len) };
                pack::pack(isa, format, &part, at * PANEL_COLS, PANEL_COLS, to);
            }
            Ok(())
        })?;
        Ok(packed)
    }

    fn zeros(precision: Precision, shape: [usize; 2], new_words: fn(usize) -> buffer::Words) -> Self {
        let words_per_col = Format::of_b(precision).words(shape[1]);
        let len = shape[0].next_multiple_of(PANEL_COLS) * words_per_col;
        Self { words: new_words(len), shape, precision }
    }

    fn panel_words(&self) -> usize {
        PANEL_COLS * Format::of_b(self.precision).words(self.shape[1])
    }

    /// `[n, k]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// What the values were rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.words.as_slice().len() * 4
    }

    /// What the products read.
    pub(crate) fn words(&self) -> &buffer::Words {
        &self.words
    }

    /// From what [`Self::words`] were; `None` if they are more or fewer than such a matrix has.
    pub(crate) fn of_words(precision: Precision, shape: [usize; 2], words: buffer::Words) -> Option<Self> {
        let len = shape[0].next_multiple_of(PANEL_COLS).checked_mul(Format::of_b(precision).words(shape[1]))?;
        (words.as_slice().len() == len).then_some(Self { words, shape, precision })
    }

    /// Row `row` of the weights, as it was rounded.
    ///
    /// # Panics
    /// If there is no such row or `to` has another length.
    pub fn copy_row(&self, row: usize, to: &mut [f32]) {
        let [rows, inner] = self.shape;
        assert!(row < rows && to.len() == inner, "row {row} of {rows}, {} values of {inner}", to.len());
        let words_per_col = Format::of_b(self.precision).words(inner);
        let panel = &self.words.as_slice()[row / PANEL_COLS * PANEL_COLS * words_per_col..];
        let word = |index: usize| panel[index * PANEL_COLS + row % PANEL_COLS];
        match self.precision {
            Precision::F32 => to.iter_mut().enumerate().for_each(|(p, value)| *value = f32::from_bits(word(p))),
            Precision::Bf16 => to.iter_mut().enumerate().for_each(|(p, value)| {
                let pair = word(p / 2);
                *value = f32::from_bits(if p % 2 == 0 { pair << 16 } else { pair & 0xffff_0000 });
            }),
        }
    }
}

/// Values of a matrix that a thread packs at a time: they stay in its cache from the source to the panel.
const PACKED_AT_ONCE: usize = 1 << 17;

/// Calls `work` for stretches of the rows of an `[n, k]` matrix that each begin at a panel, on all threads.
pub(crate) fn rows_at_a_time([n, k]: [usize; 2], work: impl Fn(Range<usize>) -> Result<()> + Sync) -> Result<()> {
    let each = (PACKED_AT_ONCE / k.max(1)).max(1).next_multiple_of(PANEL_COLS);
    let failed = Mutex::new(None);
    parallel::for_each_if(n * k, LEAST_WORK, n.div_ceil(each), |index| {
        if let Err(error) = work(index * each..n.min((index + 1) * each)) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// One product of a [`gemm`].
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// `[m, k]`
    pub a: Operand<'a>,
    /// `[n, k]`
    pub b: Weights<'a>,
    /// What the sums start from.
    pub start: Start<'a>,
    /// First element of this group's `C` in the output.
    pub out_offset: usize,
    /// Elements from one row of `C` to the next, at least `n`.
    pub out_stride: usize,
}

/// How words are laid out for a micro-kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// One f32 per word.
    F32,
    /// Two bf16 per word: the even one low.
    Pairs,
    /// One f32 per word that holds a bf16 value; an even number of them.
    Wide,
    /// As pairs, but row after row, each filled up to 16 words: what tiles are loaded from.
    Rows,
}

impl Format {
    fn of_a(isa: Isa, precision: Precision) -> Self {
        match (precision, isa) {
            (Precision::F32, _) => Self::F32,
            (Precision::Bf16, Isa::Amx) => Self::Rows,
            (Precision::Bf16, Isa::Avx512Bf16) => Self::Pairs,
            (Precision::Bf16, _) => Self::Wide,
        }
    }

    fn of_b(precision: Precision) -> Self {
        if precision == Precision::F32 { Self::F32 } else { Self::Pairs }
    }

    /// Words per row of A or column of B.
    pub(crate) fn words(self, k: usize) -> usize {
        match self {
            Self::F32 => k,
            Self::Pairs => k.div_ceil(2),
            Self::Wide => k.next_multiple_of(2),
            Self::Rows => k.div_ceil(2).next_multiple_of(16),
        }
    }

    /// Rows of a tile of A at most.
    pub(crate) fn tile_rows(self) -> usize {
        if self == Self::Rows { micro::amx::ROWS } else { 12 }
    }
}

/// Whether tiles of bf16 can be used here; asks the kernel for them at the first call.
pub(crate) fn has_amx() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return micro::amx::is_available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Runs `rounds` of tile products from registers, the ceiling of bf16 on [`Isa::Amx`]; returns the operations done.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) fn amx_rounds(rounds: usize) -> f64 {
    micro::amx::peak_rounds(rounds)
}

/// Computes every group's product into `out`; elements of `out` outside the groups stay as they are.
///
/// # Panics
/// If this machine cannot run `isa`, a group's operands disagree in `k`, its bias has not `n` entries, or the groups' parts of `out` overlap or leave it.
pub fn gemm(isa: Isa, precision: Precision, groups: &[Group<'_>], out: &mut [f32]) {
    isa.require();
    check(precision, groups, out.len());
    // SAFETY: `out` is borrowed for the whole call, and the groups' parts of it do not overlap.
    unsafe { run::run(isa, precision, groups, SharedMut::new(out), true) }
}

/// The groups' products as a new buffer of `len` elements.
///
/// # Panics
/// As [`gemm`]; or if the groups do not cover the buffer, or one of them starts from it.
pub fn gemm_new(isa: Isa, precision: Precision, groups: &[Group<'_>], len: usize) -> Vec<f32> {
    isa.require();
    let covered: usize = groups.iter().map(|g| g.m() * g.n()).sum();
    assert!(covered == len, "groups of {covered} elements must cover the {len} of the output");
    let starts_anew = |g: &Group<'_>| matches!(g.start, Start::Zero | Start::Bias(_));
    assert!(groups.iter().all(starts_anew), "a new output has nothing to start from");
    check(precision, groups, len);
    let mut out = Vec::with_capacity(len);
    // SAFETY: the groups lie inside the buffer, do not overlap and cover it: every element is written, none is read
    // before, and `len` was reserved.
    unsafe {
        run::run(isa, precision, groups, SharedMut::from_raw(out.as_mut_ptr(), len), true);
        out.set_len(len);
    }
    out
}

/// One product on the calling thread, into memory that other threads may be writing other parts of.
///
/// # Safety
/// The group's part of `out` must belong to the caller.
pub(crate) unsafe fn gemm_part(isa: Isa, precision: Precision, group: Group<'_>, out: SharedMut<f32>) {
    check(precision, &[group], out.len());
    // SAFETY: passed on from the caller.
    unsafe { run::run(isa, precision, &[group], out, false) }
}

fn check(precision: Precision, groups: &[Group<'_>], out_len: usize) {
    let mut spans: Vec<(usize, usize)> = Vec::with_capacity(groups.len());
    for group in groups {
        assert_eq!(group.a.inner, group.b.shape()[1], "both operands must have the same inner size");
        if let Weights::Packed(packed) = group.b {
            assert_eq!(packed.precision, precision, "the weights must be packed in the precision of the product");
        }
        if let Weights::Rounded(_) = group.b {
            assert_eq!(precision, Precision::Bf16, "weights that were rounded to bf16 are multiplied so");
        }
        if let Start::Bias(bias) = group.start {
            assert_eq!(bias.len(), group.n(), "bias must have one entry per column");
        }
        if group.m() > 0 && group.n() > 0 {
            assert!(group.out_stride >= group.n() && group.out_end() <= out_len, "the product must fit its output");
            spans.push((group.out_offset, group.out_end()));
        }
    }
    spans.sort_unstable();
    assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "groups must not share output");
}
