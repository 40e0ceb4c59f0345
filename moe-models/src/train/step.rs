//! Losses and gradients of one global batch: this rank's micro-batches one after the other, every kernel on all cores, gradients
//! added where they are kept; then the losses of all ranks. Knows no optimizer.

use super::division::{Division, Undivided};
use super::model::{LayerLoad, LossOutput, LossParts, Pass, TokenBatch, TrainModel, TrainPass};
use super::non_finite::NonFiniteLoss;
use super::optimizer::{Owned, Units};
use super::ranks::{Passes, Ranks, exchange, unreadable};
use crate::{Error, Result};
use moe_core::ExpertLoad;
use moe_core::tape::{After, CompleteGrads, GradBuffers, Gradients, Tape, Watcher};
use moe_kernels::copies::{WeightCopies, with_copies};
use moe_parallel::Phase;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

/// What the pass over one micro-batch gave besides gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatchLoss {
    /// Index in the global batch.
    pub micro_batch: usize,
    /// Total loss (language model and scaled auxiliary parts), nats per token.
    pub loss: f64,
    /// Its parts.
    pub parts: LossParts,
    /// Load of each MoE layer.
    pub layers: Vec<LayerLoad>,
}

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
    /// ([`super::optimizer::AdamW::apply`]), as must whoever else changes one ([`WeightCopies::refresh`]).
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
            grads: GradBuffers::new(params.iter().map(|(name, var)| (name.as_str(), var)))?,
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

/// Losses of `batches`, a global batch on one rank, and the sum of their gradients in `buffers`; `passes[i]` is that of
/// micro-batch `i`.
///
/// Each micro-batch's gradients are finished before they are added to those before it: the bits are those of as many ranks that
/// reduce in rank order.
///
/// # Errors
/// [`Error::Argument`] if there is no batch; as [`accumulate_share`].
pub fn accumulate<M: TrainModel>(
    model: &M,
    batches: &[TokenBatch],
    passes: &[TrainPass],
    buffers: &mut StepBuffers,
) -> Result<BatchSums> {
    if batches.is_empty() {
        return Err(Error::Argument("expected at least one micro-batch, got none".into()));
    }
    let mut division = Undivided(Owned::everything(Units::of_params(model.params())?));
    let how = Passes::alone(batches.len());
    let idle = passes.last().copied().unwrap_or_default();
    Ok(BatchSums::of(accumulate_share(model, batches, passes, idle, how, buffers, &mut division)?))
}

/// The same for one rank's share of a global batch, which may be empty: losses apart, to be put together with those of the other
/// ranks. `idle` is the pass of the step in which it takes part in the others' without tokens. Adding up gradients over ranks is begun, as `division` says; [`Division::finish`] ends it.
///
/// # Errors
/// [`Error::Argument`] if the lengths differ; [`Error::Panic`] with the text of a panic; otherwise what the model returns.
pub fn accumulate_share<M: TrainModel>(
    model: &M,
    batches: &[TokenBatch],
    passes: &[TrainPass],
    idle: TrainPass,
    how: Passes,
    buffers: &mut StepBuffers,
    division: &mut dyn Division,
) -> Result<Vec<MicroBatchLoss>> {
    let StepBuffers { grads, copies } = buffers;
    if batches.len() != passes.len() {
        let (have, given) = (batches.len(), passes.len());
        return Err(Error::Argument(format!("expected a pass for each micro-batch, got {have} and {given}")));
    }
    let buckets = division.buckets().to_vec();
    let (every_pass, rounds) = (division.every_pass(), how.rounds.max(batches.len()).max(1));
    division.begin();
    grads.begin();
    let mut losses = Vec::with_capacity(batches.len());
    for round in 0..rounds {
        let last = round + 1 == rounds;
        let (adds, overlaps) = (last || every_pass, division.overlaps());
        let mut adding = Adding(division);
        let mut into = if adds && overlaps { grads.watched(&buckets, &mut adding) } else { grads.gradients() };
        let own = batches.get(round).zip(passes.get(round).copied());
        let begun = Instant::now();
        let loss = match own {
            Some((batch, pass)) => Some(how.run(|| with_copies(copies, || one(model, batch, pass, &mut into)))?),
            None if how.meeting => {
                // Like the others' in all that a loss may depend on, such as the tokens seen: ranks must do the same.
                let batch = TokenBatch::empty(batches.first().map_or(1, |batch| batch.seq_len));
                Some(how.run(|| with_copies(copies, || one(model, &batch, idle, &mut into)))?)
            }
            None => None,
        };
        into.finish()?;
        let ended = Instant::now();
        if adds && !overlaps {
            grads.watched(&buckets, &mut Adding(division)).finish()?;
        }
        if let Some((loss, turned)) = loss {
            division.note("forward", begun, turned);
            division.note("backward", turned, ended);
            losses.extend(own.map(|_| loss));
        }
        if every_pass && !last {
            division.finish(grads)?;
        }
    }
    if !every_pass {
        grads.finish();
    }
    Ok(losses)
}

