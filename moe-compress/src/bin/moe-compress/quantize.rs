//! `moe-compress quantize`.

use crate::calibration::{CalibrationArgs, hold_out, least_held_out_of, long_enough, window};
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use moe_compress::calibrate::{CalibratedLayer, Calibration, save_calibrated};
use moe_compress::eval::{TextReport, evaluate_sources};
use moe_kernels::quantized::QuantFormat;
use moe_models::hf::quantization::{nearest, save};
use moe_models::train::data::{DataCache, PackedSource};
use moe_models::train::export::check_target;
use moe_models::train::{RunText, Silent};
use moe_models::{Decoder, Family, ModelSource, Precision, TokenBatch};
use std::path::{Path, PathBuf};

/// Matrices one by one, each value to the nearest integer of its scale, or to integers calibrated on a text; embeddings, norms, biases
/// and gates stay as they are.
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// Model folder to read, of any family, or GGUF file of floats.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// New model folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Size of an integer.
    #[arg(long, value_enum)]
    format: FormatArg,
    /// Inputs that share a scale in int4, a multiple of 32 [default: 32].
    #[arg(long, value_name = "N")]
    group_size: Option<usize>,
    /// Choose integers that change the outputs of each matrix least on a text (GPTQ), instead of the nearest ones: layer by layer,
    /// an expert's on the tokens that are routed to it. A matrix that gets fewer tokens than it has inputs is rounded to the
    /// nearest.
    #[arg(long)]
    calibrate: bool,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Text to measure the model on before and after, in bits per byte and perplexity: as --data. Without any, --calibrate holds
    /// the end of each source of --data out for it, and else nothing is measured.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    text: Vec<String>,
    /// Tokens measured of each source of that text, spread over it; without it, the whole text.
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    max_tokens: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    /// One scale for each output.
    Int8,
    /// One scale for each output and group of inputs.
    Int4,
}

impl QuantizeArgs {
    pub(crate) fn run(&self) -> Result<()> {
        let format = self.format()?;
        ensure!(
            self.calibrate || !self.calibration.is_given(),
            "--data and --calibration-tokens are for --calibrate; add it, or drop them (--text is what a model is measured on)"
        );
        ensure!(
            self.calibrate || !self.text.is_empty() || self.max_tokens.is_none(),
            "--max-tokens is of the text that is measured; give --text, or drop it"
        );
        ensure!(self.model.exists(), "{} is not there; name a model folder or a GGUF file", self.model.display());
        check_target(&self.out)?;
        let Texts { calibration, measured } = self.texts()?;
        let before = measured.as_ref().map(|measured| measured.report(&self.model)).transpose()?;
        match calibration {
            Some(batches) => self.save_calibrated(format, &batches)?,
            None => save(&self.model, &self.out, format, nearest)?,
        }
        println!("{}: {:.2} MB of weights", self.model.display(), megabytes(&self.model)?);
        println!("{}: {:.2} MB of weights in {format}", self.out.display(), megabytes(&self.out)?);
        if let (Some(measured), Some(before)) = (measured, before) {
            let after = measured.report(&self.out)?;
            print_reports([(&self.model, &before), (&self.out, &after)]);
        }
        Ok(())
    }

    fn format(&self) -> Result<QuantFormat> {
        match (self.format, self.group_size) {
            (FormatArg::Int8, Some(_)) => {
                anyhow::bail!("--group-size is for int4; int8 has one scale for each output: drop it")
            }
            (FormatArg::Int8, None) => Ok(QuantFormat::Int8),
            (FormatArg::Int4, group_size) => {
                let format = QuantFormat::Int4 { group_size: group_size.unwrap_or(32) };
                format.check_groups().context("--group-size")?;
                Ok(format)
            }
        }
    }

