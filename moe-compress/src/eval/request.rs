//! From a context and a continuation as text to token ids, by lm-eval's rule.

use super::python;
use crate::{Error, Result};
use moe_models::train::tokenizer::{Vocabulary, check_fits, required_vocab_size};
use tokenizers::Tokenizer;

/// A continuation that is to be scored after a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is given.
    pub context: String,
    /// What is scored; the space between the two belongs to it.
    pub continuation: String,
}

impl Request {
    /// A continuation after a space.
    pub fn spaced(context: impl Into<String>, continuation: &str) -> Self {
        Self { context: context.into(), continuation: format!(" {continuation}") }
    }
}

/// A [`Request`] as token ids; neither part is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRequest {
    /// What is given, its beginning cut off if the whole is longer than the model reads.
    pub context: Vec<u32>,
    /// What is scored.
    pub continuation: Vec<u32>,
}

/// Tokenises requests for one model.
#[derive(Debug, Clone)]
pub struct RequestEncoder {
    tokenizer: Tokenizer,
    eos_id: u32,
    /// Stands in for an empty context: the token that the tokenizer begins texts with, or else the end-of-document token.
    prefix_id: u32,
    /// That token as text.
    prefix: String,
    num_tokens: usize,
    max_length: usize,
}

impl RequestEncoder {
    /// For a model with this vocabulary (a number of entries, or a model's configuration) that reads at most `max_length` tokens. What
    /// the tokenizer puts before a text is put before each context, unless that begins with it as text.
    ///
    /// # Errors
    /// If the tokenizer does not fit the model, or neither knows an end-of-document token; [`Error::Argument`] for a `max_length` of 0.
    pub fn new(mut tokenizer: Tokenizer, vocabulary: impl Into<Vocabulary>, max_length: usize) -> Result<Self> {
        if max_length == 0 {
            return Err(Error::Argument("a max_length of 0 leaves no room for a token; raise it".into()));
        }
        let vocabulary = vocabulary.into();
        check_fits(&tokenizer, vocabulary.size)?;
        let eos_id = vocabulary.end_of_document(&tokenizer)?;
        // A file may carry its trainer's padding or truncation.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(error)?;
        let empty = tokenizer.encode_fast("", true).map_err(error)?;
        let prefix_id = empty.get_ids().first().copied().unwrap_or(eos_id);
        let prefix = tokenizer.decode(&[prefix_id], false).map_err(error)?;
        let num_tokens = required_vocab_size(&tokenizer);
        Ok(Self { tokenizer, eos_id, prefix_id, prefix, num_tokens, max_length })
    }

    /// Most tokens that the model reads.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// One more than the highest id of the tokenizer: ids from there on are padding of the model's vocabulary.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// The end-of-document token.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// Encodes context and continuation together and splits them where the context alone would end. White space at the
    /// context's end goes to the continuation. Where both are longer than `max_length` and the one token that is only predicted,
    /// the context loses its beginning.
    ///
    /// # Errors
    /// If the text cannot be encoded; [`Error::Argument`] for a continuation of no tokens, or one longer than `max_length`.
    ///
    /// # Source
    /// lm-eval 0.4.13, `api/model.py` (`loglikelihood`, `_encode_pair`) and `models/huggingface.py` (`tok_encode`,
    /// `_loglikelihood_tokens`).
    pub fn encode(&self, request: &Request) -> Result<TokenRequest> {
        let given = python::strip_end(&request.context);
        let moved = &request.context[given.len()..];
        let (context, continuation) = match given {
            "" => self.split_prefix(self.ids(&format!("{moved}{}", request.continuation), false)?),
            given => {
                let begins = self.begins(given);
                let context = self.ids(given, begins)?;
                let whole = self.ids(&format!("{given}{moved}{}", request.continuation), begins)?;
                let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
                (context, continuation)
            }
        };
        self.check(request, &continuation)?;
        let excess = (context.len() + continuation.len()).saturating_sub(self.max_length + 1);
        Ok(TokenRequest { context: context[excess..].to_vec(), continuation })
    }

    /// The last tokens of a prompt, at most `room`, that something is generated after; never none.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode_prompt(&self, prompt: &str, room: usize) -> Result<Vec<u32>> {
        let ids = self.ids(prompt, self.begins(prompt))?;
        Ok(match ids.len().min(room) {
            0 => vec![self.prefix_id],
            kept => ids[ids.len() - kept..].to_vec(),
        })
    }

    /// The text of tokens, without special ones.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(error)
    }

    /// A continuation without a context.
    fn split_prefix(&self, mut ids: Vec<u32>) -> (Vec<u32>, Vec<u32>) {
        if ids.first() == Some(&self.prefix_id) {
            let rest = ids.split_off(1);
            return (ids, rest);
        }
        (vec![self.prefix_id], ids)
    }

    fn check(&self, request: &Request, continuation: &[u32]) -> Result<()> {
        let (text, count) = (&request.continuation, continuation.len());
        if count == 0 {
            return Err(Error::Argument(format!("the continuation {text:?} has no tokens of its own; give it text")));
        }
        if count > self.max_length {
            let max_length = self.max_length;
            return Err(Error::Argument(format!(
                "the continuation {text:?} has {count} tokens, but the model reads {max_length}; raise --max-length, or leave \
                 this task to a model of longer sequences"
            )));
        }
        Ok(())
    }

    /// Whether the tokenizer may put before a text what it begins texts with.
    fn begins(&self, text: &str) -> bool {
        self.prefix.is_empty() || !text.starts_with(&self.prefix)
    }

    fn ids(&self, text: &str, begins: bool) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode_fast(text, begins).map_err(error)?.get_ids().to_vec())
    }
}

fn error(e: impl std::fmt::Display) -> Error {
    moe_models::Error::Tokenizer(e.to_string()).into()
}
