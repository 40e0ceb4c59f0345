//! Validation: loss and bits per byte of each source. Changes nothing.

use super::data::ValidSource;
use super::metrics::{Record, VALID_BITS_PER_BYTE, VALID_LOSS};
use super::model::{LossOutput, Pass, TokenBatch, TrainModel};
use super::ranks::{OneRank, Passes, Ranks, exchange, unreadable};
use super::step::no_panic;
use crate::gpt::IGNORED;
use crate::{Error, Result};
use moe_parallel::Phase;
use std::ops::Range;

/// One source's part of an [`Evaluation`].
#[derive(Debug, Clone, PartialEq)]
pub struct SourceLoss {
    /// The source's name.
    pub name: String,
    /// Targets evaluated, end-of-document tokens included and ignored targets not.
    pub tokens: u64,
    /// Bytes of text behind them.
    pub bytes: u64,
    /// Sum of the losses, nats.
    pub nats: f64,
}

impl SourceLoss {
    /// Nats per token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Bits per byte of text: comparable between tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }
}

/// The result of one validation.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Each source, in the order given.
    pub sources: Vec<SourceLoss>,
}

impl Evaluation {
    fn total(&self) -> SourceLoss {
        let mut total = SourceLoss { name: String::new(), tokens: 0, bytes: 0, nats: 0.0 };
        for source in &self.sources {
            total.tokens += source.tokens;
            total.bytes += source.bytes;
            total.nats += source.nats;
        }
        total
    }

    /// Nats per token over all sources together.
    pub fn loss(&self) -> f64 {
        self.total().loss()
    }

    /// Bits per byte over all sources together.
    pub fn bits_per_byte(&self) -> f64 {
        self.total().bits_per_byte()
    }

    /// Name and bits per byte of each source.
    pub fn bits_per_byte_by_source(&self) -> Vec<(String, f64)> {
        self.sources.iter().map(|s| (s.name.clone(), s.bits_per_byte())).collect()
    }

    /// Adds the values to a metrics record.
    pub fn push_to(&self, record: &mut Record) {
        record.push(VALID_LOSS, self.loss());
        record.push(VALID_BITS_PER_BYTE, self.bits_per_byte());
        for (name, bits) in self.bits_per_byte_by_source() {
            record.push(format!("{VALID_BITS_PER_BYTE}/{name}"), bits);
        }
    }
}

/// Evaluates `sources` in batches of at most `batch_size` sequences.
///
/// # Errors
/// What the model returns.
pub fn evaluate<M: TrainModel>(model: &M, sources: &[ValidSource], batch_size: usize) -> Result<Evaluation> {
    evaluate_over(&OneRank, model, sources, batch_size)
}

/// [`evaluate`] of whatever `loss` computes.
///
/// # Errors
/// Those of `loss`; [`crate::Error::Panic`] with the text of a panic.
pub fn evaluate_by(
    loss: impl Fn(&TokenBatch) -> Result<LossOutput>,
    sources: &[ValidSource],
    batch_size: usize,
) -> Result<Evaluation> {
    over(&OneRank, &loss, sources, batch_size)
}

/// [`evaluate`], with the batches shared out over `ranks`; the result is the same on every rank and for any number of them.
///
/// # Errors
/// What the model returns on any rank; as [`Ranks`].
pub fn evaluate_over<M: TrainModel>(
    ranks: &dyn Ranks,
    model: &M,
    sources: &[ValidSource],
    batch_size: usize,
) -> Result<Evaluation> {
    over(ranks, &|batch: &TokenBatch| model.loss(batch, Pass::Eval), sources, batch_size)
}

/// The loss of a batch.
type BatchLoss<'a> = &'a dyn Fn(&TokenBatch) -> Result<LossOutput>;