/// Adds up what a backward pass completes.
struct Adding<'a>(&'a mut dyn Division);

impl Watcher for Adding<'_> {
    fn complete(&mut self, group: usize, complete: &mut CompleteGrads<'_>) -> moe_core::Result<After> {
        Ok(self.0.start(group, complete)?)
    }

    fn arrived(&mut self, complete: &mut CompleteGrads<'_>) -> moe_core::Result<()> {
        Ok(self.0.advance(complete)?)
    }
}

/// The loss of one micro-batch, whose gradients are added to `into`; and when the forward pass ended.
fn one<M: TrainModel>(
    model: &M,
    batch: &TokenBatch,
    pass: TrainPass,
    into: &mut Gradients<'_>,
) -> Result<(MicroBatchLoss, Instant)> {
    no_panic(pass.micro_batch, || {
        let (output, tape) = Tape::record(|| model.loss(batch, Pass::Train(pass)));
        let LossOutput { loss, parts, layers } = output?;
        let turned = Instant::now();
        tape.backward_of(&loss, into)?;
        let loss = f64::from(loss.detach().to_scalar::<f32>()?);
        Ok((MicroBatchLoss { micro_batch: pass.micro_batch, loss, parts, layers }, turned))
    })
}

impl BatchSums {
    /// Over these micro-batches, in the given order.
    pub fn of(losses: Vec<MicroBatchLoss>) -> Self {
        let (micro_batches, parts) = (losses.len(), LossParts::default());
        let mut sums = Self { micro_batches, loss: 0.0, parts, layers: Vec::new(), non_finite: None };
        for MicroBatchLoss { micro_batch, loss, parts, layers } in losses {
            sums.loss += loss;
            sums.parts.add(&parts);
            add_loads(&mut sums.layers, &layers);
            if sums.non_finite.is_none() && [loss, parts.total()].iter().any(|x| !x.is_finite()) {
                sums.non_finite = Some(NonFiniteLoss { micro_batch, loss, parts });
            }
        }
        sums.loss /= micro_batches as f64;
        sums.parts = sums.parts.scaled(1.0 / micro_batches as f64);
        sums
    }

    /// Over all `micro_batches` of a global batch, of which each rank brings its own or the error it ended with. The order is that
    /// of the micro-batches, so the bits are the same for any number of ranks.
    ///
    /// # Errors
    /// The error of any rank; [`Error::Argument`] for a micro-batch that no rank has computed.
    pub fn over(ranks: &dyn Ranks, micro_batches: usize, own: Result<Vec<MicroBatchLoss>>) -> Result<Self> {
        if let Err(error) = &own {
            ranks.fail(error);
        }
        let messages =
            exchange(ranks, Phase::Update, own.map(|losses| losses.iter().flat_map(MicroBatchLoss::words).collect()))?;
        let mut all = Vec::new();
        for (rank, words) in messages.into_iter().enumerate() {
            let mut words = words.into_iter().peekable();
            while words.peek().is_some() {
                all.push(MicroBatchLoss::read(&mut words).ok_or_else(|| unreadable(rank))?);
            }
        }
        all.sort_by_key(|loss| loss.micro_batch);
        // Ranks that share the matrices of a model compute the same micro-batch.
        all.dedup_by_key(|loss| loss.micro_batch);
        if let Some(missing) = (0..micro_batches).find(|&i| all.get(i).is_none_or(|loss| loss.micro_batch != i)) {
            return Err(Error::Argument(format!("micro-batch {missing} of {micro_batches} is in no rank's share")));
        }
        Ok(Self::of(all))
    }
}

