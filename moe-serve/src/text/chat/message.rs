//! What a conversation is made of: messages, the calls of tools in them, and the tools that may be called.

use serde_json::{Map, Value, json};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; an assistant's message of nothing but calls has none.
    pub content: Option<String>,
    /// What an assistant thought before it answered.
    pub reasoning: Option<String>,
    /// Calls an assistant made.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a `tool` message answers.
    pub tool_call_id: Option<String>,
    /// Who speaks, or which tool answers.
    pub name: Option<String>,
}

impl ChatMessage {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), ..Self::default() }
    }

    /// Whether it is a developer's, and a prompt does not have it.
    pub(super) fn is_lost_in(&self, prompt: &str) -> bool {
        self.role == "developer" && self.content.as_ref().is_some_and(|text| !prompt.contains(text.trim()))
    }

    /// As templates know it: `content` is always there, and the rest where it is said.
    pub(super) fn to_json(&self, arguments: ArgumentsAs, told: &ToldAs) -> Value {
        let mut fields = Map::new();
        fields.insert("role".into(), self.role.as_str().into());
        let mut content = self.content.as_deref();
        if let Some(reasoning) = &self.reasoning {
            fields.insert("reasoning_content".into(), reasoning.as_str().into());
            if told.thinking {
                let both = !reasoning.is_empty() && content.is_some_and(|content| !content.is_empty());
                let joins = told.one_text_before_calls && both && !self.tool_calls.is_empty();
                let before = if joins { content.take() } else { None };
                let thought = before.map_or_else(|| reasoning.clone(), |text| format!("{reasoning}\n{text}"));
                fields.insert("thinking".into(), thought.into());
            }
        }
        fields.insert("content".into(), content.map_or_else(|| told.empty.clone(), Value::from));
        if !self.tool_calls.is_empty() {
            fields.insert("tool_calls".into(), self.tool_calls.iter().map(|call| call.to_json(arguments)).collect());
        }
        for (key, value) in [("tool_call_id", &self.tool_call_id), ("name", &self.name)] {
            if let Some(value) = value {
                fields.insert(key.into(), value.as_str().into());
            }
        }
        Value::Object(fields)
    }
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// By which its answer names it.
    pub id: String,
    /// The tool.
    pub name: String,
    /// By name.
    pub arguments: Map<String, Value>,
}

/// What a template looks for in messages.
#[derive(Debug)]
pub(super) struct ToldAs {
    /// The content of a message that has none.
    pub(super) empty: Value,
    /// Whether it calls an assistant's thoughts `thinking`.
    pub(super) thinking: bool,
    /// Whether it refuses thoughts beside text before calls, and takes either as an analysis.
    pub(super) one_text_before_calls: bool,
}

/// How a template wants the arguments of a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum ArgumentsAs {
    Object,
    /// JSON in a string, which the first template of DeepSeek-V3 appends to another.
    Text,
}

impl ToolCall {
    fn to_json(&self, arguments: ArgumentsAs) -> Value {
        let object = Value::Object(self.arguments.clone());
        let arguments = match arguments {
            ArgumentsAs::Object => object,
            ArgumentsAs::Text => super::python::to_json(&object, &Default::default()).into(),
        };
        json!({"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}})
    }
}

/// A function that a model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// JSON schema of its arguments, an object.
    pub parameters: Map<String, Value>,
    /// The tool as the client wrote it, which is what templates show to the model.
    pub definition: Value,
}
