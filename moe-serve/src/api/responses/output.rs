//! [`ResponseWriter`]: pieces of an answer to the items of a response and the events of its stream.

use super::super::piece::{CallPiece, Piece};
use super::super::render::token_logprobs;
use super::super::types::Usage;
use crate::engine::FinishReason;
use crate::text::TextTokenizer;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The item that grows.
#[derive(Debug)]
enum Open {
    Message { text: String, logprobs: Vec<Value> },
    Reasoning(String),
    Call { call_id: String, name: String, arguments: String },
}

impl Open {
    fn nothing_said() -> Self {
        Self::Message { text: String::new(), logprobs: Vec::new() }
    }
}

/// Writes one response.
#[derive(Debug)]
pub(in super::super) struct ResponseWriter {
    /// 16 digits, which its id and those of its items end with.
    number: String,
    created: u64,
    model: String,
    tokenizer: Arc<TextTokenizer>,
    settings: Map<String, Value>,
    items: Vec<Value>,
    open: Option<Open>,
    /// Log-probabilities of tokens whose text has not come, if they are wanted.
    early: Vec<Value>,
    finish: Option<FinishReason>,
    events: usize,
}

impl ResponseWriter {
    pub(in super::super) fn new(
        number: String,
        created: u64,
        model: String,
        tokenizer: Arc<TextTokenizer>,
        settings: Map<String, Value>,
    ) -> Self {
        let (items, early) = Default::default();
        Self { number, created, model, tokenizer, settings, items, open: None, early, finish: None, events: 0 }
    }

    /// The first events of a stream.
    pub(super) fn begin(&mut self) -> Vec<Value> {
        let response = self.response("in_progress", None);
        ["response.created", "response.in_progress"].map(|kind| self.event(kind, json!({"response": response}))).into()
    }

    /// What a piece adds.
    pub(super) fn push(&mut self, piece: Piece) -> Vec<Value> {
        let mut events = Vec::new();
        // Only text tells how likely it was: of thoughts and calls nothing is kept.
        self.early.extend(token_logprobs(&piece.tokens, &self.tokenizer).into_iter().map(|logprob| json!(logprob)));
        if !piece.reasoning.is_empty() {
            self.early.clear();
            if !matches!(self.open, Some(Open::Reasoning(_))) {
                self.open_item(Open::Reasoning(String::new()), &mut events);
            }
            self.more(&piece.reasoning, &mut events);
        }
        if !piece.text.is_empty() {
            if !matches!(self.open, Some(Open::Message { .. })) {
                self.open_item(Open::nothing_said(), &mut events);
            }
            self.more(&piece.text, &mut events);
        }
        for CallPiece { opening, arguments, .. } in piece.calls {
            self.early.clear();
            if let Some((call_id, name)) = opening {
                self.open_item(Open::Call { call_id, name, arguments: String::new() }, &mut events);
            }
            if !arguments.is_empty() {
                self.more(&arguments, &mut events);
            }
        }
        self.finish = piece.finish.or(self.finish);
        events
    }

    /// The last events of a stream.
    pub(super) fn end(&mut self, usage: Usage) -> Vec<Value> {
        let mut events = Vec::new();
        self.finish_items(&mut events);
        let status = self.status();
        let response = self.response(status, Some(usage));
        events.push(self.event(&format!("response.{status}"), json!({"response": response})));
        events
    }

    /// The whole response, after the last piece.
    pub(super) fn whole(mut self, usage: Usage) -> Value {
        self.finish_items(&mut Vec::new());
        self.response(self.status(), Some(usage))
    }

    /// An event that ends a stream early.
    pub(super) fn error(&mut self, error: &Value) -> Value {
        let fields = json!({"code": error["code"], "message": error["message"], "param": error["param"]});
        self.event("error", fields)
    }

