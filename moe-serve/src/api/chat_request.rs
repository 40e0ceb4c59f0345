//! The body of `POST /v1/chat/completions`.

use super::common_request::{Common, UNSUPPORTED};
use super::fields::Fields;
use super::limits::MAX_LOGPROBS;
use super::message_request::take_messages;
use super::tool_request::{ToolShape, ToolUse};
use crate::text::{ChatMessage, RESERVED_VARIABLES};
use crate::{Error, Result, ServedModel};
use serde_json::{Map, Value};

/// OpenAI's chat fields that this server does not have.
const UNSUPPORTED_IN_CHAT: [&str; 9] = [
    "audio",
    "function_call",
    "functions",
    "modalities",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
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
    pub(super) tools: ToolUse,
    /// What the template is told beside messages and tools.
    pub(super) variables: Map<String, Value>,
    /// The field that the messages came in.
    pub(super) messages_field: &'static str,
}

impl ChatRequest {
    pub(super) fn from_json(body: Map<String, Value>, model: &ServedModel) -> Result<Self> {
        let mut fields = Fields::new(body);
        let mut common = Common::take(&mut fields, model)?;
        let max_tokens = take_max_tokens(&mut fields, &mut common, model.lm.max_seq_len())?;
        let messages = fields.take("messages").ok_or_else(|| Error::field("messages", "`messages` is missing"))?;
        let messages = take_messages(messages)?;
        let tools = ToolUse::take(&mut fields, ToolShape::Nested, model)?;
        let variables = take_variables(&mut fields, model)?;
        let logprobs = take_logprobs(&mut fields)?;
        // Nothing is kept of a chat.
        fields.drop_if("store", false);
        let request = Self { max_tokens, messages, logprobs, tools, variables, common, messages_field: "messages" };
        fields.finish(&[&UNSUPPORTED_IN_CHAT[..], &UNSUPPORTED].concat())?;
        Ok(request)
    }
}

fn take_max_tokens(fields: &mut Fields, common: &mut Common, max_seq_len: usize) -> Result<Option<usize>> {
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

/// `chat_template_kwargs` (vLLM) and OpenAI's `reasoning_effort`: variables that the model's template knows.
pub(super) fn take_variables(fields: &mut Fields, model: &ServedModel) -> Result<Map<String, Value>> {
    let mut variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    let known = |name: &str| model.chat.has_variable(name) && !RESERVED_VARIABLES.contains(&name);
    if let Some(name) = variables.keys().find(|name| !known(name)) {
        let text = format!("the chat template of this model has no variable `{name:.80}`; leave it out");
        return Err(Error::field(format!("chat_template_kwargs.{name:.80}"), text));
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        if !known("reasoning_effort") {
            let text = "`reasoning_effort`: the chat template of this model does not know it; leave it out";
            return Err(Error::field("reasoning_effort", text));
        }
        variables.insert("reasoning_effort".into(), effort.into());
    }
    Ok(variables)
}
