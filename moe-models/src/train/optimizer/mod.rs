//! AdamW with decoupled weight decay and clipping by the global norm. Updates parameters in place on the CPU.
//!
//! The arithmetic is [`moe_kernels::adamw`]'s, whose bits do not depend on the number of threads. An optimizer may own a part of
//! the elements only ([`Owned`]): a step is then three calls, between which ranks put together the sums behind the norm, and the
//! bits do not depend on who owns what.

mod grads;
mod norm;
mod owned;
mod settings;
#[cfg(test)]
mod tests;
mod units;
mod update;

pub use grads::Grads;
pub use norm::ChunkSum;
pub(crate) use owned::part_of_list;
pub use owned::{Owned, PartOf};
pub use settings::{AdamWConfig, UpdateRule};
pub use units::{Unit, Units};

use super::non_finite::NonFinite;
use crate::{Error, Result};
use candle_core::Var;
use moe_kernels::adamw;
use moe_kernels::copies::WeightCopies;
use std::collections::HashSet;
use update::Pending;
pub(crate) use update::with_values;

/// Moments of what is owned of one parameter: range by range, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// First moment.
    pub exp_avg: Vec<f32>,
    /// Second moment.
    pub exp_avg_sq: Vec<f32>,
}

/// What changes from step to step besides parameters, as a checkpoint keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerState {
    /// Of each parameter.
    pub moments: Vec<Moments>,
    /// Updates applied; the exponent of the bias correction.
    pub updates: u64,
    /// Steps skipped in a row for a loss or gradient that was not finite, up to now.
    pub skipped_in_a_row: u64,
}

/// One update besides its gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub lr: f64,
    /// Factor on the gradients: the mean over micro-batches.
    pub grad_scale: f64,
    /// Norm of the gradients of the whole model, `grad_scale` included.
    pub grad_norm: f64,
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

/// The optimizer's state. Parameters are given to each call, always in the same order.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    config: AdamWConfig,
    owned: Owned,
    rules: Vec<UpdateRule>,
    state: OptimizerState,
}

impl AdamW {
    /// Zero moments of what is `owned`, with the rule of each parameter.
    ///
    /// # Errors
    /// [`Error::Config`] for settings out of range; [`Error::Argument`] if there is not one rule for each parameter.
    pub fn new(config: AdamWConfig, owned: Owned, rules: Vec<UpdateRule>) -> Result<Self> {
        let zeros = |param| vec![0.0; owned.elements(param)];
        let moments = (0..owned.units().num_params()).map(|p| Moments { exp_avg: zeros(p), exp_avg_sq: zeros(p) });
        let state = OptimizerState { moments: moments.collect(), updates: 0, skipped_in_a_row: 0 };
        Self::with_state(config, owned, rules, state)
    }

    /// An optimizer with restored state.
    ///
    /// # Errors
    /// As [`AdamW::new`]; [`Error::Argument`] for moments of another size than what is `owned`.
    pub fn with_state(
        config: AdamWConfig,
        owned: Owned,
        rules: Vec<UpdateRule>,
        state: OptimizerState,
    ) -> Result<Self> {
        config.validate()?;
        rules.iter().try_for_each(UpdateRule::validate)?;
        let (want, got) = (owned.units().num_params(), (rules.len(), state.moments.len()));
        if got != (want, want) {
            let (rules, moments) = got;
            return Err(Error::Argument(format!(
                "an optimizer of {want} parameters got {rules} rules and the moments of {moments}"
            )));
        }
        for (param, moments) in state.moments.iter().enumerate() {
            let (want, got) = (owned.elements(param), [moments.exp_avg.len(), moments.exp_avg_sq.len()]);
            if got != [want; 2] {
                return Err(Error::Argument(format!(
                    "parameter {param} has {want} owned elements, its moments {got:?}"
                )));
            }
        }
        Ok(Self { config, owned, rules, state })
    }

    /// What is owned.
    pub fn owned(&self) -> &Owned {
        &self.owned
    }

    /// Moments of what is owned, in the order of the parameters.
    pub fn moments(&self) -> &[Moments] {
        &self.state.moments
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.state.updates
    }

    /// Steps skipped in a row for a loss or gradient that was not finite, up to now.
    pub fn skipped_in_a_row(&self) -> u64 {
        self.state.skipped_in_a_row
    }

