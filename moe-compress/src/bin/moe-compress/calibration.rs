//! Text that a model is run on to see what it makes of it.

use anyhow::{Context, Result, ensure};
use clap::Args;
use moe_models::train::data::{DataCache, PackedSource, ValidSource};
use moe_models::train::model::TokenBatch;
use moe_models::train::{RunText, Silent};
use moe_models::{DecoderConfig, ModelSource};
use std::path::Path;

/// Tokens that run at once, unless one window is longer.
const BATCH_TOKENS: usize = 2048;
/// Tokens of a window at most: attention over more would take longer than all else.
const LONGEST_WINDOW: usize = 2048;
/// Of --calibration-tokens.
const DEFAULT_TOKENS: usize = 65536;
/// What of each source is held out where nothing else is: as much as `moe-train` does.
const HELD_OUT: f64 = 0.02;

#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Text to run the model on: .txt or .jsonl files (also .xz) or folders of them. Without any, the excerpt of six domains that
    /// is part of the program.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Vec<String>,
    /// Tokens of it, spread evenly over the sources and each of them [default: 65536].
    #[arg(long, value_name = "N")]
    calibration_tokens: Option<usize>,
}

/// Tokens of a window of text, for a model of `config`.
pub(crate) fn window(config: &DecoderConfig) -> usize {
    config.max_seq_len.min(LONGEST_WINDOW)
}

impl CalibrationArgs {
    /// Whether any of them is there.
    pub(crate) fn is_given(&self) -> bool {
        !self.data.is_empty() || self.calibration_tokens.is_some()
    }

    fn tokens(&self, config: &DecoderConfig) -> Result<usize> {
        let (tokens, window) = (self.calibration_tokens.unwrap_or(DEFAULT_TOKENS), window(config));
        ensure!(tokens >= window, "--calibration-tokens {tokens} must be at least {window}, one window of the model");
        Ok(tokens)
    }

    /// The tokenised sources, for the model in `folder`.
    pub(crate) fn sources(&self, folder: &Path, config: &DecoderConfig) -> Result<Vec<PackedSource>> {
        self.tokens(config)?;
        let tokenizer = ModelSource::open(folder)?.tokenizer()?;
        if self.data.is_empty() {
            let excerpt = RunText::read(&[], &[], &mut Silent)?;
            return Ok(excerpt.pack(&tokenizer, config, &DataCache::Memory, &mut Silent)?.0);
        }
        // Every source counts alike, so weights are refused.
        let text = RunText::read_valid(&self.data, &mut Silent).context("--data")?;
        Ok(text.pack(&tokenizer, config, &DataCache::Memory, &mut Silent)?.1)
    }

    /// Windows of the sources, as many as were asked for.
    pub(crate) fn batches(&self, sources: Vec<PackedSource>, config: &DecoderConfig) -> Result<Vec<TokenBatch>> {
        let (tokens, window) = (self.tokens(config)?, window(config));
        let sources = long_enough(sources, window + 1).context("--data")?;
        let there: Vec<usize> = sources.iter().map(|source| source.num_sequences(window)).collect();
        let shares = shares(tokens / window, &there);
        let taken = shares.iter().sum::<usize>() * window;
        if taken < tokens / window * window {
            eprintln!("the text has {taken} tokens in windows of {window}, of {tokens} asked for: all of it is taken");
        }
        let mut batches = Vec::new();
        for (source, windows) in sources.into_iter().zip(shares).filter(|(_, windows)| *windows > 0) {
            batches.extend(ValidSource::new(source, window, windows)?.batches((BATCH_TOKENS / window).max(1)));
        }
        Ok(batches)
    }
}

/// `windows` divided over sources that have so many, as evenly as can be: those with the fewest first, so that others make up for them.
fn shares(windows: usize, there: &[usize]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..there.len()).collect();
    order.sort_by_key(|&source| there[source]);
    let (mut shares, mut left) = (vec![0; there.len()], windows);
    for (done, source) in order.into_iter().enumerate() {
        shares[source] = there[source].min(left / (there.len() - done));
        left -= shares[source];
    }
    shares
}

/// The sources of at least `tokens` tokens; names the others.
///
/// # Errors
/// If none is as long.
pub(crate) fn long_enough(sources: Vec<PackedSource>, tokens: usize) -> Result<Vec<PackedSource>> {
    let (long, short): (Vec<_>, Vec<_>) = sources.into_iter().partition(|source| source.num_tokens() >= tokens);
    ensure!(!long.is_empty(), "no source has {tokens} tokens, which windows of the model need; give longer text");
    for source in &short {
        eprintln!("{}: left out, its {} tokens are fewer than {tokens}", source.name, source.num_tokens());
    }
    Ok(long)
}

/// Tokens that a source must have for [`hold_out`].
pub(crate) fn least_held_out_of(window: usize) -> usize {
    2 * (window + 2)
}

/// Cuts the end off each source: a share, but a window at least.
pub(crate) fn hold_out(sources: &mut [PackedSource], window: usize) -> Result<Vec<PackedSource>> {
    let held_out = |source: &mut PackedSource| {
        let (name, tokens) = (source.name.clone(), source.num_tokens());
        let fraction = HELD_OUT.max((window + 2) as f64 / tokens as f64);
        ensure!(fraction <= 0.5, "{name} has {tokens} tokens, too few to calibrate on and to hold a window out of");
        Ok(source.split_tail(fraction))
    };
    let all = sources.iter_mut().map(held_out).collect::<Result<Vec<_>>>();
    all.context("--data: the end of each source is held out to measure on; give more text, or other with --text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_over_sources_and_no_more_than_asked_for() {
        assert_eq!(shares(7, &[9, 9, 9]), [2, 2, 3]);
        let few = shares(3, &[5; 1000]);
        assert_eq!((few.iter().sum::<usize>(), few.iter().max()), (3, Some(&1)));
        assert_eq!(shares(10, &[100, 2, 3]), [5, 2, 3], "what short ones lack, long ones make up for");
        assert_eq!(shares(10, &[1, 4]), [1, 4], "there is no more");
    }
}