impl MicroBatchLoss {
    /// As a part of a message.
    fn words(&self) -> Vec<u64> {
        let LossParts { lm, load_balance, router_z, kd } = self.parts;
        let mut words = vec![self.micro_batch as u64];
        words.extend([self.loss, lm, load_balance, router_z, kd].map(f64::to_bits));
        words.push(self.layers.len() as u64);
        for LayerLoad { layer, load } in &self.layers {
            words.extend([*layer as u64, u64::from(load.dropped), load.tokens_per_expert.len() as u64]);
            words.extend(load.tokens_per_expert.iter().map(|&tokens| u64::from(tokens)));
        }
        words
    }

    /// Takes one from a message; `None` if it ends too early.
    fn read(words: &mut impl Iterator<Item = u64>) -> Option<Self> {
        let micro_batch = words.next()? as usize;
        let mut float = || words.next().map(f64::from_bits);
        let (loss, lm, load_balance, router_z, kd) = (float()?, float()?, float()?, float()?, float()?);
        let mut layers = Vec::new();
        for _ in 0..words.next()? {
            let (layer, dropped, experts) = (words.next()? as usize, words.next()? as u32, words.next()?);
            let tokens = (0..experts).map(|_| Some(words.next()? as u32));
            let load = ExpertLoad { tokens_per_expert: tokens.collect::<Option<_>>()?, dropped };
            layers.push(LayerLoad { layer, load });
        }
        Some(Self { micro_batch, loss, parts: LossParts { lm, load_balance, router_z, kd }, layers })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(micro_batch: usize, loss: f64) -> MicroBatchLoss {
        let layer = |layer: usize, tokens_per_expert: Vec<u32>| LayerLoad {
            layer,
            load: ExpertLoad { tokens_per_expert, dropped: layer as u32 },
        };
        let parts = LossParts { lm: loss * 0.9, load_balance: 0.1, router_z: -0.0, kd: loss * 0.05 };
        MicroBatchLoss { micro_batch, loss, parts, layers: vec![layer(1, vec![3, 0, 5]), layer(4, vec![])] }
    }

    #[test]
    fn losses_survive_a_message_to_the_last_bit() {
        let losses = [loss(3, 0.1 + 0.2), loss(0, f64::NEG_INFINITY), loss(7, 1e-300)];
        let mut words = losses.iter().flat_map(MicroBatchLoss::words);
        for want in &losses {
            assert_eq!(MicroBatchLoss::read(&mut words).as_ref(), Some(want));
        }
        let words = loss(1, f64::NAN).words();
        let back = MicroBatchLoss::read(&mut words.clone().into_iter()).unwrap();
        assert_eq!(back.loss.to_bits(), f64::NAN.to_bits());
        for len in 0..words.len() {
            assert!(MicroBatchLoss::read(&mut words[..len].iter().copied()).is_none(), "cut to {len} words");
        }
    }

    /// The micro-batch that is named is the first of the batch, whatever rank had it.
    #[test]
    fn a_micro_batch_without_a_rank_is_named() {
        let over = |own| BatchSums::over(&super::super::ranks::OneRank, 3, Ok(own));
        let message = over(vec![loss(2, 1.0), loss(0, 1.0)]).unwrap_err().to_string();
        assert!(message.contains("micro-batch 1 of 3"), "{message}");
        let sums = over(vec![loss(2, f64::NAN), loss(0, 1.0), loss(1, f64::INFINITY), loss(0, 1.0)]).unwrap();
        assert_eq!((sums.micro_batches, sums.non_finite.unwrap().micro_batch), (3, 1));
    }
}
