//! [`ServedModel`]: a language model, its tokenizer, its chat template and its generation defaults, checked to fit.

use crate::engine::{EngineConfig, SchedulingConfig};
use crate::generation_config::GenerationDefaults;
use crate::text::{ChatMessage, ChatTemplate, Grammars, TextTokenizer, ThoughtTokens};
use crate::{Error, Result};
use moe_models::{CausalLm, Decoder, Kept, ModelSource, PackedForms};
use moe_parallel::Mesh;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// What clients call the built-in model.
const EMBEDDED_NAME: &str = "moe-demo";

const EMBEDDED_CONFIG: &[u8] = include_bytes!("../model/config.json");
const EMBEDDED_WEIGHTS: &[u8] = include_bytes!("../model/model.safetensors");

/// The contents of the files beside the weights.
struct TextFiles<'a> {
    config: &'a [u8],
    tokenizer: &'a [u8],
    tokenizer_config: Option<&'a [u8]>,
    chat_template: Option<&'a [u8]>,
    generation_config: Option<&'a [u8]>,
}

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
    /// Made when the first request asks for a form.
    grammars: OnceLock<Grammars>,
    /// Made when the first request asks for a form after a thought.
    thought_tokens: OnceLock<Arc<ThoughtTokens>>,
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
                format!("or config.json names token {id}, but tokenizer.json has only {num_tokens} tokens"),
            ));
        }
        let (grammars, thought_tokens) = (OnceLock::new(), OnceLock::new());
        Ok(Self { name: name.into(), lm, tokenizer: Arc::new(tokenizer), chat, defaults, grammars, thought_tokens })
    }

    /// Loads `config.json`, `model.safetensors` and `tokenizer.json` of a folder, with weights in `forms` (one [`moe_models::Precision`],
    /// or quantized on the way; a quantized folder keeps its own), and `generation_config.json`, `tokenizer_config.json` and
    /// `chat_template.jinja` where they exist; or a GGUF file, which says all of this. Without a `name` the folder's or file's is taken.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn load(path: &Path, name: Option<String>, forms: impl Into<PackedForms>) -> Result<Self> {
        let source = ModelSource::open(path)?;
        let lm = Decoder::from_source(&source, forms)?;
        Self::with_text_of(&source, name, lm)
    }

    /// One rank's part of the model that [`ServedModel::load`] loads, with the text's side whole. Called by all ranks of `mesh`.
    ///
    /// # Errors
    /// As [`Self::load`], and if the model cannot be divided so.
    pub fn load_over(path: &Path, name: Option<String>, forms: impl Into<PackedForms>, mesh: &Mesh) -> Result<Self> {
        let source = ModelSource::open(path)?;
        let lm = Decoder::from_source_over(&source, forms, mesh)?;
        Self::with_text_of(&source, name, lm)
    }

    /// One rank's part of the model inside this program. Called by all ranks of `mesh`.
    ///
    /// # Errors
    /// If the model cannot be divided so.
    pub fn embedded_over(name: Option<String>, forms: impl Into<PackedForms>, mesh: &Mesh) -> Result<Self> {
        Self::with_embedded_text(name, Decoder::from_bytes_over(EMBEDDED_CONFIG, EMBEDDED_WEIGHTS, forms, mesh)?)
    }

    /// The same with the packed weights kept in a file in the folder `cache`: a later start maps it and packs nothing.
    ///
    /// # Errors
    /// As [`Self::load`], and if the folder cannot be made.
    pub fn load_kept(path: &Path, name: Option<String>, forms: impl Into<PackedForms>, cache: &Path) -> Result<Self> {
        let source = ModelSource::open(path)?;
        let (lm, kept) = Decoder::from_source_kept(&source, forms, cache)?;
        match kept {
            Kept::Found(path) => tracing::info!("packed weights: mapped from {}", path.display()),
            Kept::Written(path) => tracing::info!("packed weights: kept in {} for the next start", path.display()),
            Kept::Unwritten(reason) => tracing::warn!("packed weights could not be kept for the next start: {reason}"),
        }
        Self::with_text_of(&source, name, lm)
    }

    fn with_text_of(source: &ModelSource, name: Option<String>, lm: Decoder) -> Result<Self> {
        let tokenizer = source.required("tokenizer.json")?;
        let tokenizer_config = source.content("tokenizer_config.json")?;
        let chat_template = source.content("chat_template.jinja")?;
        let generation_config = source.content("generation_config.json")?;
        let config = source.required("config.json")?;
        let files = TextFiles {
            config: &config,
            tokenizer: &tokenizer,
            tokenizer_config: tokenizer_config.as_deref(),
            chat_template: chat_template.as_deref(),
            generation_config: generation_config.as_deref(),
        };
        Self::from_files(name.or_else(|| source.name()).unwrap_or_else(|| "model".to_owned()), lm, files)
    }

    /// The model inside this program, trained by this workspace's own trainer; `model/MODEL_CARD.md` describes it.
    ///
    /// # Errors
    /// None in practice: a test loads it.
    pub fn embedded(name: Option<String>, forms: impl Into<PackedForms>) -> Result<Self> {
        Self::with_embedded_text(name, Decoder::from_bytes(EMBEDDED_CONFIG, EMBEDDED_WEIGHTS, forms)?)
    }

    fn with_embedded_text(name: Option<String>, lm: Decoder) -> Result<Self> {
        let files = TextFiles {
            config: EMBEDDED_CONFIG,
            tokenizer: include_bytes!("../model/tokenizer.json"),
            tokenizer_config: Some(include_bytes!("../model/tokenizer_config.json")),
            chat_template: None,
            generation_config: Some(include_bytes!("../model/generation_config.json")),
        };
        Self::from_files(name.unwrap_or_else(|| EMBEDDED_NAME.to_owned()), lm, files)
    }

    fn from_files(name: String, lm: Decoder, files: TextFiles<'_>) -> Result<Self> {
        tracing::info!("weights: {}", describe_weights(&lm));
        let tokenizer = TextTokenizer::from_bytes(files.tokenizer, lm.config().vocab_size)?;
        let chat = ChatTemplate::from_files(files.tokenizer_config, files.chat_template)?;
        let mut defaults =
            files.generation_config.map_or_else(|| Ok(Default::default()), GenerationDefaults::from_bytes)?;
        // All of them, as transformers has it, where a decoder knows one.
        if defaults.eos_token_ids.is_empty() {
            defaults.eos_token_ids = GenerationDefaults::eos_token_ids_of(files.config)?;
        }
        if defaults.eos_token_ids.is_empty() {
            defaults.eos_token_ids.extend(lm.config().eos_token_id);
        }
        Self::new(name, Arc::new(lm), tokenizer, chat, defaults)
    }

    /// Makes grammars of this model's tokens.
    ///
    /// # Errors
    /// As [`Grammars::new`].
    pub fn grammars(&self) -> Result<&Grammars> {
        if let Some(grammars) = self.grammars.get() {
            return Ok(grammars);
        }
        let grammars = Grammars::new(&self.tokenizer, &self.defaults.eos_token_ids)?;
        Ok(self.grammars.get_or_init(|| grammars))
    }

    /// What this model's tokenizer has for thoughts.
    pub(crate) fn thought_tokens(&self) -> Arc<ThoughtTokens> {
        let make = || Arc::new(ThoughtTokens::new(Arc::clone(&self.tokenizer), &self.defaults.eos_token_ids));
        Arc::clone(self.thought_tokens.get_or_init(make))
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
        self.chat.render(&[ChatMessage::new("user", message)])
    }

    /// The tokens of a prompt that the chat template made.
    ///
    /// # Errors
    /// As [`TextTokenizer::encode`].
    pub fn encode_chat(&self, prompt: &str) -> Result<Vec<u32>> {
        if self.chat.says_special_tokens() {
            self.tokenizer.encode_whole(prompt)
        } else {
            self.tokenizer.encode(prompt)
        }
    }

    /// What the engine must know of this model: no queue, one sequence's memory and the default schedule until told otherwise.
    pub fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            max_queue: 0,
            num_tokens: self.tokenizer.num_tokens(),
            eos_token_ids: self.defaults.eos_token_ids.clone(),
            suppressed: self.defaults.suppress_tokens.clone(),
            scheduling: SchedulingConfig::default(),
            kv_cache_bytes: 0,
        }
    }
}

/// The forms in which a model keeps its weights, with the memory of each.
fn describe_weights(lm: &Decoder) -> String {
    let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
    for weight in lm.weights() {
        *bytes.entry(weight.form()).or_default() += weight.bytes();
    }
    let total = bytes.values().sum::<usize>() as f64 / 1e6;
    let parts = bytes.iter().map(|(form, bytes)| format!("{form} {:.1} MB", *bytes as f64 / 1e6));
    format!("{total:.1} MB ({})", parts.collect::<Vec<_>>().join(", "))
}
