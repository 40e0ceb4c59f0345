//! Matrix products with weights of 8 or 4 bits and inputs quantized on the way: less to read where reading is the limit.
//!
//! Weights are symmetric: `w ~ scale * q`, with one f32 scale per output for [`QuantFormat::Int8`] and one bf16 scale per
//! output and group of inputs for [`QuantFormat::Int4`]. They are rounded here, or come as integers that somebody else has made
//! ([`IntegerMatrix`]); the packed form keeps either as it is. Each input row is quantized to 8 bits with a scale of its own
//! (`max |x| / 127`) when the product is taken, so a row's result does not depend on the rows beside it. No scale but that
//! of zeros is below 2^-126, so that each has an inverse. Sums of products are integers, hence exact: every [`Isa`] gives
//! the same bits.
//!
//! ```text
//! inputs   [tile][k / 4][rows]                        four of a row per word, tiles of up to 12 rows (6 for 4 bits)
//! int8     [panel][k / 4][32]                         four of an output per word
//! int4     [panel][group]([16] [group_size / 8][32])  32 bf16 scales, then eight of an output per word
//! ```
//!
//! No gradients: training quantized weights is not the work of this crate.

mod cross_entropy;
mod integers;
mod micro;
mod pack;
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use cross_entropy::linear_cross_entropy;
pub use integers::{Grid, IntegerMatrix};
pub use reference::quantized_gemm as quantized_gemm_reference;

use crate::gemm::{PANEL_COLS, rows_at_a_time};
use crate::parallel::SharedMut;
use crate::{Isa, Result, Words, buffer, parallel};
use std::fmt;
use std::ops::Range;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantFormat {
    /// Integers of 8 bits (rounded here: -127 to 127), one f32 scale per output.
    Int8,
    /// Integers from -8 to 7, one bf16 scale per output and group of inputs.
    Int4 {
        /// Inputs that share a scale: a multiple of 32. The last group may be shorter.
        group_size: usize,
    },
}

impl QuantFormat {
    /// Groups of 32: 4.5 bits per weight.
    pub const INT4: Self = Self::Int4 { group_size: 32 };

    /// Refuses a group that no weights can be stored in.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) with the sizes that can be.
    pub fn check_groups(self) -> Result<()> {
        self.validate(0).map_err(crate::Error::Argument)
    }

    /// Inputs, with the zeros that fill up the last word or group.
    fn padded(self, k: usize) -> usize {
        match self {
            Self::Int8 => k.next_multiple_of(4),
            Self::Int4 { group_size } => k.next_multiple_of(group_size),
        }
    }

    /// Groups of inputs; one that spans them all for [`QuantFormat::Int8`].
    pub fn groups(self, k: usize) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Int4 { group_size } => k.div_ceil(group_size),
        }
    }

    /// Words of one panel.
    fn panel_words(self, k: usize) -> usize {
        match self {
            Self::Int8 => self.padded(k) / 4 * PANEL_COLS,
            Self::Int4 { .. } => self.groups(k) * PANEL_COLS / 2 + self.padded(k) / 8 * PANEL_COLS,
        }
    }

    /// Rows of a tile at most: 4 bits need a second set of sums.
    fn tile_rows(self) -> usize {
        if self == Self::Int8 { 12 } else { 6 }
    }
}

impl fmt::Display for QuantFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 => f.write_str("int8"),
            Self::Int4 { group_size } => write!(f, "int4 in groups of {group_size}"),
        }
    }
}

/// `[n, k]` weights, quantized and packed.
#[derive(Debug, Clone)]
pub struct QuantizedWeights {
    words: Words,
    /// One per output of whole panels; empty for [`QuantFormat::Int4`].
    scales: Vec<f32>,
    /// 128 times the sum of each output's integers, which inputs stored from 0 to 255 add; as `scales`.
    offsets: Vec<i32>,
    shape: [usize; 2],
    format: QuantFormat,
}

impl QuantizedWeights {
    /// Quantizes row-major `[n, k]` weights by [`IntegerMatrix::nearest`].
    ///
    /// # Errors
    /// As there.
    pub fn new(format: QuantFormat, weights: &[f32], shape: [usize; 2]) -> Result<Self> {
        Ok(Self::pack(&IntegerMatrix::nearest(format, weights, shape)?))
    }

