//! Families of models. Each is one file: its `config.json`, the [`DecoderConfig`] that follows from it, and the names of its
//! tensors in published files.

mod backbone;
mod deepseek;
mod glm4_moe;
pub mod gpt;
mod gpt_oss;
mod granitemoe;
mod llama;
mod llama4;
mod mixtral;
mod olmoe;
mod phimoe;
mod published;
mod qwen2_moe;
mod qwen3_moe;

pub use published::Published;

use crate::hf::NameTable;
use crate::{DecoderConfig, Error, Result};
use candle_core::DType;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::path::Path;

/// A family's configuration.
pub trait Family: Debug + Send + Sync {
    /// What the layers are made of, checked.
    ///
    /// # Errors
    /// [`Error::Config`] naming the value.
    fn decoder(&self) -> Result<DecoderConfig>;

    /// The names of its tensors in files.
    fn names(&self) -> NameTable;

    /// Whether a tensor of this name in files is something that the decoder has no use for, as heads that predict further tokens.
    fn is_extra(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// What its `generation_config.json` says where no folder has brought one along: how texts begin and end.
    ///
    /// # Errors
    /// As [`Self::decoder`].
    fn generation_config(&self) -> Result<Value> {
        Ok(self.decoder()?.eos_token_id.map_or_else(|| json!({}), |end| json!({ "eos_token_id": end })))
    }

    /// The content of its `config.json` beside weights saved as `dtype`.
    ///
    /// # Errors
    /// If a value cannot be written as JSON (NaN).
    fn to_json(&self, dtype: DType) -> Result<String>;
}

impl<T: Family + ?Sized> Family for Box<T> {
    fn decoder(&self) -> Result<DecoderConfig> {
        (**self).decoder()
    }
    fn names(&self) -> NameTable {
        (**self).names()
    }
    fn is_extra(&self, name: &str) -> bool {
        (**self).is_extra(name)
    }
    fn generation_config(&self) -> Result<Value> {
        (**self).generation_config()
    }
    fn to_json(&self, dtype: DType) -> Result<String> {
        (**self).to_json(dtype)
    }
}

/// A family whose `config.json` can be read.
pub trait ReadFamily: Family + Sized {
    /// Reads and checks the content of a `config.json`, of which `path` is the name for messages.
    ///
    /// # Errors
    /// [`Error::Format`] naming the field.
    fn read(json: &[u8], path: &Path) -> Result<Self>;

    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`].
    fn read_file(path: &Path) -> Result<Self> {
        Self::read(&std::fs::read(path).map_err(|e| Error::io(path, e))?, path)
    }
}

/// A family by what a file says it is.
#[derive(Debug, Clone)]
pub enum AnyFamily {
    /// This project's own.
    Gpt(gpt::GptConfig),
    /// One that others publish.
    Published(Published),
}

impl AnyFamily {
    fn family(&self) -> &dyn Family {
        match self {
            Self::Gpt(config) => config,
            Self::Published(config) => config,
        }
    }
}

impl Family for AnyFamily {
    fn decoder(&self) -> Result<DecoderConfig> {
        self.family().decoder()
    }
    fn names(&self) -> NameTable {
        self.family().names()
    }
    fn is_extra(&self, name: &str) -> bool {
        self.family().is_extra(name)
    }
    fn generation_config(&self) -> Result<Value> {
        self.family().generation_config()
    }
    fn to_json(&self, dtype: DType) -> Result<String> {
        self.family().to_json(dtype)
    }
}

impl ReadFamily for AnyFamily {
    fn read(json: &[u8], path: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Head {
            model_type: String,
        }
        let head: Head = parse(json, path)?;
        let name = head.model_type.as_str();
        if name == gpt::MODEL_TYPE {
            return Ok(Self::Gpt(gpt::GptConfig::read(json, path)?));
        }
        if published::model_types().any(|known| known == name) {
            return Ok(Self::Published(Published::read(json, path)?));
        }
        let known: Vec<&str> = [gpt::MODEL_TYPE].into_iter().chain(published::model_types()).collect();
        Err(Error::format(path, format!("model_type {name:?} is not one of {}", known.join(", "))))
    }
}

/// Whatever family the file names.
impl ReadFamily for Box<dyn Family> {
    fn read(json: &[u8], path: &Path) -> Result<Self> {
        Ok(Box::new(AnyFamily::read(json, path)?))
    }
}

/// A JSON file as a `T`; a `T` that denies unknown fields refuses by name what this project does not implement.
pub(crate) fn parse<T: DeserializeOwned>(json: &[u8], path: &Path) -> Result<T> {
    serde_json::from_slice(json).map_err(|e| Error::format(path, e.to_string()))
}
