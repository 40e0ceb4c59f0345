//! `moe-compress`: model folders with fewer experts, of integers, or with experts instead of dense networks. Reads arguments and prints what it
//! does; everything else is the library.

mod calibration;
mod quantize;
mod reduce;
mod upcycle;

use anyhow::{Result, bail};
use candle_core::Device;
use clap::{Args, Parser, Subcommand};
use moe_models::ReadFamily;
use moe_models::cli::{DtypeArg, exit_code};
use moe_models::families::AnyFamily;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::FolderFiles;
use moe_models::train::export::{check_target, export};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Make model folders smaller, or mixtures of dense ones.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Drop the experts that do least on a text, of a model of this project's own.
    Prune(reduce::ReduceArgs),
    /// Merge the experts that do least on a text into those that are kept, of a model of this project's own.
    Merge(reduce::ReduceArgs),
    /// Make a mixture of experts of a dense model of this project's own; it says what the dense one says until it is trained.
    Upcycle(upcycle::UpcycleArgs),
    /// Keep the weights of matrix products as integers, as compressed-tensors does: the nearest, or calibrated on a text.
    Quantize(quantize::QuantizeArgs),
}

/// From one folder to another.
#[derive(Debug, Args)]
pub(crate) struct Folders {
    /// Model folder to read.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// New model folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the weights that are written.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
}

impl Folders {
    /// The model to read, once it is certain that the result can be written.
    pub(crate) fn load(&self) -> Result<Gpt> {
        check_target(&self.out)?;
        own_family(&self.model)?;
        Ok(Gpt::load(&self.model, &Device::Cpu)?)
    }

    /// Writes the result with the tokenizer, the chat template and what else lies beside the weights of the model that was read.
    pub(crate) fn save(&self, model: &Gpt) -> Result<()> {
        export(model, &FolderFiles::read(&self.model)?, &self.out, self.dtype.into())?;
        println!("{}: {}", self.out.display(), sizes(model.config()));
        Ok(())
    }
}

/// Refuses a folder of another family than this project's own, by its name.
fn own_family(dir: &Path) -> Result<()> {
    // What is no family's configuration the loading refuses, and says why.
    match AnyFamily::read_file(&dir.join("config.json")) {
        Ok(AnyFamily::Published(config)) => bail!(
            "{} is a {}; experts are pruned, merged and made of models of this project's own (moe_gpt), which quantize is not limited to",
            dir.display(),
            config.model_type()
        ),
        _ => Ok(()),
    }
}

/// A model's size in words.
pub(crate) fn sizes(config: &GptConfig) -> String {
    let count = config.parameter_count();
    let experts: Vec<String> = config.moe_layers().iter().map(|(_, experts)| experts.to_string()).collect();
    let experts = if experts.is_empty() { "dense".into() } else { format!("experts {}", experts.join(", ")) };
    format!("{} parameters, {} per token, {experts}", count.total, count.active)
}

fn main() -> ExitCode {
    let program = Program::parse();
    exit_code(|| match &program.command {
        Command::Prune(args) => args.prune(),
        Command::Merge(args) => args.merge(),
        Command::Upcycle(args) => args.run(),
        Command::Quantize(args) => args.run(),
    })
}
