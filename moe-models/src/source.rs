//! [`ModelSource`]: where a published model lies, a Hugging Face folder or a GGUF file, behind the same questions.

use crate::gguf::GgufModel;
use crate::hf::quantization::{QuantizationConfig, read_config};
use crate::hf::{Checkpoint, refuse_adapters, weight_files};
use crate::train::tokenizer;
use crate::{Error, Family, ReadFamily, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;

/// A model that is opened: its configuration and tensors for `moe-models`, its other files for whoever knows them.
#[derive(Debug, Clone)]
pub struct ModelSource(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Folder(PathBuf),
    Gguf(Arc<GgufModel>),
}

impl ModelSource {
    /// A folder; or a GGUF file, whose metadata is read.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] for a file that is no GGUF file, is damaged, or says what is not implemented, by name. What
    /// is wrong with a folder shows when it is asked for something.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(match path.is_file() {
            true => Kind::Gguf(Arc::new(GgufModel::open(path)?)),
            false => Kind::Folder(path.to_owned()),
        }))
    }

    /// A GGUF file of this content; `path` is its name for messages.
    ///
    /// # Errors
    /// As [`ModelSource::open`].
    pub fn from_gguf_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Ok(Self(Kind::Gguf(Arc::new(GgufModel::from_bytes(path, bytes)?))))
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Kind::Folder(dir) => dir,
            Kind::Gguf(model) => model.path(),
        }
    }

    /// What the folder or file is called, the file without its ending.
    pub fn name(&self) -> Option<String> {
        let name = match &self.0 {
            Kind::Folder(dir) => dir.file_name(),
            Kind::Gguf(model) => model.path().file_stem(),
        };
        name.map(|name| name.to_string_lossy().into_owned())
    }

    /// Where its configuration is, for messages.
    pub(crate) fn config_path(&self) -> PathBuf {
        match &self.0 {
            Kind::Folder(dir) => dir.join("config.json"),
            Kind::Gguf(model) => model.path().to_owned(),
        }
    }

    /// The content of one of the files that a folder has beside weights: `tokenizer.json`, `tokenizer_config.json`,
    /// `generation_config.json`. A GGUF file says itself what would be in them. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Format`] for a GGUF file whose tokenizer is not implemented, by name.
    pub fn content(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match &self.0 {
            Kind::Gguf(model) => model.content(name),
            Kind::Folder(dir) => match std::fs::read(dir.join(name)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(Error::io(dir.join(name), e)),
            },
        }
    }

    /// The same of a file that must be there.
    ///
    /// # Errors
    /// As [`ModelSource::content`]; if there is none.
    pub fn required(&self, name: &str) -> Result<Vec<u8>> {
        self.content(name)?.ok_or_else(|| match &self.0 {
            Kind::Folder(dir) => Error::io(dir.join(name), std::io::Error::from_raw_os_error(2)),
            Kind::Gguf(model) => Error::format(model.path(), format!("has nothing of what a {name} says")),
        })
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// As [`ModelSource::required`]; [`Error::Format`] if it is none.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        const NAME: &str = "tokenizer.json";
        let path = match &self.0 {
            Kind::Folder(dir) => dir.join(NAME),
            Kind::Gguf(model) => model.path().to_owned(),
        };
        tokenizer::parse(&self.required(NAME)?, &path)
    }

    /// The configuration of its family, and how its matrices are stored if they are integers of a kind that is kept whatever is asked
    /// for.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`]; for a folder with an adapter too.
    pub fn family<F: ReadFamily>(&self) -> Result<(F, Option<QuantizationConfig>)> {
        match &self.0 {
            Kind::Folder(dir) => {
                refuse_adapters(dir)?;
                read_config(&self.required("config.json")?, &self.config_path())
            }
            Kind::Gguf(model) => Ok((model.family()?, None)),
        }
    }

    /// What it calls a form of weights that are no floats, if it has some.
    pub(crate) fn quantized_form(&self, quantization: Option<&QuantizationConfig>) -> Option<String> {
        match &self.0 {
            Kind::Folder(_) => quantization.map(|config| config.format.to_string()),
            Kind::Gguf(model) => model.quantized_form().map(str::to_owned),
        }
    }

    /// Its tensors.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub fn checkpoint<F: Family + ?Sized>(&self, family: &F) -> Result<Checkpoint> {
        match &self.0 {
            Kind::Folder(dir) => Checkpoint::of_family(dir, family),
            Kind::Gguf(model) => Ok(model.checkpoint()),
        }
    }

    /// The files that its tensors lie in.
    ///
    /// # Errors
    /// If an index of a folder is damaged.
    pub(crate) fn weight_files(&self) -> Result<Vec<PathBuf>> {
        match &self.0 {
            Kind::Folder(dir) => weight_files(dir),
            Kind::Gguf(model) => Ok(vec![model.path().to_owned()]),
        }
    }

    /// Whether integers of some of its matrices can be kept where that form is asked for, and others are floats.
    pub(crate) fn may_keep_integers(&self) -> bool {
        matches!(self.0, Kind::Gguf(_))
    }
}
