//! Brings the memory of parameters, moments and gradients together, and updates all of them from one queue.

use super::Moments;
use crate::Result;
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
use moe_kernels::{adamw, select};
use std::cell::Cell;
use std::ops::Range;

/// Parameters updated from one queue; each of them is one level of calls, see [`together`].
pub(super) const TOGETHER: usize = 64;

/// A parameter whose memory is not at hand yet.
pub(super) struct Pending<'a> {
    pub(super) var: &'a Var,
    pub(super) settings: adamw::Settings,
    /// What is updated.
    pub(super) ranges: &'a [Range<usize>],
    /// Of the ranges, one after the other.
    pub(super) moments: &'a mut Moments,
    /// Of the ranges.
    pub(super) grads: Vec<&'a [f32]>,
    /// Of the whole parameter.
    pub(super) rounded: Option<&'a mut [u16]>,
}

impl<'a> Pending<'a> {
    /// Each range, with the values of the whole parameter at hand.
    fn with_values(self, values: &'a mut [f32]) -> impl Iterator<Item = adamw::Parameter<'a>> {
        let Moments { exp_avg, exp_avg_sq } = self.moments;
        let (mut exp_avg, mut exp_avg_sq) = (exp_avg.as_mut_slice(), exp_avg_sq.as_mut_slice());
        let (mut values, mut rounded, mut start) = (values, self.rounded, 0);
        self.ranges.iter().zip(self.grads).map(move |(range, grad)| {
            let (skip, len) = (range.start - start, range.len());
            start = range.end;
            let rounded = rounded.as_mut().map(|rest| take(rest, skip, len));
            adamw::Parameter {
                settings: self.settings,
                values: take(&mut values, skip, len),
                exp_avg: take(&mut exp_avg, 0, len),
                exp_avg_sq: take(&mut exp_avg_sq, 0, len),
                grad,
                rounded,
            }
        })
    }
}

/// The next `len` elements after `skip` of them; `rest` is then what follows.
fn take<'a, T>(rest: &mut &'a mut [T], skip: usize, len: usize) -> &'a mut [T] {
    let (taken, others) = std::mem::take(rest)[skip..].split_at_mut(len);
    *rest = others;
    taken
}

/// Updates all of `pending`, many at a time from one queue.
///
/// # Errors
/// If a parameter is not f32.
pub(super) fn all<'a>(mut pending: impl Iterator<Item = Pending<'a>>) -> Result<()> {
    loop {
        let group: Vec<_> = pending.by_ref().take(TOGETHER).collect();
        if group.is_empty() {
            return Ok(());
        }
        together(group.into_iter(), Vec::with_capacity(TOGETHER))?;
    }
}

/// Updates all of `pending` and `ready` from one queue.
///
/// candle lends a parameter's memory to the body of one operation only, so each operation's body begins the next one,
/// and the innermost, which has them all, updates.
fn together(mut pending: std::vec::IntoIter<Pending<'_>>, mut ready: Vec<adamw::Parameter<'_>>) -> Result<()> {
    let Some(next) = pending.next() else { return Ok(adamw::update(select::current(), &mut ready)?) };
    let var = next.var;
    if !var.device().is_cpu() {
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        adamw::update(select::current(), &mut next.with_values(&mut values).collect::<Vec<_>>())?;
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
        return together(pending, ready);
    }
    let body = |values: &mut [f32]| {
        // Shortens the lifetime of those before to that of these values.
        let mut ready: Vec<adamw::Parameter<'_>> = ready;
        ready.extend(next.with_values(values));
        together(pending, ready)
    };
    with_values(var, body)
}

/// Lends the memory of a parameter on the CPU.
///
/// # Errors
/// If it is not f32; what `body` returns.
pub(crate) fn with_values(var: &Var, body: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    Ok(var.inplace_op1(&WithValues(Cell::new(Some(body))))?)
}

/// Hands a parameter's own memory to a function, once.
struct WithValues<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for WithValues<F> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else { candle_core::bail!("adamw: parameters must be f32") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("adamw: parameters must be contiguous")
        };
        let Some(body) = self.0.take() else { candle_core::bail!("adamw: an update runs once") };
        body(&mut values[start..end]).map_err(candle_core::Error::wrap)
    }
}
