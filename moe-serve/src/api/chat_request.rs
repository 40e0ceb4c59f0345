//! The body of `POST /v1/chat/completions`.

use super::common_request::{Common, UNSUPPORTED};
use super::fields::{Fields, wrong};
use super::limits::{MAX_LOGPROBS, MAX_MESSAGES, MAX_PARTS};
use crate::text::ChatMessage;
use crate::{Error, Result, ServedModel};
use serde_json::{Map, Value};

const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// OpenAI's chat fields that this server does not have.
const UNSUPPORTED_IN_CHAT: [&str; 11] = [
    "audio",
    "function_call",
    "functions",
    "modalities",
    "parallel_tool_calls",
    "reasoning_effort",
    "safety_identifier",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
];

/// A chat request, every field checked.
#[derive(Debug)]
pub(super) struct ChatRequest {
    pub(super) common: Common,
    pub(super) messages: Vec<ChatMessage>,
    pub(super) max_tokens: Option<usize>,
    pub(super) logprobs: Option<usize>,
}

impl ChatRequest {
    pub(super) fn from_json(body: Map<String, Value>, model: &ServedModel) -> Result<Self> {
        let mut fields = Fields::new(body);
        let common = Common::take(&mut fields, model)?;
        let max_tokens = take_max_tokens(&mut fields, &common, model.lm.max_seq_len())?;
        let messages = fields.take("messages").ok_or_else(|| Error::field("messages", "`messages` is missing"))?;
        let messages = take_messages(messages)?;
        let request = Self { max_tokens, messages, logprobs: take_logprobs(&mut fields)?, common };
        fields.finish(&[&UNSUPPORTED_IN_CHAT[..], &UNSUPPORTED].concat())?;
        Ok(request)
    }
}

fn take_max_tokens(fields: &mut Fields, common: &Common, max_seq_len: usize) -> Result<Option<usize>> {
    let old = fields.count("max_tokens", 1..=usize::MAX)?;
    let new = fields.count("max_completion_tokens", 1..=usize::MAX)?;
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let text = format!("`max_completion_tokens` is {new} but `max_tokens` is {old}; leave out the second");
        return Err(Error::field("max_completion_tokens", text));
    }
    let field = if new.is_some() { "max_completion_tokens" } else { "max_tokens" };
    let max_tokens = new.or(old);
    if let Some(max_tokens) = max_tokens {
        common.check_max_tokens(field, max_tokens, max_seq_len)?;
    }
    Ok(max_tokens)
}

fn take_logprobs(fields: &mut Fields) -> Result<Option<usize>> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, Some(1..)) => Err(Error::field("top_logprobs", "`top_logprobs` needs `logprobs`: true")),
        (false, _) => Ok(None),
    }
}

/// The messages of a conversation.
pub(super) fn take_messages(value: Value) -> Result<Vec<ChatMessage>> {
    match value {
        Value::Array(items) if (1..=MAX_MESSAGES).contains(&items.len()) => {
            items.into_iter().enumerate().map(|(i, item)| message(&format!("messages[{i}]"), item)).collect()
        }
        other => Err(wrong("messages", &format!("an array of 1 to {MAX_MESSAGES} messages"), &other)),
    }
}

fn message(path: &str, item: Value) -> Result<ChatMessage> {
    let Value::Object(map) = item else { return Err(wrong(path, "an object with `role` and `content`", &item)) };
    let mut fields = Fields::new(map);
    let role_path = format!("{path}.role");
    let role = match fields.take("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role,
        other => return Err(wrong(&role_path, &format!("one of {}", ROLES.join(", ")), &other.unwrap_or_default())),
    };
    let content = content(&format!("{path}.content"), fields.take("content").unwrap_or_default())?;
    fields.finish(&["name", "refusal", "audio", "tool_calls", "function_call"]).map_err(|error| match error {
        Error::Field { field, message } => Error::field(format!("{path}.{field}"), message),
        other => other,
    })?;
    Ok(ChatMessage { role, content })
}

/// A string, or a list of `{"type": "text", "text": ...}`, which are joined.
fn content(path: &str, value: Value) -> Result<String> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if (1..=MAX_PARTS).contains(&parts.len()) => parts,
        other => return Err(wrong(path, "a string or a list of text parts", &other)),
    };
    let mut joined = String::new();
    for (i, part) in parts.iter().enumerate() {
        let known = part.as_object().is_some_and(|part| part.keys().all(|key| key == "type" || key == "text"));
        let text = part["text"].as_str().filter(|_| known && part["type"] == "text");
        let expected = "{\"type\": \"text\", \"text\": ...}, the only kind of part here";
        joined.push_str(text.ok_or_else(|| wrong(&format!("{path}[{i}]"), expected, part))?);
    }
    Ok(joined)
}
