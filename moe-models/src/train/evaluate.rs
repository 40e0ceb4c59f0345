//! Validation: loss and bits per byte of each source. Changes nothing.

use super::data::ValidSource;
use super::metrics::{Record, VALID_BITS_PER_BYTE, VALID_LOSS};
use super::model::{Pass, TokenBatch, TrainModel};
use super::step::no_panic;
use crate::Result;
use crate::gpt::IGNORED;
use moe_kernels::parallel;

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
    let mut results: Vec<SourceLoss> = sources
        .iter()
        .map(|s| SourceLoss { name: s.name().to_owned(), tokens: 0, bytes: s.target_bytes(), nats: 0.0 })
        .collect();
    let batches: Vec<(usize, TokenBatch)> = sources
        .iter()
        .enumerate()
        .flat_map(|(index, source)| source.batches(batch_size).into_iter().map(move |batch| (index, batch)))
        .collect();
    add_losses(model, &batches, &mut results)?;
    Ok(Evaluation { sources: results })
}

/// Evaluates each batch and adds its targets and nats to the entry of `results` that its number names. A batch's mean
/// loss counts as often as it has targets that are not [`IGNORED`].
///
/// # Errors
/// What the model returns; [`crate::Error::Panic`] with the text of a panic.
pub fn add_losses<M: TrainModel>(model: &M, batches: &[(usize, TokenBatch)], results: &mut [SourceLoss]) -> Result<()> {
    for (i, (source, batch)) in batches.iter().enumerate() {
        let targets = batch.target_ids.iter().filter(|&&id| id != IGNORED).count();
        // The mean over no target is no number.
        let loss = || parallel::together(|| no_panic(i, || model.loss(batch, Pass::Eval)));
        let mean = if targets == 0 { 0.0 } else { loss()?.parts.lm };
        results[*source].tokens += targets as u64;
        results[*source].nats += mean * targets as f64;
    }
    Ok(())
}
