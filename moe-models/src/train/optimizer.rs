//! AdamW with decoupled weight decay and clipping by the global norm. Updates parameters in place on the CPU.
//!
//! Sums run over fixed chunks in a fixed order and no fused multiply-add is used, so the result is the same for any
//! number of threads and any vector width.

use crate::{Error, Result};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

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
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Global gradient norm before clipping; not finite when the step was skipped.
    pub grad_norm: f64,
    /// Whether the parameters were updated.
    pub applied: bool,
}

/// Steps skipped in a row after which [`AdamW::step`] gives up.
pub const MAX_SKIPPED_IN_A_ROW: u64 = 8;
/// Elements per unit of work and of summation.
const CHUNK: usize = 1 << 14;
/// Partial sums kept side by side inside a chunk; fixed, so that the order of additions is.
const LANES: usize = 16;

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

    /// Steps skipped in a row for non-finite gradients, up to now.
    pub fn skipped_in_a_row(&self) -> u64 {
        self.skipped_in_a_row
    }

    /// One update: `p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`, with the gradients multiplied by
    /// `grad_scale` and clipped first. `grads` are flat, one per parameter.
    ///
    /// A non-finite gradient norm skips the update and leaves parameters, moments and bias correction as they were.
    ///
    /// # Errors
    /// [`Error::Argument`] if `grads` does not match the parameters or after [`MAX_SKIPPED_IN_A_ROW`] skips in a row.
    ///
    /// # Source
    /// Loshchilov and Hutter 2019, Algorithm 2, in PyTorch's form (`torch.optim.AdamW`): the decay is applied first,
    /// with the learning rate as its factor.
    pub fn step(
        &mut self,
        params: &[(String, Var)],
        grads: &[Vec<f32>],
        grad_scale: f64,
        lr: f64,
    ) -> Result<StepReport> {
        self.check_shapes(params, grads)?;
        let grad_norm = sum_of_squares(grads).sqrt() * grad_scale;
        if !grad_norm.is_finite() {
            return self.skip(grad_norm);
        }
        self.skipped_in_a_row = 0;
        self.updates += 1;
        let clip = self.config.clip_grad;
        // 1e-6 as in PyTorch's `clip_grad_norm_`.
        let clip_factor = if clip > 0.0 { (clip / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        let scale = (grad_scale * clip_factor) as f32;
        for (((moments, (_, var)), grad), decays) in self.moments.iter_mut().zip(params).zip(grads).zip(&self.decays) {
            let decay = if *decays { self.config.weight_decay } else { 0.0 };
            let factors = Factors::new(&self.config, self.updates, lr, decay, scale);
            update_var(var, &factors, moments, grad)?;
        }
        Ok(StepReport { grad_norm, applied: true })
    }

    fn skip(&mut self, grad_norm: f64) -> Result<StepReport> {
        self.skipped_in_a_row += 1;
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            return Err(Error::Argument(format!(
                "{MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient norm of {grad_norm}; lower lr, lengthen the warm-up, or look at the data"
            )));
        }
        Ok(StepReport { grad_norm, applied: false })
    }

    fn check_shapes(&self, params: &[(String, Var)], grads: &[Vec<f32>]) -> Result<()> {
        let (want, got) = (self.moments.len(), grads.len());
        if want != params.len() || want != got || want != self.decays.len() {
            let have = params.len();
            return Err(Error::Argument(format!(
                "the optimizer holds {want} parameters, given {have} and {got} gradients"
            )));
        }
        for (((name, var), grad), moments) in params.iter().zip(grads).zip(&self.moments) {
            let (want, got, held) = (var.elem_count(), grad.len(), moments.exp_avg.len());
            if want != got || want != held || held != moments.exp_avg_sq.len() {
                return Err(Error::Argument(format!(
                    "{name} has {want} elements, its gradient {got}, its optimizer state {held}"
                )));
            }
        }
        Ok(())
    }
}

/// The scalars of one update, rounded to f32 once.
#[derive(Debug, Clone, Copy)]
struct Factors {
    scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `1 - lr * weight_decay`.
    keep: f32,
    /// `lr / (1 - beta1^t)`.
    step_size: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root_correction: f32,
    eps: f32,
}

impl Factors {
    fn new(config: &AdamWConfig, updates: u64, lr: f64, weight_decay: f64, scale: f32) -> Self {
        let t = updates as f64;
        Self {
            scale,
            beta1: config.beta1 as f32,
            one_minus_beta1: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            one_minus_beta2: (1.0 - config.beta2) as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            step_size: (lr / (1.0 - config.beta1.powf(t))) as f32,
            root_correction: (1.0 / (1.0 - config.beta2.powf(t)).sqrt()) as f32,
            eps: config.eps as f32,
        }
    }
}

#[inline(always)]
fn update_chunk(f: &Factors, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let g = *g * f.scale;
        *m = f.beta1 * *m + f.one_minus_beta1 * g;
        *v = f.beta2 * *v + f.one_minus_beta2 * (g * g);
        *p = f.keep * *p - f.step_size * *m / (v.sqrt() * f.root_correction + f.eps);
    }
}

fn update_slice(f: &Factors, p: &mut [f32], moments: &mut Moments, g: &[f32]) {
    let arch = pulp::Arch::new();
    let chunks = p
        .par_chunks_mut(CHUNK)
        .zip(moments.exp_avg.par_chunks_mut(CHUNK))
        .zip(moments.exp_avg_sq.par_chunks_mut(CHUNK))
        .zip(g.par_chunks(CHUNK));
    chunks.for_each(|(((p, m), v), g)| arch.dispatch(|| update_chunk(f, p, m, v, g)));
}

/// Hands the parameter's own memory to [`update_slice`].
struct UpdateInPlace<'a> {
    factors: &'a Factors,
    /// A lock because candle gives the operation by shared reference; it is never contended.
    moments: Mutex<&'a mut Moments>,
    grad: &'a [f32],
}

impl InplaceOp1 for UpdateInPlace<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else { candle_core::bail!("adamw: parameters must be f32") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("adamw: parameters must be contiguous")
        };
        let mut moments = self.moments.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        update_slice(self.factors, &mut values[start..end], &mut moments, self.grad);
        Ok(())
    }
}

fn update_var(var: &Var, factors: &Factors, moments: &mut Moments, grad: &[f32]) -> Result<()> {
    if var.device().is_cpu() {
        var.inplace_op1(&UpdateInPlace { factors, moments: Mutex::new(moments), grad })?;
    } else {
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        update_slice(factors, &mut values, moments, grad);
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
    }
    Ok(())
}

/// Sum of squares of all gradients in f64: chunks in parallel, their sums added in order.
fn sum_of_squares(grads: &[Vec<f32>]) -> f64 {
    let arch = pulp::Arch::new();
    let of_one = |grad: &Vec<f32>| -> f64 {
        let chunks: Vec<f64> =
            grad.par_chunks(CHUNK).map(|chunk| arch.dispatch(|| chunk_sum_of_squares(chunk))).collect();
        chunks.iter().sum()
    };
    grads.iter().map(of_one).sum()
}

#[inline(always)]
fn chunk_sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for block in whole {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    let tail: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    lanes.iter().sum::<f64>() + tail
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
