//! [`ServedModel`]: a language model, its tokenizer, its chat template and its generation defaults, checked to fit.

use crate::engine::EngineConfig;
use crate::generation_config::GenerationDefaults;
use crate::text::{ChatMessage, ChatTemplate, TextTokenizer};
use crate::{Error, Result};
use moe_models::CausalLm;
use std::path::Path;
use std::sync::Arc;

/// Everything needed to answer requests with one model.
pub struct ServedModel {
    /// The name clients use.
    pub name: String,
    /// Token ids in, logits out.
    pub lm: Arc<dyn CausalLm>,
    /// Text to token ids and back.
    pub tokenizer: Arc<TextTokenizer>,
    /// Messages to a prompt.
    pub chat: ChatTemplate,
    /// What requests leave open.
    pub defaults: GenerationDefaults,
}

impl std::fmt::Debug for ServedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServedModel").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ServedModel {
    /// Puts the parts together.
    ///
    /// # Errors
    /// [`Error::ModelFile`] if the tokenizer has tokens the model does not know, or a default names one.
    pub fn new(
        name: impl Into<String>,
        lm: Arc<dyn CausalLm>,
        tokenizer: TextTokenizer,
        chat: ChatTemplate,
        defaults: GenerationDefaults,
    ) -> Result<Self> {
        let (num_tokens, vocab_size) = (tokenizer.num_tokens(), lm.vocab_size());
        if num_tokens > vocab_size {
            return Err(Error::model_file(
                "tokenizer.json",
                format!(
                    "has {num_tokens} tokens, but the model's vocab_size is {vocab_size}; use the tokenizer it was trained with"
                ),
            ));
        }
        let named = defaults.eos_token_ids.iter().chain(&defaults.bos_token_id).chain(&defaults.suppress_tokens);
        if let Some(id) = named.copied().find(|&id| id as usize >= num_tokens) {
            return Err(Error::model_file(
                "generation_config.json",
                format!("names token {id}, but tokenizer.json has only {num_tokens} tokens"),
            ));
        }
        Ok(Self { name: name.into(), lm, tokenizer: Arc::new(tokenizer), chat, defaults })
    }

    /// Reads the files beside the weights of `dir` and puts them around `lm`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::ModelFile`]; `generation_config.json` and `tokenizer_config.json` may be absent.
    pub fn with_files(name: impl Into<String>, lm: Arc<dyn CausalLm>, dir: &Path) -> Result<Self> {
        let tokenizer = TextTokenizer::from_bytes(&read(&dir.join("tokenizer.json"))?)?;
        let chat = match read_if_there(&dir.join("tokenizer_config.json"))? {
            Some(json) => ChatTemplate::from_tokenizer_config(&json)?,
            None => ChatTemplate::dialogue()?,
        };
        let defaults = match read_if_there(&dir.join("generation_config.json"))? {
            Some(json) => GenerationDefaults::from_bytes(&json)?,
            None => GenerationDefaults::default(),
        };
        Self::new(name, lm, tokenizer, chat, defaults)
    }

    /// What stands in for an empty prompt: the beginning-of-sequence token, or else the end of the text before.
    pub fn first_token(&self) -> Option<u32> {
        self.defaults.bos_token_id.or_else(|| self.defaults.eos_token_ids.first().copied())
    }

    /// The prompt that asks for an answer to one message.
    ///
    /// # Errors
    /// [`Error::Template`].
    pub fn chat_prompt(&self, message: &str) -> Result<String> {
        self.chat.render(&[ChatMessage { role: "user".into(), content: message.into() }])
    }

    /// What the engine must know of this model.
    pub fn engine_config(&self, max_queue: usize) -> EngineConfig {
        EngineConfig {
            max_queue,
            num_tokens: self.tokenizer.num_tokens(),
            eos_token_ids: self.defaults.eos_token_ids.clone(),
            suppressed: self.defaults.suppress_tokens.clone(),
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