    fn texts(&self) -> Result<Texts> {
        if !self.calibrate && self.text.is_empty() {
            return Ok(Texts::default());
        }
        let source = ModelSource::open(&self.model)?;
        let config = source.family::<Box<dyn Family>>()?.0.decoder()?;
        if let (Some(tokens), window) = (self.max_tokens, window(&config)) {
            ensure!(tokens >= window, "--max-tokens {tokens} must be at least {window}, one window of the model");
        }
        let named = match self.text.as_slice() {
            [] => None,
            paths => {
                let tokenizer = source.tokenizer()?;
                let text = RunText::read_valid(paths, &mut Silent)?;
                let sources = text.pack(&tokenizer, &config, &DataCache::Memory, &mut Silent)?.1;
                Some(long_enough(sources, window(&config) + 1).context("--text")?)
            }
        };
        if !self.calibrate {
            return Ok(Texts { calibration: None, measured: named.map(|sources| self.measured(sources)) });
        }
        let mut sources = self.calibration.sources(&self.model, &config)?;
        let measured = match named {
            Some(named) => named,
            None => {
                sources = long_enough(sources, least_held_out_of(window(&config))).context("--data")?;
                hold_out(&mut sources, window(&config))?
            }
        };
        let calibration = Some(self.calibration.batches(sources, &config)?);
        Ok(Texts { calibration, measured: Some(self.measured(measured)) })
    }

    fn measured(&self, sources: Vec<PackedSource>) -> Measured {
        Measured { sources, max_tokens: self.max_tokens }
    }

    fn save_calibrated(&self, format: QuantFormat, batches: &[TokenBatch]) -> Result<()> {
        let Calibration { tokens, layers } = save_calibrated(&self.model, &self.out, format, batches, &mut |done| {
            eprintln!("layer {} done", done.layer)
        })?;
        let sum = |count: fn(&CalibratedLayer) -> usize| layers.iter().map(count).sum::<usize>();
        let (experts, nearest) = (sum(|layer| layer.experts), sum(|layer| layer.nearest_experts));
        let (matrices, nearest_matrices) = (sum(|layer| layer.matrices), sum(|layer| layer.nearest_matrices));
        let bytes = layers.iter().map(|layer| layer.moment_bytes).max().unwrap_or(0);
        println!("calibrated on {tokens} tokens; {:.2} MB of moments at most, those of one layer", bytes as f64 / 1e6);
        if nearest_matrices > 0 {
            println!(
                "{nearest_matrices} of {matrices} matrices beside the experts were rounded to the nearest: they got fewer tokens than they have inputs \
                 (raise --calibration-tokens), or are not multiplied with as they are"
            );
        }
        if experts > 0 {
            println!(
                "{nearest} of {experts} experts got fewer tokens than a matrix of theirs has inputs: that was rounded to the nearest"
            );
        }
        Ok(())
    }
}

/// Text, tokenised, where there is use for it.
#[derive(Default)]
struct Texts {
    calibration: Option<Vec<TokenBatch>>,
    measured: Option<Measured>,
}

/// Text that a model is measured on.
struct Measured {
    sources: Vec<PackedSource>,
    max_tokens: Option<usize>,
}

impl Measured {
    /// What the model in `folder` is worth, in bf16 as by `moe-eval`.
    fn report(&self, folder: &Path) -> Result<TextReport> {
        let source = ModelSource::open(folder)?;
        let (decoder, tokenizer) = (Decoder::from_source(&source, Precision::Bf16)?, source.tokenizer()?);
        Ok(evaluate_sources(&decoder, &tokenizer, self.sources.clone(), window(decoder.config()), self.max_tokens)?)
    }
}

/// A row per model, over all sources.
fn print_reports(rows: [(&PathBuf, &TextReport); 2]) {
    let names = rows.map(|(folder, _)| folder.display().to_string());
    let width = names.iter().map(String::len).max().unwrap_or(0).max(24);
    println!("text: {}", rows[0].1.counted);
    println!("{:<width$}{:>12}{:>16}{:>14}{:>14}", "model", "tokens", "bits per byte", "ppl/token", "ppl/word");
    for (name, (_, report)) in names.iter().zip(rows) {
        let Some(all) = report.sources.last() else { continue };
        println!(
            "{name:<width$}{:>12}{:>16.4}{:>14.4}{:>14.2}",
            all.loss.tokens,
            all.loss.bits_per_byte(),
            all.token_perplexity(),
            all.word_perplexity()
        );
    }
}

/// Of the files of weights in a folder, or of a GGUF file.
fn megabytes(dir: &Path) -> Result<f64> {
    if dir.is_file() {
        return Ok(dir.metadata()?.len() as f64 / 1e6);
    }
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|ext| ext == "safetensors") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes as f64 / 1e6)
}