    fn status(&self) -> &'static str {
        if self.finish == Some(FinishReason::Length) { "incomplete" } else { "completed" }
    }

    /// An answer of nothing is a message of nothing.
    fn finish_items(&mut self, events: &mut Vec<Value>) {
        if self.open.is_none() && self.items.is_empty() {
            self.open_item(Open::nothing_said(), events);
        }
        self.close_item(events);
    }

    fn response(&self, status: &str, usage: Option<Usage>) -> Value {
        let details = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let mut response = Map::new();
        for (key, value) in [
            ("id", json!(format!("resp_{}", self.number))),
            ("object", json!("response")),
            ("created_at", json!(self.created)),
            ("status", json!(status)),
            ("error", Value::Null),
            ("incomplete_details", json!(details)),
            ("model", json!(self.model)),
            ("output", json!(self.items)),
            ("usage", json!(usage.map(usage_of))),
        ] {
            response.insert(key.to_owned(), value);
        }
        response.extend(self.settings.clone());
        Value::Object(response)
    }

    fn event(&mut self, kind: &str, fields: Value) -> Value {
        let mut event = json!({"type": kind, "sequence_number": self.events});
        self.events += 1;
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
        event
    }

    /// An event of the item that is open.
    fn item_event(&mut self, kind: &str, fields: Value) -> Value {
        let mut all = json!({"item_id": self.item_id(), "output_index": self.items.len()});
        if let (Some(all), Value::Object(fields)) = (all.as_object_mut(), fields) {
            all.extend(fields);
        }
        self.event(kind, all)
    }

    fn item_id(&self) -> String {
        let prefix = match &self.open {
            Some(Open::Reasoning(_)) => "rs",
            Some(Open::Call { .. }) => "fc",
            Some(Open::Message { .. }) | None => "msg",
        };
        format!("{prefix}_{}{}", self.number, self.items.len())
    }

    fn item(&self, status: &str) -> Value {
        let id = self.item_id();
        match &self.open {
            Some(Open::Call { call_id, name, arguments }) => json!({
                "type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": arguments, "status": status,
            }),
            Some(Open::Reasoning(text)) => {
                let content = if status == "in_progress" { json!([]) } else { json!([thought(text)]) };
                json!({"type": "reasoning", "id": id, "summary": [], "content": content, "status": status})
            }
            Some(Open::Message { text, logprobs }) => {
                let content = if status == "in_progress" { json!([]) } else { json!([part(text, logprobs)]) };
                json!({"type": "message", "id": id, "role": "assistant", "content": content, "status": status})
            }
            None => Value::Null,
        }
    }

    fn open_item(&mut self, open: Open, events: &mut Vec<Value>) {
        self.close_item(events);
        self.open = Some(open);
        let item = self.item("in_progress");
        let output_index = self.items.len();
        events.push(self.event("response.output_item.added", json!({"output_index": output_index, "item": item})));
        if let Some(part) = self.part_of_nothing() {
            events.push(self.item_event("response.content_part.added", json!({"content_index": 0, "part": part})));
        }
    }

    /// The part of the item that has just been opened, if it has parts.
    fn part_of_nothing(&self) -> Option<Value> {
        match self.open.as_ref()? {
            Open::Message { .. } => Some(part("", &[])),
            Open::Reasoning(_) => Some(thought("")),
            Open::Call { .. } => None,
        }
    }

    fn more(&mut self, text: &str, events: &mut Vec<Value>) {
        let (kind, fields) = match &mut self.open {
            Some(Open::Message { text: all, logprobs }) => {
                let more = std::mem::take(&mut self.early);
                all.push_str(text);
                logprobs.extend_from_slice(&more);
                ("response.output_text.delta", json!({"content_index": 0, "delta": text, "logprobs": more}))
            }
            Some(Open::Reasoning(all)) => {
                all.push_str(text);
                ("response.reasoning_text.delta", json!({"content_index": 0, "delta": text}))
            }
            Some(Open::Call { arguments, .. }) => {
                arguments.push_str(text);
                ("response.function_call_arguments.delta", json!({"delta": text}))
            }
            None => return,
        };
        events.push(self.item_event(kind, fields));
    }

    fn close_item(&mut self, events: &mut Vec<Value>) {
        match &self.open {
            Some(Open::Message { text, logprobs }) => {
                let part = part(text, logprobs);
                let done = json!({"content_index": 0, "text": text, "logprobs": logprobs});
                events.push(self.item_event("response.output_text.done", done));
                events.push(self.item_event("response.content_part.done", json!({"content_index": 0, "part": part})));
            }
            Some(Open::Reasoning(text)) => {
                let done = json!({"content_index": 0, "text": text});
                let part = thought(text);
                events.push(self.item_event("response.reasoning_text.done", done));
                events.push(self.item_event("response.content_part.done", json!({"content_index": 0, "part": part})));
            }
            Some(Open::Call { name, arguments, .. }) => {
                let done = json!({"name": name, "arguments": arguments});
                events.push(self.item_event("response.function_call_arguments.done", done));
            }
            None => return,
        }
        let item = self.item(self.status());
        let output_index = self.items.len();
        events.push(self.event("response.output_item.done", json!({"output_index": output_index, "item": item})));
        self.items.push(item);
        self.open = None;
    }
}

fn part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

fn thought(text: &str) -> Value {
    json!({"type": "reasoning_text", "text": text})
}

fn usage_of(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ServedModel;
    use moe_models::Precision;

    /// The parts of a thought begin and end as those of a text do: OpenAI's client for Node.js relies on it.
    #[test]
    fn events_of_a_thought_and_a_text() {
        let tokenizer = ServedModel::embedded(None, Precision::Bf16).expect("loads").tokenizer;
        let mut writer = ResponseWriter::new("0".into(), 0, "m".into(), tokenizer, Map::new());
        let mut events = writer.begin();
        for (reasoning, text) in [("th", ""), ("ought", ""), ("", "an"), ("", "swer")] {
            events.extend(writer.push(Piece { reasoning: reasoning.into(), text: text.into(), ..Piece::default() }));
        }
        events.extend(writer.push(Piece { finish: Some(FinishReason::Stop), ..Piece::default() }));
        writer.finish_items(&mut events);
        let shown: Vec<String> = events
            .iter()
            .map(|event| {
                let kind = event["type"].as_str().unwrap_or_default().trim_start_matches("response.");
                let part = &event["part"];
                match part["type"].as_str() {
                    Some(of) => format!("{kind} {of} {}", part["text"]),
                    None => kind.to_owned(),
                }
            })
            .collect();
        let want = [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added reasoning_text \"\"",
            "reasoning_text.delta",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done reasoning_text \"thought\"",
            "output_item.done",
            "output_item.added",
            "content_part.added output_text \"\"",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done output_text \"answer\"",
            "output_item.done",
        ];
        assert_eq!(shown, want);
    }
}
