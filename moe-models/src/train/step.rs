//! Losses and gradients of one global batch: its micro-batches one after the other, every kernel on all cores, gradients added
//! where they are kept. Knows no optimizer.

use super::model::{LayerLoad, LossOutput, LossParts, Pass, TokenBatch, TrainModel, TrainPass};
use super::non_finite::NonFiniteLoss;
use crate::{Error, Result};
use moe_core::tape::{GradBuffers, Tape};
use moe_kernels::copies::{WeightCopies, with_copies};
use moe_kernels::parallel;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Sums over the micro-batches of one global batch, besides their gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchSums {
    /// Micro-batches summed; the mean gradient is the sum divided by it.
    pub micro_batches: usize,
    /// Mean total loss (language model and scaled auxiliary parts), nats per token.
    pub loss: f64,
    /// Means of its parts.
    pub parts: LossParts,
    /// Loads of each MoE layer, summed over the micro-batches.
    pub layers: Vec<LayerLoad>,
    /// The first loss that is not finite, if any.
    pub non_finite: Option<NonFiniteLoss>,
}

/// What a run's steps keep from one to the next besides parameters and moments.
#[derive(Debug)]
pub struct StepBuffers {
    /// Sums of the gradients of those parameters that are trained.
    pub grads: GradBuffers,
    /// All parameters as products in bf16 read them. An optimizer that changes parameters brings them up to date
    /// ([`super::optimizer::AdamW::step_with_copies`]), as must whoever else changes one ([`WeightCopies::refresh`]).
    pub copies: Arc<WeightCopies>,
}

impl StepBuffers {
    /// For the parameters of `model`.
    ///
    /// # Errors
    /// If the model gives a parameter twice.
    pub fn new<M: TrainModel>(model: &M) -> Result<Self> {
        let params = model.params();
        Ok(Self {
            grads: GradBuffers::new(params.iter().map(|(name, var)| (name.as_str(), var, model.grad_group(name))))?,
            copies: WeightCopies::new(params.iter().map(|(_, var)| var.as_tensor()).chain(model.frozen())),
        })
    }
}

/// Turns a panic in the work on micro-batch `i` into an error: a run that ends with an error keeps the checkpoints it has.
///
/// What the panic left half done is seen by nobody: the error ends the call that owns the results.
pub(super) fn no_panic<T>(i: usize, body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text");
        Err(Error::Panic { micro_batch: i, text: text.to_owned() })
    })
}

/// Losses of `batches`, and the sum of their gradients in `buffers`; `passes[i]` is that of micro-batch `i`.
///
/// Each micro-batch's gradients are finished before they are added to those before it: the bits are those of as many ranks that
/// reduce in rank order.
///
/// # Errors
/// [`Error::Argument`] if the lengths differ or there is no batch; [`Error::Panic`] with the text of a panic; otherwise what the
/// model returns.
pub fn accumulate<M: TrainModel>(
    model: &M,
    batches: &[TokenBatch],
    passes: &[TrainPass],
    buffers: &mut StepBuffers,
) -> Result<BatchSums> {
    let StepBuffers { grads, copies } = buffers;
    if batches.is_empty() || batches.len() != passes.len() {
        let (have, given) = (batches.len(), passes.len());
        return Err(Error::Argument(format!(
            "expected at least one micro-batch and a pass for each, got {have} and {given}"
        )));
    }
    let (micro_batches, parts) = (batches.len(), LossParts::default());
    let mut sums = BatchSums { micro_batches, loss: 0.0, parts, layers: Vec::new(), non_finite: None };
    grads.begin();
    for (i, (batch, &pass)) in batches.iter().zip(passes).enumerate() {
        // One chain of kernels: threads stay awake from one to the next.
        let run = || no_panic(i, || one(model, batch, Pass::Train(pass), grads));
        let output = parallel::together(|| with_copies(copies, run))?;
        sums.add(i, output)?;
    }
    grads.finish();
    sums.loss /= micro_batches as f64;
    sums.parts = sums.parts.scaled(1.0 / micro_batches as f64);
    Ok(sums)
}

/// The loss of one micro-batch, whose gradients are added to `grads`.
fn one<M: TrainModel>(model: &M, batch: &TokenBatch, pass: Pass, grads: &mut GradBuffers) -> Result<LossOutput> {
    let (output, tape) = Tape::record(|| model.loss(batch, pass));
    let output = output?;
    tape.backward_of(&output.loss, &mut grads.gradients())?;
    Ok(LossOutput { loss: output.loss.detach(), ..output })
}

impl BatchSums {
    fn add(&mut self, micro_batch: usize, output: LossOutput) -> Result<()> {
        let LossOutput { loss, parts, layers } = output;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        self.loss += loss;
        self.parts.add(&parts);
        add_loads(&mut self.layers, &layers);
        if self.non_finite.is_none() && [loss, parts.total()].iter().any(|x| !x.is_finite()) {
            self.non_finite = Some(NonFiniteLoss { micro_batch, loss, parts });
        }
        Ok(())
    }
}

/// Adds the loads of one micro-batch, layer by layer.
pub fn add_loads(sum: &mut Vec<LayerLoad>, loads: &[LayerLoad]) {
    if sum.is_empty() {
        sum.extend_from_slice(loads);
        return;
    }
    for (sum, load) in sum.iter_mut().zip(loads) {
        sum.load.add(&load.load);
    }
}
