//! AdamW with decoupled weight decay and clipping by the global norm. Updates parameters in place on the CPU.
//!
//! The arithmetic is [`moe_kernels::adamw`]'s, whose bits do not depend on the number of threads.

use super::non_finite::NonFinite;
use crate::{Error, Result};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
use moe_kernels::copies::WeightCopies;
use moe_kernels::{adamw, select};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::HashSet;

/// AdamW's settings besides the learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on the parameters that decay (not on biases and norms).
    pub weight_decay: f64,
    /// Largest global gradient norm; larger gradients are scaled down to it. 0 turns clipping off.
    pub clip_grad: f64,
}

impl Default for AdamWConfig {
    /// The paper's: betas 0.9 and 0.95, eps 1e-8, decay 0.1, clip 1.0.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_grad: 1.0 }
    }
}

impl AdamWConfig {
    /// Refuses settings outside their range.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("beta1", self.beta1, 0.0..1.0),
            ("beta2", self.beta2, 0.0..1.0),
            ("weight_decay", self.weight_decay, 0.0..f64::MAX),
            ("clip_grad", self.clip_grad, 0.0..f64::MAX),
            ("eps", self.eps, f64::MIN_POSITIVE..f64::MAX),
        ] {
            if !range.contains(&value) {
                return Err(Error::Config(format!("{name} must lie in {range:?}, got {value}")));
            }
        }
        Ok(())
    }
}

/// Moments of one parameter, flat, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// First moment.
    pub exp_avg: Vec<f32>,
    /// Second moment.
    pub exp_avg_sq: Vec<f32>,
}

/// What one [`AdamW::step`] did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Whether the parameters were updated.
    pub applied: bool,
    /// Why they were not.
    pub non_finite: Option<NonFinite>,
}

/// Steps skipped in a row after which [`AdamW::step`] gives up.
pub const MAX_SKIPPED_IN_A_ROW: u64 = 8;
/// Parameters updated from one queue; each of them is one level of calls, see [`update_together`].
const TOGETHER: usize = 64;

/// The optimizer's state. Parameters are given to each call, always in the same order.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    config: AdamWConfig,
    /// Updates applied; the exponent of the bias correction.
    updates: u64,
    skipped_in_a_row: u64,
    moments: Vec<Moments>,
    /// Whether each parameter decays.
    decays: Vec<bool>,
}

impl AdamW {
    /// Zero moments for `params`; `decays` tells for each whether it is decayed.
    ///
    /// # Errors
    /// [`Error::Config`] for settings out of range.
    pub fn new(config: AdamWConfig, params: &[(String, Var)], decays: Vec<bool>) -> Result<Self> {
        let zeros = |var: &Var| vec![0.0; var.elem_count()];
        let moments = params.iter().map(|(_, var)| Moments { exp_avg: zeros(var), exp_avg_sq: zeros(var) }).collect();
        Self::from_parts(config, moments, decays, 0, 0)
    }

