//! Which model: a folder, or the one built in.

use crate::ServedModel;
use anyhow::Context;
use moe_kernels::select;
use moe_models::Precision;
use std::path::PathBuf;

/// Chooses the model.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json; without it, the built-in model.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// What the matrix products read; sums, softmax and routing are f32 in either case.
    #[arg(long, value_enum, default_value = "bf16")]
    pub precision: PrecisionArg,
}

/// [`Precision`] on the command line.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum PrecisionArg {
    /// Half the memory traffic; what the built-in model's weights are stored in.
    Bf16,
    /// Weights and activations as they are.
    F32,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::F32 => Self::F32,
        }
    }
}

impl ModelArgs {
    /// Loads the model under `name`, or under its folder's name, on the kernels that the environment names, if any.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn load(&self, name: Option<String>) -> anyhow::Result<ServedModel> {
        if let Ok(isa) = std::env::var(select::ENV) {
            select::force(isa.parse()?)?;
        }
        let precision = self.precision.into();
        match &self.model {
            Some(dir) => ServedModel::from_dir(dir, name, precision)
                .with_context(|| format!("loading the model in {}", dir.display())),
            None => ServedModel::embedded(name, precision).context("loading the built-in model"),
        }
    }
}
