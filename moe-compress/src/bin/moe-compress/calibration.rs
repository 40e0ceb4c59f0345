//! Text on which experts show what they do.

use anyhow::{Result, ensure};
use clap::Args;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::data::{DataCache, ValidSource};
use moe_models::train::model::TokenBatch;
use moe_models::train::{RunText, Silent, tokenizer};
use std::path::Path;

/// Sequences that run at once.
const BATCH: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Text to run the model on: .txt or .jsonl files (also .xz) or folders of them. Without any, the excerpt of six domains that
    /// is part of the program.
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
    /// Tokens of it, spread evenly over the sources and each of them.
    #[arg(long, value_name = "N", default_value = "65536")]
    calibration_tokens: usize,
}

impl CalibrationArgs {
    /// Windows as long as the model allows.
    pub(crate) fn batches(&self, folder: &Path, model: &Gpt) -> Result<Vec<TokenBatch>> {
        let &GptConfig { vocab_size, max_seq_len, .. } = model.config();
        ensure!(
            self.calibration_tokens >= max_seq_len,
            "--calibration-tokens {} must be at least {max_seq_len}, one window of the model",
            self.calibration_tokens
        );
        let tokenizer = tokenizer::load(&folder.join("tokenizer.json"))?;
        let text = RunText::read(&self.data, &[], &mut Silent)?;
        let (packed, _) = text.pack(&tokenizer, vocab_size, &DataCache::Memory, &mut Silent)?;
        let windows = (self.calibration_tokens / max_seq_len).div_ceil(packed.len().max(1)).max(1);
        let mut batches = Vec::new();
        for source in packed {
            batches.extend(ValidSource::new(source, max_seq_len, windows)?.batches(BATCH));
        }
        Ok(batches)
    }
}