    /// The same of a matrix of which `rows` gives some rows at a time, row-major, on all threads at once.
    ///
    /// # Errors
    /// As there, and those of `rows`.
    ///
    /// # Panics
    /// If `rows` gives more or fewer values.
    pub fn from_rows(
        format: QuantFormat,
        [n, k]: [usize; 2],
        rows: impl Fn(Range<usize>) -> Result<Vec<f32>> + Sync,
    ) -> Result<Self> {
        format.validate(k).map_err(crate::Error::Argument)?;
        let mut packed = Self::zeros(format, [n, k]);
        let panels = packed.panels();
        rows_at_a_time([n, k], |range| {
            let values = rows(range.clone())?;
            format.check_rows(&values, [range.len(), k], range.start)?;
            let matrix = parallel::serially(|| IntegerMatrix::rounded(format, &values, [range.len(), k]));
            for (at, panel) in (range.start / PANEL_COLS..range.end.div_ceil(PANEL_COLS)).enumerate() {
                // SAFETY: rows begin at a panel, so each panel belongs to one call.
                unsafe { panels.pack(&matrix, at, panel) };
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// Packs integers as they are.
    pub fn pack(matrix: &IntegerMatrix) -> Self {
        let [n, k] = matrix.shape();
        let mut packed = Self::zeros(matrix.format(), [n, k]);
        let panels = packed.panels();
        parallel::for_each_if(n * k, 1 << 16, n.div_ceil(PANEL_COLS), |panel| {
            // SAFETY: each panel belongs to one task.
            unsafe { panels.pack(matrix, panel, panel) };
        });
        packed
    }

    fn zeros(format: QuantFormat, [n, k]: [usize; 2]) -> Self {
        let padded = n.next_multiple_of(PANEL_COLS);
        let of_rows = if format == QuantFormat::Int8 { padded } else { 0 };
        Self {
            words: Words::lasting(padded / PANEL_COLS * format.panel_words(k)),
            scales: vec![0.0; of_rows],
            offsets: vec![0; of_rows],
            shape: [n, k],
            format,
        }
    }

    fn panels(&mut self) -> PanelsMut {
        let [_, k] = self.shape;
        PanelsMut {
            words: SharedMut::new(self.words.as_mut_slice()),
            scales: SharedMut::new(&mut self.scales),
            offsets: SharedMut::new(&mut self.offsets),
            per_panel: self.format.panel_words(k),
        }
    }

    /// The integers and scales that were packed.
    pub fn unpack(&self) -> IntegerMatrix {
        let [n, k] = self.shape;
        let integers = (0..n * k).map(|at| self.value(at / k, at % k).0 as i8).collect();
        let scales = match self.format {
            QuantFormat::Int8 => self.scales[..n].to_vec(),
            QuantFormat::Int4 { group_size } => {
                let groups = self.format.groups(k);
                (0..n * groups).map(|at| self.value(at / groups, at % groups * group_size).1).collect()
            }
        };
        IntegerMatrix::of_packed(self.format, self.shape, integers, scales)
    }

    /// `[n, k]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// How the weights are stored.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Size in memory, scales included.
    pub fn bytes(&self) -> usize {
        self.words.as_slice().len() * 4 + (self.scales.len() + self.offsets.len()) * 4
    }

    /// What the products read.
    pub(crate) fn parts(&self) -> (&Words, &[f32], &[i32]) {
        (&self.words, &self.scales, &self.offsets)
    }

    /// From what [`Self::parts`] were; `None` if they are more or fewer than such a matrix has.
    pub(crate) fn of_parts(
        format: QuantFormat,
        shape: [usize; 2],
        (words, scales, offsets): (Words, Vec<f32>, Vec<i32>),
    ) -> Option<Self> {
        format.validate(shape[1]).ok()?;
        let padded = shape[0].next_multiple_of(PANEL_COLS);
        let of_rows = if format == QuantFormat::Int8 { padded } else { 0 };
        let len = (padded / PANEL_COLS).checked_mul(format.panel_words(shape[1]))?;
        let fits = words.as_slice().len() == len && scales.len() == of_rows && offsets.len() == of_rows;
        fits.then_some(Self { words, scales, offsets, shape, format })
    }

    /// The integer of output `col` and input `p`, and its scale.
    fn value(&self, col: usize, p: usize) -> (i32, f32) {
        let [_, k] = self.shape;
        let panel = &self.words.as_slice()[col / PANEL_COLS * self.format.panel_words(k)..];
        let lane = col % PANEL_COLS;
        match self.format {
            QuantFormat::Int8 => {
                let word = panel[p / 4 * PANEL_COLS + lane];
                (i32::from(word.to_le_bytes()[p % 4] as i8), self.scales[col])
            }
            QuantFormat::Int4 { group_size } => {
                let group = &panel[p / group_size * (PANEL_COLS / 2 + group_size / 8 * PANEL_COLS)..];
                let (word, inside) = (group[PANEL_COLS / 2 + p % group_size / 8 * PANEL_COLS + lane], p % 8);
                let nibble = word >> (inside % 4 * 8 + inside / 4 * 4) & 15;
                let scale = group[lane / 2] >> (lane % 2 * 16) << 16;
                (nibble as i32 - 8, f32::from_bits(scale))
            }
        }
    }

    /// The weights that the integers stand for, `[n, k]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        self.unpack().dequantize()
    }

    /// Copies the weights of one output, `[k]`.
    ///
    /// # Panics
    /// If there is no such output or `to` has another size.
    pub fn copy_row(&self, row: usize, to: &mut [f32]) {
        let [rows, inner] = self.shape;
        assert!(row < rows && to.len() == inner, "row {row} of {rows}, {} values of {inner}", to.len());
        for (p, value) in to.iter_mut().enumerate() {
            let (integer, scale) = self.value(row, p);
            *value = integer as f32 * scale;
        }
    }
}

/// What threads write, each its own panels.
#[derive(Clone, Copy)]
struct PanelsMut {
    words: SharedMut<u32>,
    scales: SharedMut<f32>,
    offsets: SharedMut<i32>,
    per_panel: usize,
}

impl PanelsMut {
    /// Packs panel `from` of `matrix` as panel `to` of these.
    ///
    /// # Safety
    /// Nobody else writes that panel, and it is one of the weights that these are of.
    unsafe fn pack(&self, matrix: &IntegerMatrix, from: usize, to: usize) {
        let (format, [n, k]) = (matrix.format(), matrix.shape());
        let (first, end, groups) = (from * PANEL_COLS, (from * PANEL_COLS + PANEL_COLS).min(n), format.groups(k));
        let rows = &matrix.integers()[first * k..end * k];
        let scales = &matrix.scales()[first * groups..end * groups];
        // SAFETY: by this function's own condition.
        unsafe {
            let words = self.words.slice(to * self.per_panel, self.per_panel);
            match format {
                QuantFormat::Int8 => {
                    self.scales.slice(to * PANEL_COLS, scales.len()).copy_from_slice(scales);
                    pack::int8_panel(rows, k, words, self.offsets.slice(to * PANEL_COLS, PANEL_COLS));
                }
                QuantFormat::Int4 { group_size } => pack::int4_panel(rows, scales, k, group_size, words),
            }
        }
    }
}

/// One product of a [`quantized_gemm`].
#[derive(Debug, Clone, Copy)]
pub struct QuantGroup<'a> {
    /// `[rows, k]`, row-major
    pub rows: &'a [f32],
    /// `[n, k]`
    pub weights: &'a QuantizedWeights,
    /// `[n]`
    pub bias: Option<&'a [f32]>,
    /// First element of this group's `[rows, n]` in the output.
    pub out_offset: usize,
}

impl QuantGroup<'_> {
    fn n(&self) -> usize {
        self.weights.shape[0]
    }
    fn k(&self) -> usize {
        self.weights.shape[1]
    }
    fn m(&self) -> usize {
        if self.k() == 0 { 0 } else { self.rows.len() / self.k() }
    }
    fn tiles(&self) -> usize {
        self.m().div_ceil(self.weights.format.tile_rows())
    }
    fn tile_rows(&self) -> usize {
        self.m().div_ceil(self.tiles().max(1)).max(1)
    }
}

/// Tiles of rows in one task.
const TASK_TILES: usize = 16;
/// Panels in one task.
const TASK_PANELS: usize = 4;
/// Multiply-adds below which a product is not worth a second thread.
const LEAST_WORK: usize = 1 << 18;

struct Task {
    group: usize,
    first_tile: usize,
    first_panel: usize,
}

/// Where one group's quantized rows lie in the scratch memory.
#[derive(Clone, Copy)]
struct RowsAt {
    /// First word of the integers, of the scales and of the sums.
    words: usize,
    scales: usize,
    sums: usize,
}

/// Computes every group's `rows W^T + bias` into `out`; elements of `out` outside the groups stay as they are.
///
/// A row with a value that is not finite gives NaN.
///
/// # Panics
/// If this machine cannot run `isa`, `rows` is not a whole number of rows, a bias has not `n` entries, or the groups' parts of `out` overlap
/// or leave it.
pub fn quantized_gemm(isa: Isa, groups: &[QuantGroup<'_>], out: &mut [f32]) {
    isa.require();
    check(groups, out.len());
    let (mut at, mut rows_at) = (0, Vec::with_capacity(groups.len()));
    let (mut quantize, mut tasks, mut work) = (Vec::new(), Vec::new(), 0);
    for (index, group) in groups.iter().enumerate() {
        let (format, k, m) = (group.weights.format, group.k(), group.m());
        let words = at;
        let scales = words + (m * format.padded(k) / 4).next_multiple_of(16);
        let sums = scales + m;
        at = (sums + m * format.groups(k)).next_multiple_of(16);
        rows_at.push(RowsAt { words, scales, sums });
        quantize.extend((0..group.tiles()).map(|tile| (index, tile)));
        for first_tile in (0..group.tiles()).step_by(TASK_TILES) {
            for first_panel in (0..group.n().div_ceil(PANEL_COLS)).step_by(TASK_PANELS) {
                tasks.push(Task { group: index, first_tile, first_panel });
            }
        }
        work += m * group.n() * k;
    }
    let out = SharedMut::new(out);
    buffer::with_scratch(at, |scratch| {
        let shared = SharedMut::new(scratch);
        let total: usize = groups.iter().map(|g| g.rows.len()).sum();
        parallel::for_each_if(total, 1 << 15, quantize.len(), |index| {
            let (g, tile) = quantize[index];
            let group = &groups[g];
            let (format, k) = (group.weights.format, group.k());
            let first = tile * group.tile_rows();
            let rows = group.tile_rows().min(group.m() - first);
            // SAFETY: each tile of each group has words, scales and sums of its own.
            let (words, scales, sums) = unsafe {
                let words = format.padded(k) / 4;
                (
                    shared.slice(rows_at[g].words + first * words, rows * words),
                    shared.slice(rows_at[g].scales + first, rows),
                    shared.slice(rows_at[g].sums + first * format.groups(k), rows * format.groups(k)),
                )
            };
            pack::quantize_tile(isa, format, &group.rows[first * k..(first + rows) * k], k, words, scales, sums);
        });
        let scratch = &*scratch;
        parallel::for_each_if(work, LEAST_WORK, tasks.len(), |index| {
            let task = &tasks[index];
            run_task(isa, &groups[task.group], task, scratch, rows_at[task.group], out);
        });
    });
}

fn check(groups: &[QuantGroup<'_>], out_len: usize) {
    let mut spans = Vec::with_capacity(groups.len());
    for group in groups {
        let whole = if group.k() == 0 { group.rows.is_empty() } else { group.rows.len().is_multiple_of(group.k()) };
        assert!(whole, "{} values are not a whole number of rows of {}", group.rows.len(), group.k());
        assert!(group.bias.is_none_or(|b| b.len() == group.n()), "bias must have one entry per output");
        let end = group.out_offset + group.m() * group.n();
        assert!(end <= out_len, "the product must fit its output");
        if end > group.out_offset {
            spans.push((group.out_offset, end));
        }
    }
    spans.sort_unstable();
    assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "groups must not share output");
}

/// One block of tiles times a few panels.
fn run_task(isa: Isa, group: &QuantGroup<'_>, task: &Task, scratch: &[u32], at: RowsAt, out: SharedMut<f32>) {
    let (weights, format, k, n) = (group.weights, group.weights.format, group.k(), group.n());
    let (tile_words, tile_groups, panel_words) = (format.padded(k) / 4, format.groups(k), format.panel_words(k));
    let end = (task.first_panel + TASK_PANELS).min(n.div_ceil(PANEL_COLS));
    let mut panel = task.first_panel;
    while panel < end {
        let wide = match micro::panels_at_once(format, group.tile_rows()) {
            wide if panel + wide <= end => wide,
            _ => 1,
        };
        let col = panel * PANEL_COLS;
        let cols = (wide * PANEL_COLS).min(n - col);
        for tile in task.first_tile..(task.first_tile + TASK_TILES).min(group.tiles()) {
            let first = tile * group.tile_rows();
            let rows = group.tile_rows().min(group.m() - first);
            micro::run(
                isa,
                format,
                &micro::Tile {
                    rows,
                    panels: wide,
                    cols,
                    a: &scratch[at.words + first * tile_words..][..rows * tile_words],
                    a_scales: buffer::as_f32(&scratch[at.scales + first..][..rows]),
                    a_sums: &scratch[at.sums + first * tile_groups..][..rows * tile_groups],
                    b: &weights.words.as_slice()[panel * panel_words..][..wide * panel_words],
                    panel_words,
                    b_scales: weights.scales.get(col..col + wide * PANEL_COLS).unwrap_or_default(),
                    b_offsets: weights.offsets.get(col..col + wide * PANEL_COLS).unwrap_or_default(),
                    bias: group.bias.map(|b| &b[col..col + cols]),
                    out: out.at(group.out_offset + first * n + col),
                    out_stride: n,
                },
            );
        }
        panel += wide;
    }
}
