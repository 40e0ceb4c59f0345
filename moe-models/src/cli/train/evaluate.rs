//! `moe-train --evaluate DIR`: the loss of a model folder on text, source by source. Trains nothing, and writes nothing
//! but a cache of tokens where it is given one.

use super::progress::Progress;
use crate::families::AnyFamily;
use crate::train::data::{DataCache, ValidSource};
use crate::train::evaluate::evaluate;
use crate::train::{RunText, TrainConfig};
use crate::{Model, ModelSource};
use anyhow::{Result, ensure};
use candle_core::Device;
use std::path::Path;

/// Prints a line per source of `config.valid`, evaluated in windows as long as the model allows, and one for all.
pub(crate) fn evaluate_folder(folder: &Path, config: &TrainConfig, progress: &mut Progress) -> Result<()> {
    ensure!(!config.valid.is_empty(), "--evaluate needs text: give --valid PATH");
    let model = Model::<AnyFamily>::load(folder, &Device::Cpu)?.with_precision(config.precision)?;
    // Steps have no meaning here, so a micro-batch may have any size.
    let config = TrainConfig { global_batch_size: config.micro_batch_size, ..config.clone() };
    let config = config.resolved(model.decoder_config().max_seq_len)?;
    let tokenizer = ModelSource::open(folder)?.tokenizer()?;
    let text = RunText::read_valid(&config.valid, progress)?;
    let cache = config.data_cache.as_ref().map_or(DataCache::Memory, |dir| DataCache::Folder(dir.into()));
    let (_, packed) = text.pack(&tokenizer, model.decoder_config(), &cache, progress)?;
    let windows = config.eval_iters * config.micro_batch_size;
    let sources = packed
        .into_iter()
        .map(|source| Ok(ValidSource::new(source, config.seq_len(), windows)?))
        .collect::<Result<Vec<_>>>()?;
    let result = evaluate(&model, &sources, config.micro_batch_size)?;
    println!("{:<24}{:>12}{:>12}{:>16}", "source", "tokens", "nats/token", "bits per byte");
    for source in &result.sources {
        println!("{:<24}{:>12}{:>12.4}{:>16.4}", source.name, source.tokens, source.loss(), source.bits_per_byte());
    }
    let tokens: u64 = result.sources.iter().map(|s| s.tokens).sum();
    println!("{:<24}{tokens:>12}{:>12.4}{:>16.4}", "all", result.loss(), result.bits_per_byte());
    Ok(())
}