fn over(ranks: &dyn Ranks, loss: BatchLoss<'_>, sources: &[ValidSource], batch_size: usize) -> Result<Evaluation> {
    let mut results: Vec<SourceLoss> = sources
        .iter()
        .map(|s| SourceLoss { name: s.name().to_owned(), tokens: 0, bytes: s.target_bytes(), nats: 0.0 })
        .collect();
    // Source and number of each batch: the tokens of one at a time are read.
    let places: Vec<(usize, usize)> = sources
        .iter()
        .enumerate()
        .flat_map(|(index, source)| (0..source.num_batches(batch_size)).map(move |number| (index, number)))
        .collect();
    let batch = |i: usize| {
        let (source, number) = places[i];
        sources[source].batch(batch_size, number)
    };
    let share = ranks.share(places.len());
    let idle = TokenBatch::empty(sources.first().map_or(1, ValidSource::seq_len));
    let own = mean_losses(loss, (&batch, &idle), share.clone(), ranks.passes(places.len()));
    if let Err(error) = &own {
        ranks.fail(error);
    }
    let words = |(i, mean): (usize, BatchMean)| [i as u64, mean.loss.to_bits(), mean.targets];
    let words = own.map(|own| share.zip(own).flat_map(words).collect());
    let mut means = vec![None; places.len()];
    for (rank, words) in exchange(ranks, Phase::Update, words)?.into_iter().enumerate() {
        for part in words.chunks(3) {
            let &[i, loss, targets] = part else { return Err(unreadable(rank)) };
            let mean = BatchMean { loss: f64::from_bits(loss), targets };
            *means.get_mut(i as usize).ok_or_else(|| unreadable(rank))? = Some(mean);
        }
    }
    for ((source, _), mean) in places.iter().zip(means) {
        let missing = || Error::Argument("a batch of the validation is in no rank's share".into());
        results[*source].add(mean.ok_or_else(missing)?);
    }
    Ok(Evaluation { sources: results })
}

/// Evaluates each batch and adds its targets and nats to the entry of `results` that its number names. A batch's mean
/// loss counts as often as it has targets that are not [`IGNORED`].
///
/// # Errors
/// What the model returns; [`crate::Error::Panic`] with the text of a panic.
pub fn add_losses<M: TrainModel>(model: &M, batches: &[(usize, TokenBatch)], results: &mut [SourceLoss]) -> Result<()> {
    let loss = |batch: &TokenBatch| model.loss(batch, Pass::Eval);
    let batch = |i: usize| batches[i].1.clone();
    let idle = TokenBatch::empty(1);
    let means = mean_losses(&loss, (&batch, &idle), 0..batches.len(), Passes::alone(batches.len()))?;
    batches.iter().zip(means).for_each(|((source, _), mean)| results[*source].add(mean));
    Ok(())
}

/// A batch's mean loss over its targets that are not [`IGNORED`].
#[derive(Debug, Clone, Copy)]
struct BatchMean {
    loss: f64,
    targets: u64,
}

impl SourceLoss {
    fn add(&mut self, mean: BatchMean) {
        self.tokens += mean.targets;
        self.nats += mean.loss * mean.targets as f64;
    }
}

/// The mean loss of each batch of the `share`; `idle` is what a rank passes that has none while others have.
fn mean_losses(
    of_batch: BatchLoss<'_>,
    (batch, idle): (&dyn Fn(usize) -> TokenBatch, &TokenBatch),
    share: Range<usize>,
    how: Passes,
) -> Result<Vec<BatchMean>> {
    let loss =
        |i: usize, batch: &TokenBatch| -> Result<f64> { Ok(how.run(|| no_panic(i, || of_batch(batch)))?.parts.lm) };
    let mean = |i: usize| {
        let batch = batch(i);
        let targets = batch.target_ids.iter().filter(|&&id| id != IGNORED).count() as u64;
        // The mean over no target is no number; others may wait for the pass.
        let loss = match (targets, how.meeting) {
            (0, false) => 0.0,
            (0, true) => loss(i, &batch).map(|_| 0.0)?,
            _ => loss(i, &batch)?,
        };
        Ok(BatchMean { loss, targets })
    };
    let own = share.clone().map(mean).collect::<Result<Vec<BatchMean>>>()?;
    if how.meeting {
        (own.len()..how.rounds).try_for_each(|_| loss(share.end, idle).map(drop))?;
    }
    Ok(own)
}
