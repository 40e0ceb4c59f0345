//! `moe-init`: a model folder of initial weights, of any family and size, with a tokenizer.

mod presets;

use crate::cli::DtypeArg;
use crate::random::{RandomFolder, write_random};
use crate::train::tokenizer::Vocabulary;
use crate::train::{RunText, Silent, TokenizerChoice, tokenizer};
use crate::{Family, ReadFamily};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Entries of a tokenizer that is trained here, if the model has as many.
const TRAINED_VOCABULARY: usize = 4096;

/// Write a model folder of initial weights: of a published model's size, or of any `config.json` that a family here reads.
///
/// The folder loads as any other, here and in transformers. Without `--tokenizer` its tokenizer is a small one, trained on the text
/// in this program; ids above its vocabulary have no text.
#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// A published model's configuration.
    #[arg(long, value_name = "NAME", conflicts_with = "config", value_parser = clap::builder::PossibleValuesParser::new(presets::names()))]
    preset: Option<String>,
    /// The configuration in a file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Another value of a field, as JSON: `--set num_hidden_layers=4`. Repeatable.
    #[arg(long = "set", value_name = "FIELD=VALUE", value_parser = setting)]
    settings: Vec<(String, Value)>,
    /// New folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the weights.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// What the weights are drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// An existing tokenizer.json.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

fn setting(text: &str) -> Result<(String, Value), String> {
    let (field, value) = text.split_once('=').ok_or("must be FIELD=VALUE")?;
    let value = serde_json::from_str(value).map_err(|e| format!("{value:?} is not JSON ({e}); quote text twice"))?;
    Ok((field.to_owned(), value))
}

impl InitArgs {
    /// Writes the folder, and says what it holds.
    ///
    /// # Errors
    /// If the configuration is not one that a family here reads, the tokenizer does not fit it, or the folder cannot be written.
    pub fn run(&self) -> Result<()> {
        let (mut json, path) = self.json()?;
        for (field, value) in &self.settings {
            // Presets leave these to the tokenizer.
            let is_end = ["bos_token_id", "eos_token_id"].contains(&field.as_str());
            if json.insert(field.clone(), value.clone()).is_none() && !is_end {
                bail!("--set {field}: the configuration has no such field");
            }
        }
        let decoder = self.family(&json, &path)?.decoder()?;
        let tokenizer = self.tokenizer(decoder.vocab_size)?;
        tokenizer::check_fits(&tokenizer, decoder.vocab_size).context("--tokenizer")?;
        let end = Vocabulary::from(&decoder).end_of_document(&tokenizer).context("--tokenizer")?;
        for field in ["bos_token_id", "eos_token_id"] {
            if !self.settings.iter().any(|(set, _)| set == field) {
                json.insert(field.into(), end.into());
            }
        }
        let family = self.family(&json, &path)?;
        let tokenizer = tokenizer::to_json(&tokenizer)?;
        let folder = RandomFolder { seed: self.seed, dtype: self.dtype.into(), tokenizer_json: &tokenizer };
        let written = write_random(&family, &folder, &self.out)?;
        println!(
            "{}: {} parameters in {} tensors, {:.2} GB",
            self.out.display(),
            written.parameters,
            written.tensors,
            written.bytes as f64 / 1e9
        );
        Ok(())
    }

    fn json(&self) -> Result<(Map<String, Value>, PathBuf)> {
        let (text, path) = match (&self.preset, &self.config) {
            (Some(name), _) => (presets::json(name)?.to_owned(), PathBuf::from(format!("preset {name}"))),
            (None, Some(path)) => {
                (std::fs::read_to_string(path).with_context(|| format!("--config {}", path.display()))?, path.clone())
            }
            (None, None) => bail!("name a --preset, or give a --config"),
        };
        let json = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        Ok((json, path))
    }

    fn family(&self, json: &Map<String, Value>, path: &Path) -> Result<Box<dyn Family>> {
        Ok(<Box<dyn Family>>::read(&serde_json::to_vec(json)?, path)?)
    }

    fn tokenizer(&self, vocab_size: usize) -> Result<tokenizers::Tokenizer> {
        let choice = match &self.tokenizer {
            Some(path) => TokenizerChoice::File(path.clone()),
            None => TokenizerChoice::Train { vocab_size: vocab_size.min(TRAINED_VOCABULARY) },
        };
        Ok(RunText::read(&[], &[], &mut Silent)?.tokenizer(&choice, &mut Silent)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_configurations_of_families() {
        // All parameters, and those of a token, where authors count them.
        for (name, billions, active) in [
            ("mixtral-8x7b", 46.7, Some(12.9)),
            ("olmoe-1b-7b", 6.92, Some(1.28)),
            ("qwen1.5-moe-a2.7b", 14.3, Some(2.7)),
            ("qwen3-30b-a3b", 30.5, Some(3.35)),
            ("qwen3-moe-1.8b", 1.78, None),
            ("deepseek-v2-lite", 15.7, Some(2.66)),
        ] {
            let family = <Box<dyn Family>>::read(presets::json(name).unwrap().as_bytes(), Path::new(name)).unwrap();
            let count = family.decoder().unwrap().parameter_count();
            let active = active.map(|active| (count.active, active, 0.01));
            for (got, want, off) in [(count.total, billions, 0.005)].into_iter().chain(active) {
                let got = got as f64 / 1e9;
                assert!((got / want - 1.0).abs() < off, "{name}: {got} billion parameters");
            }
        }
        assert_eq!(presets::names().count(), 6);
        assert!(presets::json("gpt-5").unwrap_err().to_string().contains("olmoe-1b-7b"));
    }
}
