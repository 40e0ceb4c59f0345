//! Attention in blocks of queries: the computation that training, decoding and paged decoding share.
//!
//! A task is one key head of one block. The query heads that share the key head are rows of the same products, query
//! after query: keys and values are packed once for all of them. No row's bits depend on the others.

use super::AttentionShape;
use super::paged::PagedRows;
use super::pages::PackedPages;
use crate::buffer::with_scratch_f32;
use crate::gemm::{Group, Operand, Start, gemm_part, with_packed_rows};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Isa, Precision, parallel, select};
use moe_core::ops::host::{self, Real};
use moe_core::ops::{Dropout, DropoutRow, HeadDropout};
use std::ops::Range;

/// Rows per block, query heads times queries: a whole number of tiles.
const BLOCK: usize = 48;
/// Multiply-adds of a call below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 17;

/// The sizes of an attention, and how it is computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) num_kv_heads: usize,
    /// Query heads per key head.
    pub(super) group: usize,
    shape: AttentionShape,
    pub(super) head_dim: usize,
    pub(super) precision: Precision,
    pub(super) isa: Isa,
    /// Of the probabilities; its coordinates are whole sequences'.
    dropout: Option<HeadDropout>,
}

/// Rows of some columns of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strip<'a> {
    /// From the first element of the first row on.
    values: &'a [f32],
    row_stride: usize,
}

impl<'a> Strip<'a> {
    pub(super) fn new(values: &'a [f32], row_stride: usize) -> Self {
        Self { values, row_stride }
    }

    /// The part that begins at `row` and `column`.
    pub(super) fn from(self, row: usize, column: usize) -> Self {
        Self { values: &self.values[row * self.row_stride + column..], ..self }
    }

    pub(super) fn row(self, row: usize, width: usize) -> &'a [f32] {
        &self.values[row * self.row_stride..][..width]
    }

    /// The first rows, to be summed over the columns.
    pub(super) fn by_row(self, rows: usize, width: usize) -> Operand<'a> {
        Operand::rows(self.values, rows, width, self.row_stride)
    }

    /// The same, one output per column, to be summed over the rows.
    fn by_column(self, rows: usize, width: usize) -> Operand<'a> {
        Operand::columns(self.values, width, rows, self.row_stride)
    }
}

/// Where keys or values lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a> {
    Strip(Strip<'a>),
    /// In rows, page by page.
    Paged(PagedRows<'a>),
    /// As the products read them, page by page; keys and values alike.
    Packed(PackedPages<'a>),
}

impl Source<'_> {
    /// Calls `body` with the first row and the number of rows of consecutive pieces of the first `rows` rows, and with
    /// `width` of their columns from `column` on. All pieces but the last have an even number of rows, because products
    /// of bf16 take them in pairs. Not for packed pages.
    fn for_pieces(&self, column: usize, width: usize, rows: usize, mut body: impl FnMut(usize, usize, Strip<'_>)) {
        match self {
            Self::Strip(strip) => body(0, rows, strip.from(0, column)),
            Self::Paged(paged) => {
                paged.for_pieces(column, width, rows, |first, len, piece| body(first, len, Strip::new(piece, width)));
            }
            Self::Packed(_) => unreachable!("packed pages are multiplied as they lie"),
        }
    }
}

/// One sequence of a call without gradients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sequence<'a> {
    /// Its last tokens, all query heads.
    pub(super) queries: Strip<'a>,
    pub(super) new: usize,
    /// Keys and values of all its tokens.
    pub(super) keys: Source<'a>,
    pub(super) values: Source<'a>,
    pub(super) len: usize,
}

/// Rows of some columns of a matrix that tasks write their own parts of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) into: SharedMut<f32>,
    pub(super) first: usize,
    row_stride: usize,
}

impl Place {
    pub(super) fn new(into: SharedMut<f32>, row_stride: usize) -> Self {
        Self { into, first: 0, row_stride }
    }

    /// The part that begins at `row` and `column`.
    pub(super) fn from(self, row: usize, column: usize) -> Self {
        Self { first: self.first + row * self.row_stride + column, ..self }
    }
}

/// A logit of each head that takes part in its softmax and in nothing else, and where its gradient goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct TrainedSinks<'a> {
    /// `[num_heads]`
    pub(super) values: &'a [f32],
    /// One row.
    pub(super) gradient: Place,
}

