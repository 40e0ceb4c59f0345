//! Which model: a folder, a GGUF file, or the one built in.

use crate::ServedModel;
use anyhow::{Context, ensure};
use moe_models::PackedForms;
use moe_models::cli::{PrecisionArg, QuantizeArg, choose_kernels, packed_forms};
use moe_parallel::Mesh;
use std::path::PathBuf;

/// Chooses the model.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json, or a GGUF file; without it, the built-in model.
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// What the matrix products read; sums, softmax and routing are f32 in either case.
    ///
    /// The built-in model's weights are stored in bf16.
    #[arg(long, value_enum, default_value = "bf16")]
    pub precision: PrecisionArg,
    /// Quantizes the matrices while they are loaded; a folder that is quantized already keeps what it has.
    ///
    /// Those of a GGUF file are rounded from the values that its own integers stand for, but for Q4_0, whose integers int4 keeps.
    /// Embeddings, the output layer, norms and routers stay as they are. Inputs of quantized matrices are rounded to 8 bits, row
    /// by row.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub quantize: Option<QuantizeArg>,
    /// Quantizes the output layer too, which a decoded token reads whole: in int8, half of its bytes.
    ///
    /// Where the output layer is the embedding, ids are still looked up in the rows as they are, which are kept beside it.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub quantize_output: Option<QuantizeArg>,
    /// Keeps the packed weights in a file in this folder, and maps it at later starts instead of packing them again.
    ///
    /// The file is as large as the weights in memory and holds for these files, forms and this version; processes that serve the
    /// same model share it. It may be removed at any time.
    #[arg(long, value_name = "DIR", requires = "model")]
    pub packed_cache: Option<PathBuf>,
}

impl ModelArgs {
    fn forms(&self) -> PackedForms {
        packed_forms(self.precision, self.quantize, self.quantize_output)
    }

    /// Loads the model under `name`, or under its folder's name, on the kernels that the environment names, if any.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn load(&self, name: Option<String>) -> anyhow::Result<ServedModel> {
        choose_kernels()?;
        let forms = self.forms();
        let loading = |path: &PathBuf| format!("loading the model in {}", path.display());
        match (&self.model, &self.packed_cache) {
            (Some(path), Some(cache)) => {
                ServedModel::load_kept(path, name, forms, cache).with_context(|| loading(path))
            }
            (Some(path), None) => ServedModel::load(path, name, forms).with_context(|| loading(path)),
            (None, _) => ServedModel::embedded(name, forms).context("loading the built-in model"),
        }
    }

    /// Loads one rank's part of the model, likewise. Called by all ranks of `mesh`.
    ///
    /// # Errors
    /// What is wrong with which file, or why the model cannot be divided so.
    pub(super) fn load_over(&self, name: Option<String>, mesh: &Mesh) -> anyhow::Result<ServedModel> {
        choose_kernels()?;
        ensure!(self.packed_cache.is_none(), "--packed-cache is for one rank: each of several packs its own part");
        let forms = self.forms();
        match &self.model {
            Some(path) => ServedModel::load_over(path, name, forms, mesh)
                .with_context(|| format!("loading the model in {}", path.display())),
            None => ServedModel::embedded_over(name, forms, mesh).context("loading the built-in model"),
        }
    }
}
