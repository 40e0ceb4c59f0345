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
mod micro;
mod pack;
mod rounded;
mod rows;
#[cfg(test)]
mod tests;

use self::ahead::Ahead;
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Isa, buffer, parallel};
pub use pack::bf16_round;
pub use rounded::Rounded;
pub(crate) use rows::{Panels, panel_words, with_packed_rows};

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
            let last = (outer - 1) * outer_stride + (inner - 1) * inner_stride;
            assert!(last < values.len(), "an operand of {outer} x {inner} must lie inside its {} values", values.len());
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
        let words_per_col = Format::of_b(precision).words(weights.inner);
        let panels = weights.outer.div_ceil(PANEL_COLS);
        let mut words = buffer::Words::zeros(panels * PANEL_COLS * words_per_col);
        let shared = SharedMut::new(words.as_mut_slice());
        parallel::for_each_if(weights.outer * weights.inner, LEAST_WORK, panels, |panel| {
            let len = PANEL_COLS * words_per_col;
            // SAFETY: each panel belongs to one task.
            let to = unsafe { shared.slice(panel * len, len) };
            pack::pack(isa, Format::of_b(precision), weights, panel * PANEL_COLS, PANEL_COLS, to);
        });
        Self { words, shape: [weights.outer, weights.inner], precision }
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

impl Group<'_> {
    fn m(&self) -> usize {
        self.a.outer
    }
    fn n(&self) -> usize {
        self.b.shape()[0]
    }
    fn k(&self) -> usize {
        self.a.inner
    }
    fn out_end(&self) -> usize {
        self.out_offset + (self.m() - 1) * self.out_stride + self.n()
    }
    /// Tiles of A. Their sizes change no result.
    fn tiles(&self, format: Format) -> usize {
        self.m().div_ceil(self.tile_rows(format))
    }
    /// Rows of each tile but the last: even ones, because a tile of a few rows takes as long as one of several.
    fn tile_rows(&self, format: Format) -> usize {
        self.m().div_ceil(self.m().div_ceil(format.tile_rows()).max(1)).max(1)
    }
    fn panels(&self) -> usize {
        self.n().div_ceil(PANEL_COLS)
    }
    /// Columns of a task, those past the end of its last panel too.
    fn task_cols(&self, task: Task) -> usize {
        TASK_PANELS.min(self.panels() - task.first_panel) * PANEL_COLS
    }
    /// Whether each panel of B has one task, which packs it where it is multiplied, without a way through memory.
    fn packs_in_tasks(&self, format: Format) -> bool {
        self.tiles(format) <= TASK_TILES
    }
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

/// Tiles of A in one task: 192 rows, or 512.
const TASK_TILES: usize = 16;
/// Panels of B in one task: 128 columns.
const TASK_PANELS: usize = 4;
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

/// Steps of `p` (words of B) between two visits of the same tile of C. A panel's part then comes from the second-level cache,
/// which is fast enough; with 192 steps, which fit the first, C is loaded and stored more often (two Zen 4 cores, 2026-11-25,
/// `cargo xtask bench products`: 2,048 rows of 1,024 times 4,096 columns in 46.9 instead of 44.7 ms).
const BLOCK_WORDS: usize = 512;
/// The same for tiles, as it was chosen without such a machine at hand.
const AMX_BLOCK_WORDS: usize = 192;
/// Elements of the output from which on it goes past the caches: as many bytes as they hold.
const STREAMED: usize = 8 << 20;
/// Tiles or panels packed per task.
const PACK_UNITS: usize = 8;
/// Multiply-adds below which a product is not worth a second thread.
const LEAST_WORK: usize = 1 << 18;

#[derive(Debug, Clone, Copy)]
struct Task {
    group: usize,
    first_tile: usize,
    first_panel: usize,
}

/// Where each group's packed operands start.
struct Plan {
    a_format: Format,
    b_format: Format,
    /// First word of A and of B of each group, and the ends.
    a_starts: Vec<usize>,
    b_starts: Vec<usize>,
    /// (group, first tile) and (group, first panel) of each packing task.
    pack_a: Vec<(usize, usize)>,
    pack_b: Vec<(usize, usize)>,
    tasks: Vec<Task>,
    work: usize,
    /// Whether outputs are too large to be found in a cache.
    streams: bool,
}

