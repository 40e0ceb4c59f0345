//! One call of the product: which parts of the operands are packed where, in which tasks, and what a task does.

use super::ahead::Ahead;
use super::{Format, Group, PANEL_COLS, Precision, Start, Weights, micro, pack};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Isa, buffer, parallel};

/// Tiles of A in one task: 192 rows, or 512.
const TASK_TILES: usize = 16;
/// Panels of B in one task: 128 columns.
const TASK_PANELS: usize = 4;
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
pub(super) const LEAST_WORK: usize = 1 << 18;

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

impl Group<'_> {
    pub(super) fn m(&self) -> usize {
        self.a.outer
    }
    pub(super) fn n(&self) -> usize {
        self.b.shape()[0]
    }
    pub(super) fn k(&self) -> usize {
        self.a.inner
    }
    /// The end of its output; past every output if that has no number.
    pub(super) fn out_end(&self) -> usize {
        let rows = (self.m() - 1).saturating_mul(self.out_stride);
        self.out_offset.saturating_add(rows).saturating_add(self.n())
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

/// # Safety
/// The groups' parts of `out` must exist, belong to the caller and not overlap.
pub(super) unsafe fn run(isa: Isa, precision: Precision, groups: &[Group<'_>], out: SharedMut<f32>, threads: bool) {
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
            if plan.streams {
                micro::finish_stream();
            }
        });
    });
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