    /// One update of an optimizer that owns everything:
    /// `p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`, with the gradients multiplied by
    /// `grad_scale` and clipped first. `grads` are flat, one per parameter.
    ///
    /// A non-finite gradient norm skips the update and leaves parameters, moments and bias correction as they were.
    ///
    /// # Errors
    /// [`Error::Argument`] if `grads` does not match the parameters, or not everything is owned; [`Error::NonFinite`] after
    /// [`MAX_SKIPPED_IN_A_ROW`] skips in a row.
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
        let grads = Grads::whole(grads);
        let grad_norm = self.norm(&self.squares(params, &grads)?)? * grad_scale;
        self.apply(params, &grads, Update { lr, grad_scale, grad_norm }, copies)
    }

    /// The sums of squares of the gradients of what is owned: this rank's share of what [`AdamW::norm`] needs.
    ///
    /// # Errors
    /// [`Error::Argument`] if `grads` does not match the parameters.
    pub fn squares(&self, params: &[(String, Var)], grads: &Grads<'_>) -> Result<Vec<ChunkSum>> {
        self.check_shapes(params, grads)?;
        Ok(self.owned.squares(grads))
    }

    /// The norm that the sums of the whole model make.
    ///
    /// # Errors
    /// As [`Units::norm`].
    pub fn norm(&self, squares: &[ChunkSum]) -> Result<f64> {
        self.owned.units().norm(squares)
    }

    /// Updates what is owned, and the copies that there are of it. Ranks that are given the same norm all update or all skip.
    ///
    /// # Errors
    /// As [`AdamW::step`].
    pub fn apply(
        &mut self,
        params: &[(String, Var)],
        grads: &Grads<'_>,
        update: Update,
        copies: &WeightCopies,
    ) -> Result<StepReport> {
        self.check_shapes(params, grads)?;
        let Update { lr, grad_scale, grad_norm } = update;
        if !grad_norm.is_finite() {
            return self.skip(grad_norm, NonFinite::find(params, grads)?);
        }
        self.state.skipped_in_a_row = 0;
        self.state.updates += 1;
        let clip = self.config.clip_grad;
        // 1e-6 as in PyTorch's `clip_grad_norm_`.
        let clip_factor = if clip > 0.0 { (clip / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        let settings = |rule: &UpdateRule| adamw::Settings {
            lr: lr * rule.lr_scale,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay * rule.weight_decay,
            updates: self.state.updates,
            grad_scale: grad_scale * clip_factor,
        };
        let settings: Vec<_> = self.rules.iter().map(settings).collect();
        let mut rounded: Vec<_> = params.iter().map(|(_, var)| Some(copies.get(var)?.write())).collect();
        let state = self.state.moments.iter_mut().zip(settings).zip(&mut rounded);
        let pending = params.iter().zip(state).enumerate();
        let pending = pending.map(|(param, ((_, var), ((moments, settings), rounded)))| Pending {
            var,
            settings,
            ranges: self.owned.ranges(param),
            moments,
            grads: grads.ranges(&self.owned, param),
            rounded: rounded.as_mut().map(|copy| copy.as_mut_slice()),
        });
        update::all(pending.filter(|pending| !pending.ranges.is_empty()))?;
        Ok(StepReport { grad_norm, applied: true, non_finite: None })
    }

    /// Leaves an update out: parameters, moments and bias correction stay as they were. [`AdamW::apply`] does so itself for
    /// a gradient that is not finite; a caller does for a loss.
    ///
    /// # Errors
    /// [`Error::NonFinite`] after [`MAX_SKIPPED_IN_A_ROW`] skips in a row, with `why` of the last.
    pub fn skip(&mut self, grad_norm: f64, why: NonFinite) -> Result<StepReport> {
        let in_a_row = &mut self.state.skipped_in_a_row;
        *in_a_row += 1;
        if *in_a_row >= MAX_SKIPPED_IN_A_ROW {
            return Err(Error::NonFinite { step: None, what: Box::new(why), in_a_row: *in_a_row });
        }
        Ok(StepReport { grad_norm, applied: false, non_finite: Some(why) })
    }

    fn check_shapes(&self, params: &[(String, Var)], grads: &Grads<'_>) -> Result<()> {
        let (want, got) = (self.rules.len(), grads.all().len());
        if want != params.len() || want != got {
            let have = params.len();
            return Err(Error::Argument(format!(
                "the optimizer holds {want} parameters, given {have} and {got} gradients"
            )));
        }
        let mut seen = HashSet::with_capacity(params.len());
        if let Some((name, _)) = params.iter().find(|(_, var)| !seen.insert(var.id())) {
            return Err(Error::Argument(format!("{name} is given to the optimizer twice")));
        }
        grads.check(&self.owned, params)
    }
}
