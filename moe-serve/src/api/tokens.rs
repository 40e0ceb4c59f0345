//! `POST /tokenize` and `/detokenize`, as vLLM has them.

use super::chat_request::take_variables;
use super::common_request::token_id;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::limits::MAX_JSON_VALUES;
use super::message_request::take_messages;
use super::prepare::{bytes_of, check_counted_bytes};
use super::server::AppState;
use super::tool_request::{ToolShape, ToolUse};
use crate::text::Detokenizer;
use crate::{Error, Result, ServedModel};
use serde_json::{Map, Value, json};

/// The ids of a prompt or of a conversation.
pub(super) fn tokenize(body: Map<String, Value>, state: &AppState) -> std::result::Result<Value, ApiError> {
    let mut fields = Fields::new(body);
    state.check_model(fields.text("model")?.as_deref())?;
    let model = &state.model;
    let tokens = take_tokens(&mut fields, model)?;
    // vLLM's default, which is what is done.
    fields.drop_if("add_generation_prompt", true);
    let with_names = fields.boolean("return_token_strs")?.unwrap_or(false);
    fields.finish(&["add_generation_prompt"])?;
    let names = with_names.then(|| tokens.iter().map(|&id| model.tokenizer.shown(id)).collect::<Vec<_>>());
    let max_model_len = model.lm.max_seq_len();
    Ok(json!({"count": tokens.len(), "max_model_len": max_model_len, "tokens": tokens, "token_strs": names}))
}

/// The tokens of either kind of request.
pub(super) fn take_tokens(fields: &mut Fields, model: &ServedModel) -> Result<Vec<u32>> {
    let special = fields.boolean("add_special_tokens")?;
    match (fields.text("prompt")?, fields.take("messages")) {
        (Some(text), None) => {
            check_counted_bytes(model, "prompt", text.len())?;
            if special == Some(false) { model.tokenizer.encode_whole(&text) } else { model.tokenizer.encode(&text) }
        }
        (None, Some(_)) if special.is_some_and(|special| special == model.chat.says_special_tokens()) => {
            let text = format!(
                "`add_special_tokens`: the chat format of this model says whether there are any; leave it out, or give {}",
                !model.chat.says_special_tokens()
            );
            Err(Error::field("add_special_tokens", text))
        }
        (None, Some(messages)) => {
            let tools = ToolUse::take(fields, ToolShape::Nested, model)?.tools;
            let variables = take_variables(fields, model)?;
            let messages = take_messages(messages)?;
            check_counted_bytes(model, "messages", bytes_of(&messages, &tools))?;
            let prompt = model.chat.render_with(&messages, &tools, &variables)?;
            check_counted_bytes(model, "messages", prompt.len())?;
            model.encode_chat(&prompt)
        }
        (Some(_), Some(_)) => {
            Err(Error::field("messages", "`messages` and `prompt` exclude each other; leave one out"))
        }
        (None, None) => Err(Error::field("prompt", "`prompt` is missing")),
    }
}

/// The text of ids.
pub(super) fn detokenize(body: Map<String, Value>, state: &AppState) -> std::result::Result<Value, ApiError> {
    let mut fields = Fields::new(body);
    state.check_model(fields.text("model")?.as_deref())?;
    let tokens = fields.take("tokens").ok_or_else(|| Error::field("tokens", "`tokens` is missing"))?;
    fields.finish(&[])?;
    let num_tokens = state.model.tokenizer.num_tokens();
    let expected = format!("a list of at most {MAX_JSON_VALUES} token ids below {num_tokens}");
    let ids: Option<Vec<u32>> =
        tokens.as_array().and_then(|ids| ids.iter().map(|id| token_id(id, num_tokens)).collect());
    let ids = ids.ok_or_else(|| wrong("tokens", &expected, &tokens))?;
    let mut detokenizer = Detokenizer::default();
    let mut text: String = ids.iter().map(|&id| detokenizer.push(state.model.tokenizer.bytes(id))).collect();
    text.push_str(&detokenizer.finish());
    Ok(json!({"prompt": text}))
}
