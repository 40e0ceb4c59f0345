//! [`GgufModel`]: a GGUF file as the files of a folder, and its tensors as a checkpoint.

use super::architecture::{Description, describe};
use super::file::GgufFile;
use super::tensors::{GgufTensors, Layout, NAMES};
use super::tokenizer;
use crate::fields::Checked;
use crate::hf::{Bytes, Checkpoint};
use crate::{ReadFamily, Result};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// A model in one file.
#[derive(Debug)]
pub(crate) struct GgufModel {
    file: Arc<GgufFile>,
    /// A `config.json`.
    config: Vec<u8>,
    layout: Layout,
}

impl GgufModel {
    /// The file, mapped, its metadata read.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; [`crate::Error::Format`] for a file that is damaged or says what is not implemented, by name.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::new(GgufFile::open(path)?)
    }

    /// The file of this content; `path` is its name for messages.
    ///
    /// # Errors
    /// As [`GgufModel::open`].
    pub(crate) fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::new(GgufFile::new(path.to_owned(), Bytes::Held(bytes.into()))?)
    }

    fn new(file: GgufFile) -> Result<Self> {
        let Description { config, layout } = describe(&file).map_err(|reason| file.refused(reason))?;
        let config = serde_json::to_vec(&config).map_err(|e| file.refused(e.to_string()))?;
        Ok(Self { file: Arc::new(file), config, layout })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// What the name of a quantized form in it is, if there is one.
    pub(crate) fn quantized_form(&self) -> Option<&'static str> {
        let mut forms = self.file.tensors().values().map(|tensor| tensor.form);
        forms.find(|form| form.is_quantized()).map(|form| form.name())
    }

    /// The family's configuration.
    ///
    /// # Errors
    /// [`crate::Error::Format`] naming what no model of the family can have.
    pub(crate) fn family<F: ReadFamily>(&self) -> Result<F> {
        F::read(&self.config, self.path())
    }

    /// Its tensors.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint::over(Box::new(GgufTensors::new(Arc::clone(&self.file), self.layout)), NAMES)
    }

    /// The content of the file `name` that a folder of the same model has, if this one says what would be in it.
    ///
    /// # Errors
    /// [`crate::Error::Format`] for a tokenizer that is damaged or not implemented, by name.
    pub(crate) fn content(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let json: Checked<Option<Value>> = match name {
            "config.json" => return Ok(Some(self.config.clone())),
            "tokenizer.json" => tokenizer::tokenizer_json(&self.file),
            "tokenizer_config.json" => tokenizer::tokenizer_config(&self.file),
            "generation_config.json" => tokenizer::generation_config(&self.file),
            _ => Ok(None),
        };
        let json = json.map_err(|reason| self.file.refused(reason))?;
        json.map(|json| serde_json::to_vec(&json)).transpose().map_err(|e| self.file.refused(e.to_string()))
    }
}