/// Queries, keys, values, output and gradient of the output of one sequence, and where the gradients go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Training<'a> {
    pub(super) sinks: Option<TrainedSinks<'a>>,
    pub(super) qkv: [Strip<'a>; 3],
    pub(super) out: Strip<'a>,
    pub(super) grad: Strip<'a>,
    pub(super) d_qkv: [Place; 3],
}

impl Heads {
    /// The shape has been checked.
    pub(super) fn new(shape: AttentionShape, head_dim: usize, precision: Precision) -> Self {
        let AttentionShape { num_heads, num_kv_heads, .. } = shape;
        debug_assert!(num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads));
        let (group, isa) = (num_heads / num_kv_heads, select::current());
        Self { num_kv_heads, group, shape, head_dim, precision, isa, dropout: None }
    }

    /// The same with probabilities dropped, in passes over whole sequences.
    pub(super) fn dropping(self, dropout: HeadDropout) -> Self {
        Self { dropout: Some(dropout), ..self }
    }

    #[cfg(test)]
    pub(super) fn on(self, isa: Isa) -> Self {
        Self { isa, ..self }
    }

    /// Columns of the queries and of the output.
    pub(super) fn d_model(&self) -> usize {
        self.num_kv_heads * self.group * self.head_dim
    }

    /// Columns of the keys and of the values.
    pub(super) fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        self.shape.scale(self.head_dim)
    }

    /// First column of the queries that share a key head.
    pub(super) fn query_column(&self, kv_head: usize) -> usize {
        kv_head * self.group * self.head_dim
    }

    /// Queries per block.
    fn block(&self) -> usize {
        (BLOCK / self.group).max(1)
    }

    /// One product on this thread.
    ///
    /// # Safety
    /// The product's part of `to` must belong to the caller.
    unsafe fn product(&self, a: Operand<'_>, b: Operand<'_>, start: Start<'_>, to: Place) {
        let group = Group { a, b: b.into(), start, out_offset: to.first, out_stride: to.row_stride };
        // SAFETY: passed on from the caller.
        unsafe { gemm_part(self.isa, self.precision, group, to.into) }
    }

    /// The distance between the rows of a block when a head is one row, if it is the same between all of them.
    fn folded_stride(&self, queries: usize, row_stride: usize) -> Option<usize> {
        match (self.group, queries) {
            (1, _) => Some(row_stride),
            (_, 1) => Some(self.head_dim),
            _ => None,
        }
    }

    /// Calls `body` with the heads of the first `queries` rows of `strip` as rows, query after query: where they lie if
    /// they are evenly spaced, else copied together.
    fn with_folded<R>(&self, strip: Strip<'_>, queries: usize, body: impl FnOnce(Strip<'_>) -> R) -> R {
        if let Some(stride) = self.folded_stride(queries, strip.row_stride) {
            return body(Strip::new(strip.values, stride));
        }
        let width = self.group * self.head_dim;
        with_scratch_f32(queries * width, |scratch| {
            for (query, to) in scratch.chunks_exact_mut(width).enumerate() {
                to.copy_from_slice(strip.row(query, width));
            }
            body(Strip::new(scratch, self.head_dim))
        })
    }

    /// Calls `body` with a place for the heads of `queries` rows as rows, which end up in `place`.
    ///
    /// # Safety
    /// The rows in `place` must belong to the caller.
    unsafe fn with_folded_place(&self, place: Place, queries: usize, body: impl FnOnce(Place)) {
        if let Some(row_stride) = self.folded_stride(queries, place.row_stride) {
            return body(Place { row_stride, ..place });
        }
        let width = self.group * self.head_dim;
        with_scratch_f32(queries * width, |scratch| {
            body(Place::new(SharedMut::new(scratch), self.head_dim));
            for (query, from) in scratch.chunks_exact(width).enumerate() {
                // SAFETY: the caller's rows.
                let to = unsafe { place.into.slice(place.first + query * place.row_stride, width) };
                to.copy_from_slice(from);
            }
        });
    }

    /// The sinks of the query heads of a key head.
    fn own_sinks<'a>(&self, sinks: Option<&'a [f32]>, kv_head: usize) -> Option<&'a [f32]> {
        sinks.map(|sinks| &sinks[kv_head * self.group..][..self.group])
    }

    /// Probabilities `[queries * group, visible]` of a block of which the last query sees `visible` keys; `sinks` are those of the
    /// group.
    fn probabilities(
        &self,
        folded: Strip<'_>,
        keys: &Source<'_>,
        kv_head: usize,
        queries: usize,
        sinks: Option<&[f32]>,
        probs: &mut [f32],
    ) {
        let rows = queries * self.group;
        let visible = probs.len() / rows;
        let scores = Place::new(SharedMut::new(probs), visible);
        let queries_by_row = folded.by_row(rows, self.head_dim);
        if let Source::Packed(pages) = keys {
            with_packed_rows(self.isa, self.precision, &queries_by_row, |queries| {
                for first in pages.starts(visible) {
                    let panels = pages.keys(kv_head, first, visible);
                    // SAFETY: `probs` is borrowed for the call.
                    unsafe { queries.times(panels, Start::Zero, scores.into, (first, visible)) };
                }
            });
        } else {
            keys.for_pieces(kv_head * self.head_dim, self.head_dim, visible, |first, len, piece| {
                // SAFETY: `probs` is borrowed for the call.
                unsafe {
                    self.product(queries_by_row, piece.by_row(len, self.head_dim), Start::Zero, scores.from(0, first))
                };
            });
        }
        for (i, row) in probs.chunks_exact_mut(visible).enumerate() {
            let sink = sinks.map(|sinks| sinks[i % self.group]);
            self.soften(row, visible - queries + i / self.group, sink);
        }
    }

    /// Probabilities in the place of the scores of the query at `position`.
    pub(super) fn soften(&self, row: &mut [f32], position: usize, sink: Option<f32>) {
        let Range { start, end } = self.shape.seen(position);
        row[..start].fill(0.0);
        row[end..].fill(0.0);
        let (seen, scale) = (&mut row[start..end], self.scale());
        match sink {
            None => vectorize!(self.isa, (seen: &mut [f32], scale: f32) { softmax(seen, scale) }),
            Some(sink) => vectorize!(self.isa, (seen: &mut [f32], scale: f32, sink: f32) {
                softmax_with_sink(seen, scale, sink);
            }),
        }
    }

    /// Which probabilities are dropped in each row of a block of one key head, from query `start` of a sequence on.
    fn dropped(&self, sequence: usize, kv_head: usize, start: usize) -> Option<impl Fn(usize) -> DropoutRow> {
        let dropout = self.dropout?;
        let head = |head| dropout.head(sequence, kv_head * self.group + head);
        let heads: Vec<Dropout> = (0..self.group).map(head).collect();
        Some(move |row: usize| heads[row % heads.len()].row(start + row / heads.len()))
    }

    /// Attention of each sequence's new tokens into `out` `[new tokens, d_model]`, sequence after sequence.
    pub(super) fn forward(&self, sequences: &[Sequence<'_>], sinks: Option<&[f32]>, out: &mut [f32]) {
        let out = Place::new(SharedMut::new(out), self.d_model());
        let mut tasks = Vec::new();
        let (mut work, mut first_row) = (0, 0);
        for (index, sequence) in sequences.iter().enumerate() {
            // The last blocks see the most keys: they go first.
            for start in (0..sequence.new).step_by(self.block()).rev() {
                let to = out.from(first_row + start, 0);
                tasks.extend(self.tasks_of(sequence).map(|kv_heads| (index, kv_heads, start, to)));
            }
            first_row += sequence.new;
            work += sequence.new * sequence.len * self.d_model();
        }
        parallel::for_each_if(work, LEAST_WORK, tasks.len(), |task| {
            let (index, ref kv_heads, start, to) = tasks[task];
            let (sequence, kv_head) = (&sequences[index], kv_heads.start);
            let to = to.from(0, self.query_column(kv_head));
            if let Some(pages) = self.decoded(sequence) {
                // SAFETY: each task writes the columns of its heads in the row of its sequence.
                return unsafe { self.decode(sequence, pages, kv_heads.clone(), sinks, to) };
            }
            let queries = self.block().min(sequence.new - start);
            let dropped = self.dropped(index, kv_head, start);
            // SAFETY: each task writes the columns of its heads in the rows of its block.
            unsafe { self.forward_block(sequence, kv_head, (start, queries), (sinks, dropped), to) };
        });
    }

    /// The output of one key head's query heads, of some queries from `start` on.
    ///
    /// # Safety
    /// The block's part of `to` must belong to the caller.
    unsafe fn forward_block(
        &self,
        of: &Sequence<'_>,
        kv_head: usize,
        (start, queries): (usize, usize),
        (sinks, dropped): (Option<&[f32]>, Option<impl Fn(usize) -> DropoutRow>),
        to: Place,
    ) {
        let rows = queries * self.group;
        let visible = of.len - of.new + start + queries;
        let column = kv_head * self.head_dim;
        with_scratch_f32(rows * visible, |probs| {
            self.with_folded(of.queries.from(start, self.query_column(kv_head)), queries, |folded| {
                self.probabilities(folded, &of.keys, kv_head, queries, self.own_sinks(sinks, kv_head), probs);
            });
            if let Some(dropped) = dropped {
                self.drop_rows(probs, visible, dropped);
            }
            let probs = Strip::new(probs, visible);
            // SAFETY: the caller's part.
            unsafe {
                self.with_folded_place(to, queries, |to| {
                    if let Source::Packed(pages) = &of.values {
                        let probs = probs.by_row(rows, visible);
                        return with_packed_rows(self.isa, self.precision, &probs, |probs| {
                            for first in pages.starts(visible) {
                                let panels = pages.values(kv_head, first, visible);
                                probs.times(panels, Start::at(first), to.into, (to.first, to.row_stride));
                            }
                        });
                    }
                    of.values.for_pieces(column, self.head_dim, visible, |first, len, piece| {
                        let probs = probs.from(0, first).by_row(rows, len);
                        self.product(probs, piece.by_column(len, self.head_dim), Start::at(first), to);
                    });
                });
            }
        });
    }

    /// Gradients of sequences of `seq_len` tokens each, added into their places, which must hold zeros.
    ///
    /// The query heads of a key head add to its gradients in one fixed order: block by block, inside a block query by
    /// query.
    ///
    /// # Safety
    /// The sequences' places must be the caller's, and must not overlap.
    pub(super) unsafe fn backward(&self, sequences: &[Training<'_>], seq_len: usize) {
        let work = 2 * sequences.len() * seq_len * seq_len * self.d_model();
        parallel::for_each_if(work, LEAST_WORK, sequences.len() * self.num_kv_heads, |task| {
            let (index, kv_head) = (task / self.num_kv_heads, task % self.num_kv_heads);
            for start in (0..seq_len).step_by(self.block()) {
                let queries = self.block().min(seq_len - start);
                let dropped = self.dropped(index, kv_head, start);
                // SAFETY: each task adds into the columns of its key head and of the queries that share it.
                unsafe { self.backward_block(&sequences[index], kv_head, (start, queries), dropped) };
            }
        });
    }

    /// Adds one block's part of the gradients of one key head and of its query heads.
    ///
    /// # Safety
    /// The columns of these heads in `of.d_qkv` must belong to the caller.
    unsafe fn backward_block(
        &self,
        of: &Training<'_>,
        kv_head: usize,
        (start, queries): (usize, usize),
        dropped: Option<impl Fn(usize) -> DropoutRow>,
    ) {
        let (rows, visible, width) = (queries * self.group, start + queries, self.head_dim);
        let (query_column, column) = (self.query_column(kv_head), kv_head * width);
        let [q, k, v] = of.qkv;
        let [q, out, grad] = [q, of.out, of.grad].map(|strip| strip.from(start, query_column));
        let (k, v) = (k.from(0, column), v.from(0, column));
        let [dq, dk, dv] = of.d_qkv;
        let (dq, dk, dv) = (dq.from(start, query_column), dk.from(0, column), dv.from(0, column));
        let folded = |body: &mut dyn FnMut([Strip<'_>; 3])| {
            self.with_folded(q, queries, |q| {
                self.with_folded(out, queries, |out| self.with_folded(grad, queries, |grad| body([q, out, grad])));
            });
        };
        with_scratch_f32(2 * rows * visible, |scratch| {
            let (probs, d_scores) = scratch.split_at_mut(rows * visible);
            folded(&mut |[q, out, grad]| {
                let sinks = self.own_sinks(of.sinks.map(|sinks| sinks.values), kv_head);
                self.probabilities(q, &Source::Strip(of.qkv[1]), kv_head, queries, sinks, probs);
                if let Some(TrainedSinks { gradient, .. }) = of.sinks {
                    // SAFETY: each task has the sinks of its own heads.
                    let to = unsafe { gradient.into.slice(gradient.first + kv_head * self.group, self.group) };
                    self.add_sink_gradient((probs, visible), [grad, out], to);
                }
                // 1. d_probs = grad V^T; d_scores = probs * (d_probs - rowsum(grad * out)) * scale. Where probabilities are dropped,
                //    d_probs are those of the dropped ones times the mask; the row's sum is the same.
                // SAFETY: `d_scores` is borrowed for the call.
                unsafe {
                    let to = Place::new(SharedMut::new(d_scores), visible);
                    self.product(grad.by_row(rows, width), v.by_row(visible, width), Start::Zero, to);
                }
                if let Some(dropped) = &dropped {
                    self.drop_rows(d_scores, visible, dropped);
                }
                self.score_gradient((probs, visible), d_scores, [grad, out]);
                if let Some(dropped) = &dropped {
                    self.drop_rows(probs, visible, dropped);
                }
                // 2. dV += probs^T grad; dQ = d_scores K; dK += d_scores^T Q.
                let [probs, d_scores] = [&*probs, &*d_scores].map(|values| Strip::new(values, visible));
                // SAFETY: the caller's columns; each of the three parts has its own.
                unsafe {
                    self.product(probs.by_column(rows, visible), grad.by_column(rows, width), Start::Output, dv);
                    self.product(d_scores.by_column(rows, visible), q.by_column(rows, width), Start::Output, dk);
                    self.with_folded_place(dq, queries, |dq| {
                        self.product(d_scores.by_row(rows, visible), k.by_column(visible, width), Start::Zero, dq);
                    });
                }
            });
        });
    }

    /// Rows `[rows, visible]` times their masks.
    fn drop_rows(&self, values: &mut [f32], visible: usize, dropped: impl Fn(usize) -> DropoutRow) {
        for (index, row) in values.chunks_exact_mut(visible).enumerate() {
            let mask = dropped(index);
            vectorize!(self.isa, (row: &mut [f32], mask: DropoutRow) {
                row.iter_mut().enumerate().for_each(|(key, value)| *value *= mask.factor(key as u32));
            });
        }
    }

    /// Adds the gradients of the sinks of a key head's query heads: minus the share that a sink has of a row, which its other
    /// probabilities leave, times what the row's result and its gradient make.
    fn add_sink_gradient(&self, (probs, visible): (&[f32], usize), [grad, out]: [Strip<'_>; 2], to: &mut [f32]) {
        for (row, probs) in probs.chunks_exact(visible).enumerate() {
            let [g, o] = [grad, out].map(|strip| strip.row(row, self.head_dim));
            let share = vectorize!(self.isa, (g: &[f32], o: &[f32], probs: &[f32]) -> f32 {
                let left = 1.0 - host::sum_by(probs.len(), |i| probs[i]);
                left * host::sum_by(g.len(), |i| g[i] * o[i])
            });
            to[row % self.group] -= share;
        }
    }

    /// `d_scores` `[rows, visible]`, which holds the gradient of the probabilities, becomes that of the scores, given
    /// the gradient and the output of each row.
    fn score_gradient(&self, (probs, visible): (&[f32], usize), d_scores: &mut [f32], [grad, out]: [Strip<'_>; 2]) {
        let scale = self.scale();
        let rows = d_scores.chunks_exact_mut(visible).zip(probs.chunks_exact(visible));
        for (row, (d_scores, probs)) in rows.enumerate() {
            let [g, o] = [grad, out].map(|strip| strip.row(row, self.head_dim));
            vectorize!(self.isa, (g: &[f32], o: &[f32], d_scores: &mut [f32], probs: &[f32], scale: f32) {
                let dot = host::sum_by(g.len(), |i| g[i] * o[i]);
                for (d, &p) in d_scores.iter_mut().zip(probs) {
                    *d = p * (*d - dot) * scale;
                }
            });
        }
    }
}

/// Softmax of the scores times `scale`.
#[inline(always)]
fn softmax(scores: &mut [f32], scale: f32) {
    let max = row_max(scores);
    for score in scores.iter_mut() {
        *score = ((*score - max) * scale).exp_();
    }
    let inverse = 1.0 / host::sum_by(scores.len(), |j| scores[j]);
    scores.iter_mut().for_each(|score| *score *= inverse);
}

/// The same with a logit more in the denominator, which is not scaled.
#[inline(always)]
fn softmax_with_sink(scores: &mut [f32], scale: f32, sink: f32) {
    let max = (row_max(scores) * scale).max_(sink);
    for score in scores.iter_mut() {
        *score = (*score * scale - max).exp_();
    }
    let inverse = 1.0 / (host::sum_by(scores.len(), |j| scores[j]) + (sink - max).exp_());
    scores.iter_mut().for_each(|score| *score *= inverse);
}

/// The largest value, in 16 lanes so that it vectorises.
#[inline(always)]
pub(crate) fn row_max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(16);
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = lane.max_(v);
    }
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max_(v);
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, &b| a.max_(b))
}
