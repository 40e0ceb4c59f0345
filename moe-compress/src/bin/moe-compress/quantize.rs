//! `moe-compress quantize`.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use moe_kernels::quantized::QuantFormat;
use moe_models::hf::quantization::{nearest, save};
use std::path::{Path, PathBuf};

/// Experts one by one, each value to the nearest integer of its scale; embeddings, norms, biases and gates stay as they are.
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// Model folder to read, of any family.
    #[arg(long, value_name = "DIR")]
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
        let format = match (self.format, self.group_size) {
            (FormatArg::Int8, Some(_)) => {
                anyhow::bail!("--group-size is for int4; int8 has one scale for each output: drop it")
            }
            (FormatArg::Int8, None) => QuantFormat::Int8,
            (FormatArg::Int4, group_size) => QuantFormat::Int4 { group_size: group_size.unwrap_or(32) },
        };
        ensure!(self.model.is_dir(), "{} is not a folder; name a model folder", self.model.display());
        save(&self.model, &self.out, format, nearest)?;
        println!("{}: {:.2} MB of weights", self.model.display(), megabytes(&self.model)?);
        println!("{}: {:.2} MB of weights in {format}", self.out.display(), megabytes(&self.out)?);
        Ok(())
    }
}

/// Of the files of weights in a folder.
fn megabytes(dir: &Path) -> Result<f64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|ext| ext == "safetensors") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes as f64 / 1e6)
}
