//! `input`: a text, or the items of a conversation, made into messages.

use super::super::fields::{Fields, inside, wrong};
use super::super::limits::MAX_MESSAGES;
use super::super::message_request::{Nested, parts};
use crate::text::{ChatMessage, ToolCall};
use crate::{Error, Result};
use serde_json::{Map, Value};

const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];
const TEXT_PARTS: [&str; 3] = ["input_text", "output_text", "text"];
/// What an item of an answer has that is given back, and which says nothing to the model.
const SILENT: [&str; 4] = ["id", "status", "encrypted_content", "phase"];

/// The messages of `input`.
pub(super) fn take_input(value: Value) -> Result<Vec<ChatMessage>> {
    let items = match value {
        Value::String(text) => return Ok(vec![ChatMessage::new("user", text)]),
        Value::Array(items) if (1..=MAX_MESSAGES).contains(&items.len()) => items,
        other => return Err(wrong("input", &format!("a string, or 1 to {MAX_MESSAGES} items"), &other)),
    };
    let mut conversation = Conversation::default();
    for (i, item) in items.into_iter().enumerate() {
        let path = format!("input[{i}]");
        let Value::Object(map) = item else { return Err(wrong(&path, "an object with a `type`", &item)) };
        conversation.item(map).map_err(|error| inside(&path, error))?;
    }
    Ok(conversation.messages)
}

#[derive(Default)]
struct Conversation {
    messages: Vec<ChatMessage>,
    /// Belongs to the assistant's next message or call.
    reasoning: Option<String>,
    nested: Nested,
}

impl Conversation {
    fn item(&mut self, map: Map<String, Value>) -> Result<()> {
        let mut fields = Fields::new(map);
        let kind = fields.text("type")?.unwrap_or_else(|| "message".to_owned());
        for name in SILENT {
            fields.text(name)?;
        }
        if let Some(summary) = fields.take("summary").filter(|summary| !summary.is_array()) {
            return Err(wrong("summary", "a list", &summary));
        }
        match kind.as_str() {
            "message" => self.message(&mut fields)?,
            "function_call" => self.call(&mut fields)?,
            "function_call_output" => {
                let output = fields.take("output").ok_or_else(|| missing("output"))?;
                let message = ChatMessage {
                    tool_call_id: Some(fields.text("call_id")?.ok_or_else(|| missing("call_id"))?),
                    ..ChatMessage::new("tool", parts("output", output, &TEXT_PARTS)?)
                };
                self.messages.push(message);
            }
            "reasoning" => {
                if let Some(content) = fields.take("content") {
                    self.reasoning = Some(parts("content", content, &["reasoning_text"])?);
                }
            }
            _ => {
                let expected =
                    "message, function_call, function_call_output or reasoning, which are all that is supported";
                return Err(wrong("type", expected, &Value::String(kind)));
            }
        }
        fields.finish(&[])
    }

    fn message(&mut self, fields: &mut Fields) -> Result<()> {
        let role = fields.text("role")?.ok_or_else(|| missing("role"))?;
        if !ROLES.contains(&role.as_str()) {
            return Err(wrong("role", &format!("one of {}", ROLES.join(", ")), &Value::String(role)));
        }
        let content = fields.take("content").ok_or_else(|| missing("content"))?;
        let reasoning = if role == "assistant" { self.reasoning.take() } else { None };
        let content = parts("content", content, &TEXT_PARTS)?;
        self.messages.push(ChatMessage { reasoning, ..ChatMessage::new(role, content) });
        Ok(())
    }

    /// Calls side by side, and the text before them, are one message.
    fn call(&mut self, fields: &mut Fields) -> Result<()> {
        let call = ToolCall {
            id: fields.text("call_id")?.ok_or_else(|| missing("call_id"))?,
            name: fields.text("name")?.ok_or_else(|| missing("name"))?,
            arguments: self.nested.arguments("arguments", fields.take("arguments"))?,
        };
        match self.messages.last_mut() {
            Some(last) if last.role == "assistant" && self.reasoning.is_none() => last.tool_calls.push(call),
            _ => self.messages.push(ChatMessage {
                role: "assistant".into(),
                reasoning: self.reasoning.take(),
                tool_calls: vec![call],
                ..ChatMessage::default()
            }),
        }
        Ok(())
    }
}

fn missing(field: &str) -> Error {
    Error::field(field, format!("`{field}` is missing"))
}