    /// An optimizer with restored state; `moments` in the order of the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for settings out of range.
    pub fn from_parts(
        config: AdamWConfig,
        moments: Vec<Moments>,
        decays: Vec<bool>,
        updates: u64,
        skipped_in_a_row: u64,
    ) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, updates, skipped_in_a_row, moments, decays })
    }

    /// Moments, in the order of the parameters.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Steps skipped in a row for a loss or gradient that was not finite, up to now.
    pub fn skipped_in_a_row(&self) -> u64 {
        self.skipped_in_a_row
    }

    /// One update: `p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`, with the gradients multiplied by
    /// `grad_scale` and clipped first. `grads` are flat, one per parameter.
    ///
    /// A non-finite gradient norm skips the update and leaves parameters, moments and bias correction as they were.
    ///
    /// # Errors
    /// [`Error::Argument`] if `grads` does not match the parameters; [`Error::NonFinite`] after [`MAX_SKIPPED_IN_A_ROW`]
    /// skips in a row.
    ///
    /// # Source
    /// Loshchilov and Hutter 2019, Algorithm 2, in PyTorch's form (`torch.optim.AdamW`): the decay is applied first,
    /// with the learning rate as its factor.
    pub fn step<G: AsRef<[f32]> + Sync>(
        &mut self,
        params: &[(String, Var)],
        grads: &[G],
        grad_scale: f64,
        lr: f64,
    ) -> Result<StepReport> {
        self.step_with_copies(params, grads, grad_scale, lr, &WeightCopies::default())
    }

    /// [`AdamW::step`], which also brings the copies that there are of the parameters up to date.
    ///
    /// # Errors
    /// As there.
    pub fn step_with_copies<G: AsRef<[f32]> + Sync>(
        &mut self,
        params: &[(String, Var)],
        grads: &[G],
        grad_scale: f64,
        lr: f64,
        copies: &WeightCopies,
    ) -> Result<StepReport> {
        self.check_shapes(params, grads)?;
        let grad_norm = grad_norm(grads, grad_scale);
        if !grad_norm.is_finite() {
            return self.skip(grad_norm, NonFinite::find(params, grads)?);
        }
        self.skipped_in_a_row = 0;
        self.updates += 1;
        let clip = self.config.clip_grad;
        // 1e-6 as in PyTorch's `clip_grad_norm_`.
        let clip_factor = if clip > 0.0 { (clip / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        let settings = adamw::Settings {
            lr,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            updates: self.updates,
            grad_scale: grad_scale * clip_factor,
        };
        let mut rounded: Vec<_> = params.iter().map(|(_, var)| Some(copies.get(var)?.write())).collect();
        let state = self.moments.iter_mut().zip(&self.decays).zip(&mut rounded);
        let mut pending =
            params.iter().zip(grads).zip(state).map(|(((_, var), grad), ((moments, &decays), rounded))| {
                let weight_decay = if decays { settings.weight_decay } else { 0.0 };
                let rounded = rounded.as_mut().map(|copy| copy.as_mut_slice());
                Pending {
                    var,
                    settings: adamw::Settings { weight_decay, ..settings },
                    moments,
                    grad: grad.as_ref(),
                    rounded,
                }
            });
        loop {
            let group: Vec<_> = pending.by_ref().take(TOGETHER).collect();
            if group.is_empty() {
                break;
            }
            update_together(group.into_iter(), Vec::with_capacity(TOGETHER))?;
        }
        Ok(StepReport { grad_norm, applied: true, non_finite: None })
    }

    /// Leaves an update out: parameters, moments and bias correction stay as they were. [`AdamW::step`] does so itself for
    /// a gradient that is not finite; a caller does for a loss.
    ///
    /// # Errors
    /// [`Error::NonFinite`] after [`MAX_SKIPPED_IN_A_ROW`] skips in a row, with `why` of the last.
    pub fn skip(&mut self, grad_norm: f64, why: NonFinite) -> Result<StepReport> {
        self.skipped_in_a_row += 1;
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            return Err(Error::NonFinite { step: None, what: Box::new(why), in_a_row: self.skipped_in_a_row });
        }
        Ok(StepReport { grad_norm, applied: false, non_finite: Some(why) })
    }

    fn check_shapes<G: AsRef<[f32]>>(&self, params: &[(String, Var)], grads: &[G]) -> Result<()> {
        let (want, got) = (self.moments.len(), grads.len());
        if want != params.len() || want != got || want != self.decays.len() {
            let have = params.len();
            return Err(Error::Argument(format!(
                "the optimizer holds {want} parameters, given {have} and {got} gradients"
            )));
        }
        let mut seen = HashSet::with_capacity(params.len());
        for (((name, var), grad), moments) in params.iter().zip(grads).zip(&self.moments) {
            if !seen.insert(var.id()) {
                return Err(Error::Argument(format!("{name} is given to the optimizer twice")));
            }
            let (want, got, held) = (var.elem_count(), grad.as_ref().len(), moments.exp_avg.len());
            if want != got || want != held || held != moments.exp_avg_sq.len() {
                return Err(Error::Argument(format!(
                    "{name} has {want} elements, its gradient {got}, its optimizer state {held}"
                )));
            }
        }
        Ok(())
    }
}

/// Norm of all gradients together, each multiplied by `grad_scale`.
pub fn grad_norm<G: AsRef<[f32]> + Sync>(grads: &[G], grad_scale: f64) -> f64 {
    adamw::sum_of_squares(select::current(), grads).sqrt() * grad_scale
}

/// A parameter whose memory is not at hand yet.
struct Pending<'a> {
    var: &'a Var,
    settings: adamw::Settings,
    moments: &'a mut Moments,
    grad: &'a [f32],
    rounded: Option<&'a mut [u16]>,
}

impl<'a> Pending<'a> {
    fn with_values(self, values: &'a mut [f32]) -> adamw::Parameter<'a> {
        let Moments { exp_avg, exp_avg_sq } = self.moments;
        adamw::Parameter {
            settings: self.settings,
            values,
            exp_avg,
            exp_avg_sq,
            grad: self.grad,
            rounded: self.rounded,
        }
    }
}

/// Updates all of `pending` and `ready` from one queue.
///
/// candle lends a parameter's memory to the body of one operation only, so each operation's body begins the next one,
/// and the innermost, which has them all, updates.
fn update_together(mut pending: std::vec::IntoIter<Pending<'_>>, mut ready: Vec<adamw::Parameter<'_>>) -> Result<()> {
    let Some(next) = pending.next() else { return Ok(adamw::update(select::current(), &mut ready)?) };
    let var = next.var;
    if !var.device().is_cpu() {
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        adamw::update(select::current(), &mut [next.with_values(&mut values)])?;
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
        return update_together(pending, ready);
    }
    let body = |values: &mut [f32]| {
        // Shortens the lifetime of those before to that of these values.
        let mut ready: Vec<adamw::Parameter<'_>> = ready;
        ready.push(next.with_values(values));
        update_together(pending, ready)
    };
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

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
