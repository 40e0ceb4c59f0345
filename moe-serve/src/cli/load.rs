//! Which model: a folder, or the one built in.

use crate::ServedModel;
use anyhow::Context;
use std::path::PathBuf;

/// Chooses the model.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json; without it, the built-in model.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
}

impl ModelArgs {
    /// Loads the model under `name`, or under its folder's name.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn load(&self, name: Option<String>) -> anyhow::Result<ServedModel> {
        match &self.model {
            Some(dir) => {
                ServedModel::from_dir(dir, name).with_context(|| format!("loading the model in {}", dir.display()))
            }
            None => ServedModel::embedded(name).context("loading the built-in model"),
        }
    }
}
