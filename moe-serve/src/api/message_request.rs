//! `messages`: what was said, asked of tools, and answered by them.

use super::fields::{Fields, inside, wrong};
use super::json::parse_text;
use super::limits::{MAX_CALLS_IN_MESSAGE, MAX_JSON_VALUES, MAX_MESSAGES, MAX_PARTS};
use crate::text::{ChatMessage, ToolCall};
use crate::{Error, Result};
use serde_json::{Map, Value};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// OpenAI's fields of messages that no template here is told.
const UNSUPPORTED: [&str; 8] =
    ["name", "refusal", "audio", "annotations", "function_call", "tool_calls", "tool_call_id", "reasoning_content"];

/// The messages of a conversation.
pub(super) fn take_messages(value: Value) -> Result<Vec<ChatMessage>> {
    let mut nested = Nested::default();
    match value {
        Value::Array(items) if (1..=MAX_MESSAGES).contains(&items.len()) => items
            .into_iter()
            .enumerate()
            .map(|(i, item)| message(&format!("messages[{i}]"), item, &mut nested))
            .collect(),
        other => Err(wrong("messages", &format!("an array of 1 to {MAX_MESSAGES} messages"), &other)),
    }
}

fn message(path: &str, item: Value, nested: &mut Nested) -> Result<ChatMessage> {
    let Value::Object(map) = item else { return Err(wrong(path, "an object with `role` and `content`", &item)) };
    let mut fields = Fields::new(map);
    let role_path = format!("{path}.role");
    let role = match fields.take("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role,
        other => return Err(wrong(&role_path, &format!("one of {}", ROLES.join(", ")), &other.unwrap_or_default())),
    };
    let mut message = ChatMessage { role, ..ChatMessage::default() };
    match message.role.as_str() {
        "assistant" => {
            message.reasoning = fields.text("reasoning_content").map_err(|error| inside(path, error))?;
            // What OpenAI's clients make of an answer's text when they parse it, and then give back beside it.
            fields.take("parsed");
            fields.drop_empty("annotations");
            if let Some(calls) = fields.take("tool_calls") {
                message.tool_calls = tool_calls(&format!("{path}.tool_calls"), calls, nested)?;
            }
        }
        "tool" => {
            message.tool_call_id = fields.text("tool_call_id").map_err(|error| inside(path, error))?;
            message.name = fields.text("name").map_err(|error| inside(path, error))?;
            if message.tool_call_id.is_none() {
                let field = format!("{path}.tool_call_id");
                return Err(Error::field(&field, format!("`{field}` is missing: which call does this answer?")));
            }
        }
        _ => {}
    }
    match fields.take("content") {
        None if !message.tool_calls.is_empty() => {}
        value => message.content = Some(content(&format!("{path}.content"), value.unwrap_or_default())?),
    }
    fields.finish(&UNSUPPORTED).map_err(|error| inside(path, error))?;
    Ok(message)
}

/// A string, or a list of `{"type": "text", "text": ...}`, which are joined.
pub(super) fn content(path: &str, value: Value) -> Result<String> {
    parts(path, value, &["text"])
}

/// The same with other names for a part of text.
pub(super) fn parts(path: &str, value: Value, types: &[&str]) -> Result<String> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if (1..=MAX_PARTS).contains(&parts.len()) => parts,
        other => return Err(wrong(path, "a string or a list of text parts", &other)),
    };
    let silent = |key: &String, value: &Value| match key.as_str() {
        "type" | "text" => true,
        // What an answer's part has that is given back.
        "annotations" => value.is_null() || value.as_array().is_some_and(Vec::is_empty),
        "logprobs" => value.is_null() || value.is_array(),
        _ => false,
    };
    let mut joined = String::new();
    for (i, part) in parts.iter().enumerate() {
        let known = part.as_object().is_some_and(|part| part.iter().all(|(key, value)| silent(key, value)));
        let is_text = part["type"].as_str().is_some_and(|kind| types.contains(&kind));
        let expected = format!("{{\"type\": \"{}\", \"text\": ...}}, the only kind of part here", types[0]);
        let text = part["text"].as_str().filter(|_| known && is_text);
        joined.push_str(text.ok_or_else(|| wrong(&format!("{path}[{i}]"), &expected, part))?);
    }
    Ok(joined)
}

fn tool_calls(path: &str, value: Value, nested: &mut Nested) -> Result<Vec<ToolCall>> {
    let expected = format!("a list of at most {MAX_CALLS_IN_MESSAGE} calls");
    match value {
        Value::Array(calls) if calls.len() <= MAX_CALLS_IN_MESSAGE => {
            calls.into_iter().enumerate().map(|(i, call)| tool_call(&format!("{path}[{i}]"), call, nested)).collect()
        }
        other => Err(wrong(path, &expected, &other)),
    }
}

fn tool_call(path: &str, value: Value, nested: &mut Nested) -> Result<ToolCall> {
    let Value::Object(map) = value else { return Err(wrong(path, "an object with `id` and `function`", &value)) };
    let mut fields = Fields::new(map);
    let mut read = || {
        let id = fields.text("id")?.ok_or_else(|| Error::field("id", "`id` is missing"))?;
        match fields.take("type") {
            None => {}
            Some(kind) if kind == "function" => {}
            Some(other) => return Err(wrong("type", "function", &other)),
        }
        // Where a client gives back what a stream brought.
        fields.take("index");
        let function = fields.object("function")?.ok_or_else(|| Error::field("function", "`function` is missing"))?;
        Ok((id, function))
    };
    let (id, function) = read().map_err(|error| inside(path, error))?;
    fields.finish(&[]).map_err(|error| inside(path, error))?;
    let path = format!("{path}.function");
    let mut fields = Fields::new(function);
    let mut read = || {
        let name = fields.text("name")?.ok_or_else(|| Error::field("name", "`name` is missing"))?;
        // The same of arguments.
        fields.take("parsed_arguments");
        Ok((name, nested.arguments("arguments", fields.take("arguments"))?))
    };
    let (name, arguments) = read().map_err(|error| inside(&path, error))?;
    fields.finish(&[]).map_err(|error| inside(&path, error))?;
    Ok(ToolCall { id, name, arguments })
}

/// Reads the JSON that a request holds as text, which together has no more values than the request itself may have.
pub(super) struct Nested {
    values_left: usize,
}

impl Default for Nested {
    fn default() -> Self {
        Self { values_left: MAX_JSON_VALUES }
    }
}

impl Nested {
    /// JSON in a string on the wire; some clients send the object itself.
    pub(super) fn arguments(&mut self, field: &str, value: Option<Value>) -> Result<Map<String, Value>> {
        let value = value.unwrap_or_default();
        let parsed = match &value {
            Value::String(text) if text.trim().is_empty() => Some(Map::new()),
            Value::String(text) => parse_text(text, &mut self.values_left).ok(),
            Value::Object(arguments) => Some(arguments.clone()),
            _ => None,
        };
        parsed.ok_or_else(|| wrong(field, "a JSON object, written as a string", &value))
    }
}
