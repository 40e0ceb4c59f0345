//! Rotary position embedding: pairs of columns of each head turn by an angle that grows with the token's position.
//!
//! The backward pass is the inverse rotation. Knows positions, not caches: a row's result depends on its own position
//! only, so decoding token by token gives the bits of the whole pass.

mod reference;
mod table;
#[cfg(test)]
mod tests;

pub use reference::rotary as rotary_reference;
pub use table::RotaryTable;

use crate::parallel::SharedMut;
use crate::{Isa, Result, ops, parallel, select};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use moe_core::ops::host;

/// Which columns of a head form a pair; `h` is half of the table's `rotary_dim`.
///
/// ```text
/// Halves       (0, h) (1, h + 1) (2, h + 2) ..
/// Interleaved  (0, 1) (2, 3)     (4, 5)     ..
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RotaryLayout {
    /// `rotate_half` of Llama, Mixtral and GPT-NeoX in transformers.
    Halves,
    /// That of the RoFormer paper, GPT-J and DeepSeek.
    Interleaved,
}

/// The positions of the rows.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// `start`, `start + 1`, .. along the dimension before the last.
    From(u32),
    /// One per row, all leading dimensions flattened.
    Each(&'a [u32]),
}

/// Turns the first `rotary_dim` columns of each head by the angles of the row's position.
///
/// # Shapes
/// `x` `[.., seq_len, heads * head_dim]`, head after head, of any number of heads; returns the shape of `x`
///
/// # Errors
/// [`crate::Error::Argument`] if the width is no multiple of the table's `head_dim`, there is not one position per
/// row, or a position is not in the table.
///
/// # Source
/// RoFormer (Su et al. 2021), equations 14, 15 and 34; both orders of columns as in transformers.
pub fn rotary(x: &Tensor, table: &RotaryTable, layout: RotaryLayout, positions: Positions<'_>) -> Result<Tensor> {
    let positions = table.resolve(x.dims(), positions)?;
    if !ops::takes(x) {
        return reference::rotate(x, table, layout, &positions);
    }
    let op = Rotary { table: table.clone(), layout, positions, isa: select::current() };
    Ok(x.contiguous()?.apply_op1(op)?)
}

/// Elements per task.
const TASK: usize = 1 << 14;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;

struct Rotary {
    table: RotaryTable,
    layout: RotaryLayout,
    /// One per row.
    positions: Vec<u32>,
    isa: Isa,
}

impl Rotary {
    /// Every row turned; backwards if `sign` is -1.
    fn turn(&self, x: &[f32], sign: f32) -> Vec<f32> {
        let rows = self.positions.len();
        let width = x.len() / rows.max(1);
        let per_task = (TASK / width.max(1)).max(1);
        let mut out = vec![0.0; x.len()];
        let shared = SharedMut::new(&mut out);
        parallel::for_each_if(x.len(), LEAST_WORK, rows.div_ceil(per_task), |task| {
            let rows = task * per_task..((task + 1) * per_task).min(rows);
            // SAFETY: tasks have rows of their own.
            let into = unsafe { shared.slice(rows.start * width, rows.len() * width) };
            let from = &x[rows.start * width..rows.end * width];
            self.isa.vectorize(|| self.turn_rows(from, &self.positions[rows], sign, into));
        });
        out
    }

    #[inline(always)]
    fn turn_rows(&self, from: &[f32], positions: &[u32], sign: f32, into: &mut [f32]) {
        let (head_dim, rotary_dim) = (self.table.head_dim(), self.table.rotary_dim());
        let width = from.len() / positions.len();
        for (row, &position) in positions.iter().enumerate() {
            let (cos, sin) = self.table.at(position);
            let range = row * width..(row + 1) * width;
            let heads = from[range.clone()].chunks_exact(head_dim).zip(into[range].chunks_exact_mut(head_dim));
            for (head, into) in heads {
                let ((head, rest), (into, into_rest)) = (head.split_at(rotary_dim), into.split_at_mut(rotary_dim));
                into_rest.copy_from_slice(rest);
                match self.layout {
                    RotaryLayout::Halves => turn_halves(head, cos, sin, sign, into),
                    RotaryLayout::Interleaved => turn_pairs(head, cos, sin, sign, into),
                }
            }
        }
    }
}

#[inline(always)]
fn turn_halves(head: &[f32], cos: &[f32], sin: &[f32], sign: f32, into: &mut [f32]) {
    let half = cos.len();
    let ((a, b), (to_a, to_b)) = (head.split_at(half), into.split_at_mut(half));
    let (a, b, sin, to_a, to_b) = (&a[..half], &b[..half], &sin[..half], &mut to_a[..half], &mut to_b[..half]);
    for i in 0..half {
        let s = sin[i] * sign;
        to_a[i] = a[i] * cos[i] - b[i] * s;
        to_b[i] = b[i] * cos[i] + a[i] * s;
    }
}

#[inline(always)]
fn turn_pairs(head: &[f32], cos: &[f32], sin: &[f32], sign: f32, into: &mut [f32]) {
    for (((pair, to), &c), &s) in head.chunks_exact(2).zip(into.chunks_exact_mut(2)).zip(cos).zip(sin) {
        let s = s * sign;
        to[0] = pair[0] * c - pair[1] * s;
        to[1] = pair[1] * c + pair[0] * s;
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.turn(host::elements(s, l)?, 1.0)), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        host::with_elements::<f32, _>(grad, |g| Tensor::from_vec(self.turn(g, -1.0), x.shape(), x.device()).map(Some))
    }
}
