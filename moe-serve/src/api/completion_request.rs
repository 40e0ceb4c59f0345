//! The body of `POST /v1/completions`.

use super::common_request::{Common, UNSUPPORTED, token_id};
use super::fields::{Fields, wrong};
use super::limits::{MAX_CHOICES, MAX_LOGPROBS, MAX_PROMPTS};
use crate::{Error, Result, ServedModel};
use serde_json::{Map, Value};

/// One prompt as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PromptInput {
    /// To be tokenised.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// A completion request, every field checked.
#[derive(Debug)]
pub(super) struct CompletionRequest {
    pub(super) common: Common,
    pub(super) prompts: Vec<PromptInput>,
    pub(super) max_tokens: Option<usize>,
    pub(super) echo: bool,
    pub(super) logprobs: Option<usize>,
}

impl CompletionRequest {
    pub(super) fn from_json(body: Map<String, Value>, model: &ServedModel) -> Result<Self> {
        let mut fields = Fields::new(body);
        let mut common = Common::take(&mut fields, model)?;
        let max_seq_len = model.lm.max_seq_len();
        let max_tokens = fields.count("max_tokens", 0..=usize::MAX)?;
        if let Some(max_tokens) = max_tokens {
            common.check_max_tokens("max_tokens", max_tokens, max_seq_len)?;
        }
        let prompts = take_prompts(&mut fields, model.tokenizer.num_tokens(), max_seq_len)?;
        if prompts.len() * common.n > MAX_CHOICES {
            let text = format!("`n` times the number of prompts may be at most {MAX_CHOICES}; split the request");
            return Err(Error::field("n", text));
        }
        check_best_of(&mut fields, common.n)?;
        let request = Self {
            max_tokens,
            prompts,
            echo: fields.boolean("echo")?.unwrap_or(false),
            logprobs: take_logprobs(&mut fields)?,
            common,
        };
        fields.finish(&[&["suffix"], &UNSUPPORTED[..]].concat())?;
        Ok(request)
    }
}

/// `logprobs` is a count; old clients also write `false`.
fn take_logprobs(fields: &mut Fields) -> Result<Option<usize>> {
    match fields.take("logprobs") {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(value) => {
            let count = value.as_u64().map(|x| x as usize).filter(|&x| x <= MAX_LOGPROBS);
            count
                .map(Some)
                .ok_or_else(|| wrong("logprobs", &format!("a whole number from 0 to {MAX_LOGPROBS}"), &value))
        }
    }
}

/// Ranking more continuations than are returned is not offered.
fn check_best_of(fields: &mut Fields, n: usize) -> Result<()> {
    match fields.take("best_of") {
        Some(value) if value.as_u64() != Some(n as u64) => Err(wrong(
            "best_of",
            &format!("the value of `n` ({n}), for this server does not rank continuations"),
            &value,
        )),
        _ => Ok(()),
    }
}

/// A string, strings, token ids, or lists of token ids.
fn take_prompts(fields: &mut Fields, num_tokens: usize, max_seq_len: usize) -> Result<Vec<PromptInput>> {
    let value = fields.take("prompt").ok_or_else(|| Error::field("prompt", "`prompt` is missing"))?;
    let items = match value {
        Value::String(text) => return Ok(vec![PromptInput::Text(text)]),
        Value::Array(items) if !items.is_empty() => items,
        other => return Err(wrong("prompt", "a string, strings, token ids or lists of token ids, not empty", &other)),
    };
    if items[0].is_number() {
        return Ok(vec![tokens(&items, num_tokens, max_seq_len)?]);
    }
    if items.len() > MAX_PROMPTS {
        return Err(Error::field(
            "prompt",
            format!("`prompt`: expected at most {MAX_PROMPTS} prompts, found {}", items.len()),
        ));
    }
    let prompt = |item: Value| match item {
        Value::String(text) => Ok(PromptInput::Text(text)),
        Value::Array(ids) => tokens(&ids, num_tokens, max_seq_len),
        other => Err(wrong("prompt", "strings or lists of token ids", &other)),
    };
    items.into_iter().map(prompt).collect()
}

fn tokens(ids: &[Value], num_tokens: usize, max_seq_len: usize) -> Result<PromptInput> {
    if ids.len() > max_seq_len {
        return Err(Error::ContextLength {
            field: "prompt".into(),
            message: format!(
                "the prompt has {} tokens, the model's context {max_seq_len}; shorten the prompt",
                ids.len()
            ),
        });
    }
    let id = |value: &Value| {
        let expected = format!("token ids below {num_tokens}, the tokenizer's size");
        token_id(value, num_tokens).ok_or_else(|| wrong("prompt", &expected, value))
    };
    ids.iter().map(id).collect::<Result<_>>().map(PromptInput::Tokens)
}
