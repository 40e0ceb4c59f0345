//! The body of `POST /v1/responses`.

use super::super::chat_request::{ChatRequest, take_variables};
use super::super::common_request::{Common, StreamOptions};
use super::super::fields::{Fields, inside, wrong};
use super::super::grammar_request::{Wanted, response_format};
use super::super::limits::MAX_LOGPROBS;
use super::super::tool_request::{ToolShape, ToolUse};
use super::input::take_input;
use crate::text::ChatMessage;
use crate::{Error, Result, ServedModel};
use serde_json::{Map, Value, json};

/// OpenAI's fields that this server does not have.
const UNSUPPORTED: [&str; 13] = [
    "background",
    "context_management",
    "conversation",
    "max_tool_calls",
    "metadata",
    "moderation",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "verbosity",
];

/// What `include` may name.
const INCLUDED: &str = "message.output_text.logprobs";

/// A request, every field checked.
#[derive(Debug)]
pub(in super::super) struct ResponseRequest {
    pub(in super::super) chat: ChatRequest,
    /// The settings that the answer repeats.
    pub(in super::super) settings: Map<String, Value>,
}

impl ResponseRequest {
    pub(in super::super) fn from_json(body: Map<String, Value>, model: &ServedModel) -> Result<Self> {
        let mut settings = settings_of(&body);
        let mut fields = Fields::new(body);
        // Nothing is kept whether it is said or not.
        if fields.boolean("store")? == Some(true) {
            let text = "`store`: this server keeps no responses; set it to false or leave it out, and send earlier items in `input`";
            return Err(Error::field("store", text));
        }
        match fields.text("truncation")?.as_deref() {
            None | Some("disabled") => {}
            Some(other) => return Err(wrong("truncation", "disabled: nothing of `input` is left out", &other.into())),
        }
        if fields.take("response_format").is_some() {
            let text = "`response_format` is a field of chats; in responses it is `text.format`";
            return Err(Error::field("response_format", text));
        }
        let form = take_text(&mut fields)?;
        let reasoning = take_reasoning(&mut fields)?;
        let mut common = Common::take(&mut fields, model)?;
        if common.n != 1 {
            return Err(Error::field("n", "`n`: a response is one answer; leave it out"));
        }
        if common.stream.is_some_and(|options| options != StreamOptions::default()) {
            return Err(Error::field("stream_options", "`stream_options`: the usage is always sent; leave it out"));
        }
        if common.experts {
            let text = "`return_expert_choices` belongs to completions and chat completions; leave it out";
            return Err(Error::field("return_expert_choices", text));
        }
        if form.is_some() && common.grammar.is_some() {
            return Err(Error::field(
                "structured_outputs",
                "`structured_outputs` and `text.format` exclude each other",
            ));
        }
        let form = form.map(|source| Wanted { source, field: "text.format" });
        common.grammar = form.or(common.grammar.take());
        let max_seq_len = model.lm.max_seq_len();
        let max_tokens = fields.count("max_output_tokens", 1..=usize::MAX)?;
        if let Some(max_tokens) = max_tokens {
            common.check_max_tokens("max_output_tokens", max_tokens, max_seq_len)?;
        }
        let logprobs = take_logprobs(&mut fields)?;
        let mut messages = Vec::new();
        messages.extend(fields.text("instructions")?.map(|text| ChatMessage::new("system", text)));
        messages.extend(take_input(fields.take("input").ok_or_else(|| Error::field("input", "`input` is missing"))?)?);
        let tools = ToolUse::take(&mut fields, ToolShape::Flat, model)?;
        if let Some(effort) = reasoning {
            fields.put("reasoning_effort", effort);
        }
        let variables = take_variables(&mut fields, model).map_err(of_reasoning)?;
        fields.finish(&UNSUPPORTED)?;
        settings.insert("temperature".into(), json!(common.sampling.temperature));
        settings.insert("top_p".into(), json!(common.sampling.top_p));
        settings.insert("top_logprobs".into(), logprobs.unwrap_or(0).into());
        settings.insert("parallel_tool_calls".into(), tools.parallel.into());
        let chat = ChatRequest { common, messages, max_tokens, logprobs, tools, variables, messages_field: "input" };
        Ok(Self { chat, settings })
    }
}

/// What an answer repeats as it was sent, or says of what was left out.
fn settings_of(body: &Map<String, Value>) -> Map<String, Value> {
    let or =
        |name: &str, otherwise: Value| body.get(name).filter(|value| !value.is_null()).cloned().unwrap_or(otherwise);
    let settings = json!({
        "instructions": or("instructions", Value::Null),
        "max_output_tokens": or("max_output_tokens", Value::Null),
        "metadata": {},
        "previous_response_id": null,
        "reasoning": or("reasoning", json!({"effort": null, "summary": null})),
        "store": false,
        "text": or("text", json!({"format": {"type": "text"}})),
        "tool_choice": or("tool_choice", "auto".into()),
        "tools": or("tools", json!([])),
        "truncation": "disabled",
        "user": or("user", Value::Null),
    });
    settings.as_object().cloned().unwrap_or_default()
}

/// `text.format`, OpenAI's form of an answer here.
fn take_text(fields: &mut Fields) -> Result<Option<crate::text::GrammarSource>> {
    let Some(text) = fields.object("text")? else { return Ok(None) };
    let mut text = Fields::new(text);
    let mut read = || match text.object("format")? {
        Some(mut format) => {
            // What chats put into an object of its own lies beside the type.
            if format.get("type").is_some_and(|kind| kind == "json_schema") {
                format.remove("type");
                format = [("type".to_owned(), "json_schema".into()), ("json_schema".to_owned(), Value::Object(format))]
                    .into_iter()
                    .collect();
            }
            response_format(format).map_err(|error| inside("format", error))
        }
        None => Ok(None),
    };
    let form = read().map_err(|error| inside("text", error))?;
    text.finish(&["verbosity"]).map_err(|error| inside("text", error))?;
    Ok(form)
}

/// `include` and `top_logprobs`: how many alternatives of each token, if its log-probability is wanted.
fn take_logprobs(fields: &mut Fields) -> Result<Option<usize>> {
    let include = fields.take("include").unwrap_or_else(|| json!([]));
    let parts = include.as_array().ok_or_else(|| wrong("include", "a list", &include))?;
    if let Some(i) = parts.iter().position(|part| part != INCLUDED) {
        let expected = format!("{INCLUDED}, the only thing that can be included here");
        return Err(wrong(&format!("include[{i}]"), &expected, &parts[i]));
    }
    let top = fields.count("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (parts.is_empty(), top) {
        (false, top) => Ok(Some(top.unwrap_or(0))),
        (true, Some(1..)) => {
            Err(Error::field("top_logprobs", format!("`top_logprobs` needs `include`: [\"{INCLUDED}\"]")))
        }
        (true, _) => Ok(None),
    }
}

/// The effort has another name in chats, where variables come from.
fn of_reasoning(error: Error) -> Error {
    match error {
        Error::Field { field, message } if field == "reasoning_effort" => {
            Error::field("reasoning.effort", message.replace("reasoning_effort", "reasoning.effort"))
        }
        other => other,
    }
}

fn take_reasoning(fields: &mut Fields) -> Result<Option<Value>> {
    let Some(reasoning) = fields.object("reasoning")? else { return Ok(None) };
    let mut reasoning = Fields::new(reasoning);
    let effort = reasoning.take("effort");
    reasoning.finish(&["summary", "generate_summary"]).map_err(|error| inside("reasoning", error))?;
    Ok(effort)
}
