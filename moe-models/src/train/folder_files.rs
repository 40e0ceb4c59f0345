//! [`FolderFiles`]: what a model folder has beside its configuration and weights, which a run takes along.

use super::files::write_synced;
use super::tokenizer::END_OF_TEXT;
use crate::{Error, Result};
use std::path::Path;

pub(crate) const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Files that say how texts become tokens and how answers are drawn, in the words of whoever published the model.
pub(crate) const BESIDE: [&str; 5] =
    [TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"];

/// A tokenizer, and what its folder says beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderFiles {
    tokenizer_json: String,
    /// What texts end with.
    end: Option<String>,
    /// By name.
    beside: Vec<(&'static str, Vec<u8>)>,
}

/// A tokenizer alone; its `tokenizer_config.json` is made when it is written.
impl From<String> for FolderFiles {
    fn from(tokenizer_json: String) -> Self {
        Self { tokenizer_json, end: None, beside: Vec::new() }
    }
}

impl FolderFiles {
    /// The tokenizer of the model folder `dir` with what it says beside it.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER);
        Self::of_folder(std::fs::read_to_string(&path).map_err(|e| Error::io(path, e))?, dir)
    }

    /// A tokenizer with what the model folder `dir` says beside it.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is there and cannot be read.
    pub fn of_folder(tokenizer_json: String, dir: &Path) -> Result<Self> {
        let read = |name: &'static str| match std::fs::read(dir.join(name)) {
            Ok(bytes) => Ok(Some((name, bytes))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(dir.join(name), e)),
        };
        let beside = BESIDE.into_iter().filter_map(|name| read(name).transpose()).collect::<Result<_>>()?;
        Ok(Self { tokenizer_json, end: None, beside })
    }

    /// The same of a tokenizer by which texts end with this token, if one is known; else with `<|endoftext|>`.
    #[must_use]
    pub fn ending_with(self, end: Option<String>) -> Self {
        Self { end, ..self }
    }

    /// The text of `tokenizer.json`.
    pub fn tokenizer_json(&self) -> &str {
        &self.tokenizer_json
    }

    /// Writes them into the existing folder `dir` of a model of `max_seq_len` tokens.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be written.
    pub(crate) fn write(&self, max_seq_len: usize, dir: &Path) -> Result<()> {
        write_synced(&dir.join(TOKENIZER), self.tokenizer_json.as_bytes())?;
        if self.beside.iter().all(|(name, _)| *name != TOKENIZER_CONFIG) {
            let end = self.end.as_deref().unwrap_or(END_OF_TEXT);
            let config = serde_json::json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": end,
                "eos_token": end,
                "model_max_length": max_seq_len,
                "clean_up_tokenization_spaces": false,
            });
            write_synced(&dir.join(TOKENIZER_CONFIG), format!("{config:#}\n").as_bytes())?;
        }
        self.beside.iter().try_for_each(|(name, bytes)| write_synced(&dir.join(name), bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_that_ends_texts_is_named() {
        for (files, want) in [
            (FolderFiles::from("{}".to_owned()), END_OF_TEXT),
            (FolderFiles::from("{}".to_owned()).ending_with(Some("</s>".into())), "</s>"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            files.write(8, dir.path()).unwrap();
            let config = std::fs::read_to_string(dir.path().join(TOKENIZER_CONFIG)).unwrap();
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            assert_eq!((&config["eos_token"], &config["bos_token"]), (&want.into(), &want.into()));
        }
    }
}