impl Plan {
    fn new(isa: Isa, precision: Precision, groups: &[Group<'_>]) -> Self {
        let (a_format, b_format) = (Format::of_a(isa, precision), Format::of_b(precision));
        let mut plan = Self {
            a_format,
            b_format,
            a_starts: vec![0],
            b_starts: vec![0],
            pack_a: Vec::new(),
            pack_b: Vec::new(),
            tasks: Vec::new(),
            work: 0,
            streams: groups.iter().map(|group| group.m() * group.n()).sum::<usize>() >= STREAMED,
        };
        let (mut a_words, mut b_words) = (0, 0);
        for (index, group) in groups.iter().enumerate() {
            if group.m() > 0 && group.n() > 0 {
                a_words += group.m() * a_format.words(group.k());
                plan.pack_a.extend((0..group.tiles(a_format)).step_by(PACK_UNITS).map(|tile| (index, tile)));
                if !matches!(group.b, Weights::Packed(_)) && !group.packs_in_tasks(a_format) {
                    b_words += group.panels() * PANEL_COLS * b_format.words(group.k());
                    plan.pack_b.extend((0..group.panels()).step_by(PACK_UNITS).map(|panel| (index, panel)));
                }
                for first_tile in (0..group.tiles(a_format)).step_by(TASK_TILES) {
                    for first_panel in (0..group.panels()).step_by(TASK_PANELS) {
                        plan.tasks.push(Task { group: index, first_tile, first_panel });
                    }
                }
                plan.work += group.m() * group.n() * group.k();
            }
            a_words = a_words.next_multiple_of(16);
            plan.a_starts.push(a_words);
            plan.b_starts.push(b_words);
        }
        plan
    }

    /// The part of weights that are packed in tasks from step `start` on.
    fn part<'a>(&self, group: &Group<'_>, weights: Weights<'a>, start: usize, block: usize) -> Weights<'a> {
        // Words of two values, or of one.
        let per_word = if self.b_format == Format::F32 { 1 } else { 2 };
        let first = start * per_word;
        weights.part(first, (block * per_word).min(group.k() - first))
    }
}

/// Computes every group's product into `out`; elements of `out` outside the groups stay as they are.
///
/// # Panics
/// If this machine cannot run `isa`, a group's operands disagree in `k`, its bias has not `n` entries, or the groups' parts of `out` overlap or leave it.
pub fn gemm(isa: Isa, precision: Precision, groups: &[Group<'_>], out: &mut [f32]) {
    isa.require();
    check(precision, groups, out.len());
    // SAFETY: `out` is borrowed for the whole call, and the groups' parts of it do not overlap.
    unsafe { run(isa, precision, groups, SharedMut::new(out), true) }
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
        run(isa, precision, groups, SharedMut::from_raw(out.as_mut_ptr(), len), true);
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
    unsafe { run(isa, precision, &[group], out, false) }
}

/// # Safety
/// The groups' parts of `out` must exist, belong to the caller and not overlap.
unsafe fn run(isa: Isa, precision: Precision, groups: &[Group<'_>], out: SharedMut<f32>, threads: bool) {
    let plan = Plan::new(isa, precision, groups);
    let least = if threads { LEAST_WORK } else { usize::MAX / 2 };
    let a_end = plan.a_starts[groups.len()];
    let b_end = plan.b_starts[groups.len()];
    buffer::with_scratch(a_end + b_end, |scratch| {
        let (a_words, b_words) = scratch.split_at_mut(a_end);
        pack_operands(isa, &plan, groups, least, a_words, b_words);
        let (a_words, b_words) = (&*a_words, &*b_words);
        parallel::for_each_if(plan.work, least, plan.tasks.len(), |index| {
            let (task, group) = (plan.tasks[index], &groups[plan.tasks[index].group]);
            let a = &a_words[plan.a_starts[task.group]..];
            let first_panel = task.first_panel * PANEL_COLS * plan.b_format.words(group.k());
            let b = match group.b {
                Weights::Packed(packed) => TaskPanels::Packed(&packed.words.as_slice()[first_panel..]),
                weights if group.packs_in_tasks(plan.a_format) => TaskPanels::Unpacked(weights),
                Weights::Plain(_) | Weights::Rounded(_) => {
                    TaskPanels::Packed(&b_words[plan.b_starts[task.group] + first_panel..])
                }
            };
            let next = plan.tasks.get(index + 1).map(|next| (&groups[next.group], *next));
            run_task(isa, &plan, (group, task), a, (b, next), out);
        });
    });
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

fn pack_operands(isa: Isa, plan: &Plan, groups: &[Group<'_>], least: usize, a_words: &mut [u32], b_words: &mut [u32]) {
    let (a, b) = (SharedMut::new(a_words), SharedMut::new(b_words));
    parallel::for_each_if(plan.work, least, plan.pack_a.len() + plan.pack_b.len(), |index| {
        if let Some(&(g, first)) = plan.pack_b.get(index) {
            let words = plan.b_format.words(groups[g].k());
            let panels = PACK_UNITS.min(groups[g].panels() - first);
            // SAFETY: `plan` gives each panel of each group a part of its own.
            let to = unsafe { b.slice(plan.b_starts[g] + first * PANEL_COLS * words, panels * PANEL_COLS * words) };
            groups[g].b.pack(isa, plan.b_format, (first * PANEL_COLS, panels * PANEL_COLS), to);
        } else {
            let (g, first) = plan.pack_a[index - plan.pack_b.len()];
            let words = plan.a_format.words(groups[g].k());
            let tile_rows = groups[g].tile_rows(plan.a_format);
            let row = first * tile_rows;
            let rows = (PACK_UNITS * tile_rows).min(groups[g].m() - row);
            // SAFETY: `plan` gives each tile of each group a part of its own.
            let to = unsafe { a.slice(plan.a_starts[g] + row * words, rows * words) };
            pack::pack_run(isa, plan.a_format, &groups[g].a, (row, rows), tile_rows, to);
        }
    });
}

/// The panels of one task.
#[derive(Clone, Copy)]
enum TaskPanels<'a> {
    /// `[panel][p][32]`, beginning with the task's first.
    Packed(&'a [u32]),
    /// To be packed here, part by part.
    Unpacked(Weights<'a>),
}

/// A task and the group it is of.
type TaskOf<'g, 'a> = (&'g Group<'a>, Task);

/// One block of tiles times one block of panels, over all of `p`; after it comes, if there is one, the task beside `b`.
fn run_task(
    isa: Isa,
    plan: &Plan,
    (group, task): TaskOf<'_, '_>,
    a: &[u32],
    b: (TaskPanels<'_>, Option<TaskOf<'_, '_>>),
    out: SharedMut<f32>,
) {
    if !matches!(group.start, Start::Added) {
        return run_block(isa, plan, (group, task), a, b, (out, [0, 0]));
    }
    // The sums are finished in a block of their own, which stays in the cache.
    let tile_rows = group.tile_rows(plan.a_format);
    let (row, col) = (task.first_tile * tile_rows, task.first_panel * PANEL_COLS);
    let (rows, cols) = ((TASK_TILES * tile_rows).min(group.m() - row), (TASK_PANELS * PANEL_COLS).min(group.n() - col));
    buffer::with_scratch_f32(rows * cols, |block| {
        let sums = Group { start: Start::Zero, out_offset: 0, out_stride: cols, ..*group };
        run_block(isa, plan, (&sums, task), a, b, (SharedMut::new(block), [row, col]));
        for (index, terms) in block.chunks_exact(cols).enumerate() {
            // SAFETY: the task's part of the output, which the caller of `run` promised to be ours.
            let into = unsafe { out.slice(group.out_offset + (row + index) * group.out_stride + col, cols) };
            vectorize!(isa, (into: &mut [f32], terms: &[f32]) {
                into.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            });
        }
    });
}

/// The same into `out`, whose first element is the product's at `origin`.
fn run_block(
    isa: Isa,
    plan: &Plan,
    (group, task): TaskOf<'_, '_>,
    a: &[u32],
    (b, next): (TaskPanels<'_>, Option<TaskOf<'_, '_>>),
    out: (SharedMut<f32>, [usize; 2]),
) {
    let b_words = plan.b_format.words(group.k());
    let is_one_tile = group.tiles(plan.a_format) - task.first_tile == 1;
    let block = match plan.a_format {
        // With one tile nothing of B is read twice: go through it in one sweep.
        _ if is_one_tile && matches!(b, TaskPanels::Packed(_)) => b_words.max(1),
        Format::Rows => AMX_BLOCK_WORDS,
        _ => BLOCK_WORDS,
    };
    for start in (0..b_words.max(1)).step_by(block) {
        let steps = start..(start + block).min(b_words);
        match b {
            TaskPanels::Packed(words) => {
                let panels = StepPanels { words: &words[start * PANEL_COLS..], stride: PANEL_COLS * b_words };
                run_steps(isa, plan, (group, task), a, (panels, steps, Ahead::NONE), out);
            }
            TaskPanels::Unpacked(weights) => {
                let part = plan.part(group, weights, start, block);
                let cols = group.task_cols(task);
                let after = start + block;
                let ahead = if after < b_words {
                    Ahead::of(&plan.part(group, weights, after, block), (task.first_panel * PANEL_COLS, cols))
                } else {
                    next.map_or(Ahead::NONE, |(group, task)| {
                        let part = plan.part(group, group.b, 0, block);
                        Ahead::of(&part, (task.first_panel * PANEL_COLS, group.task_cols(task)))
                    })
                };
                buffer::with_scratch(cols * steps.len(), |words| {
                    part.pack(isa, plan.b_format, (task.first_panel * PANEL_COLS, cols), words);
                    let panels = StepPanels { words, stride: PANEL_COLS * steps.len() };
                    run_steps(isa, plan, (group, task), a, (panels, steps.clone(), ahead), out);
                });
            }
        }
    }
}

/// Panels from one step on, with the words from one to the next.
#[derive(Clone, Copy)]
struct StepPanels<'a> {
    words: &'a [u32],
    stride: usize,
}

/// The part of a task's product that `steps` of `p` make.
fn run_steps(
    isa: Isa,
    plan: &Plan,
    (group, task): (&Group<'_>, Task),
    a: &[u32],
    (b, steps, mut ahead): (StepPanels<'_>, std::ops::Range<usize>, Ahead),
    (out, origin): (SharedMut<f32>, [usize; 2]),
) {
    let a_words = plan.a_format.words(group.k());
    let tile_rows = group.tile_rows(plan.a_format);
    let tiles = task.first_tile..(task.first_tile + TASK_TILES).min(group.tiles(plan.a_format));
    let panels = TASK_PANELS.min(group.panels() - task.first_panel);
    let is_last = steps.end == plan.b_format.words(group.k());
    let (start, steps) = (steps.start, steps.len());
    let lines_per_tile = ahead.lines().div_ceil(panels * tiles.len());
    let mut panel = 0;
    while panel < panels {
        let rows = tile_rows.min(group.m() - tiles.start * tile_rows);
        let wide = if tiles.len() == 1 { micro::panels_at_once(plan.a_format, rows).min(panels - panel) } else { 1 };
        let wide = if wide == 3 { 2 } else { wide };
        // What is multiplied after this: the same part of the next panel (which may be the next task's), or the next part of
        // the first.
        let next = if tiles.len() == 1 || panel + wide < panels {
            (wide * b.stride) as isize
        } else {
            (steps * PANEL_COLS) as isize - (panel * b.stride) as isize
        };
        let col = (task.first_panel + panel) * PANEL_COLS;
        let cols = (wide * PANEL_COLS).min(group.n() - col);
        for tile in tiles.clone() {
            let row = tile * tile_rows;
            let rows = tile_rows.min(group.m() - row);
            let first = row * a_words;
            let a = match plan.a_format {
                Format::Wide => &a[first + 2 * start * rows..][..2 * steps * rows],
                Format::Rows => &a[first + start..][..(rows - 1) * a_words + steps.next_multiple_of(16)],
                _ => &a[first + start * rows..][..steps * rows],
            };
            let begin = match group.start {
                Start::Bias(bias) if start == 0 => Start::Bias(&bias[col..col + cols]),
                Start::Zero if start == 0 => Start::Zero,
                Start::Added => unreachable!("sums that are added have a block of their own"),
                _ => Start::Output,
            };
            ahead.fetch(lines_per_tile);
            let to = group.out_offset + (row - origin[0]) * group.out_stride + (col - origin[1]);
            micro::run(
                isa,
                plan.a_format,
                &micro::Tile {
                    rows,
                    panels: wide,
                    cols,
                    steps,
                    a,
                    a_stride: a_words,
                    b: &b.words[panel * b.stride..],
                    panel_stride: b.stride,
                    next,
                    out: out.at(to),
                    out_stride: group.out_stride,
                    start: begin,
                    streams: plan.streams && is_last,
                },
            );
        }
        panel += wide;
    }
}
