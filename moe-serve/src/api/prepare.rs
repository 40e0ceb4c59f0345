//! From a checked request to the engine's [`Job`]: tokenising, length checks, defaults.

use super::chat_request::ChatRequest;
use super::common_request::{Common, StreamOptions};
use super::completion_request::{CompletionRequest, PromptInput};
use super::tool_request::{ToolChoice, ToolUse};
use crate::engine::{Grammar, Job, StopParams};
use crate::text::{ChatMessage, GrammarSource, TextOptions, Tool, ToolFormat};
use crate::{Error, Result, ServedModel};
use std::sync::Arc;

/// Tokens to generate where neither request nor model says how many; OpenAI's number.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// A request ready for the engine.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) job: Job,
    pub(super) text: TextOptions,
    pub(super) echo: bool,
    pub(super) stream: Option<StreamOptions>,
    /// How calls and thoughts are told from the text of the answer; as text, without it.
    pub(super) reading: Option<Reading>,
}

/// How the parts of an answer are told apart.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) format: ToolFormat,
    pub(super) tools: Vec<Tool>,
    /// Whether calls after the first one are kept.
    pub(super) parallel: bool,
    /// Whether an answer without calls is of a form, in which nothing looks like a call.
    pub(super) or_form: bool,
}

/// Makes the job of a completion request.
pub(super) fn completion(request: CompletionRequest, model: &ServedModel, fresh_seed: u64) -> Result<Prepared> {
    let CompletionRequest { common, prompts, max_tokens, echo, logprobs } = request;
    let generates = usize::from(max_tokens != Some(0));
    let prompts: Vec<Vec<u32>> =
        prompts.into_iter().map(|prompt| encode(model, "prompt", prompt, generates)).collect::<Result<_>>()?;
    let max_tokens = max_tokens.unwrap_or_else(|| default_tokens(model, &prompts, DEFAULT_COMPLETION_TOKENS));
    let text = TextOptions { stops: common.stops.clone(), min_tokens: common.min_tokens, ..TextOptions::default() };
    let prompt_logprobs = logprobs.filter(|_| echo);
    let stream = common.stream;
    let grammar = compile(model, common.grammar.as_ref())?;
    let job = Job { prompt_logprobs, grammar, ..job(common, prompts, max_tokens, logprobs, fresh_seed) };
    Ok(Prepared { job, text, echo, stream, reading: None })
}

/// Makes the job of a chat request.
pub(super) fn chat(request: ChatRequest, model: &ServedModel, fresh_seed: u64) -> Result<Prepared> {
    let ChatRequest { mut common, messages, max_tokens, logprobs, tools, variables, messages_field } = request;
    check_bytes(model, messages_field, bytes_of(&messages, &tools))?;
    let prompt = model.chat.render_with(&messages, &tools.tools, &variables)?;
    let prompts = vec![fitting(model, messages_field, model.encode_chat(&prompt)?, 1)?];
    let max_tokens = max_tokens.unwrap_or_else(|| default_tokens(model, &prompts, model.lm.max_seq_len()));
    let format = model.chat.tool_format().filter(|format| format.always_reads() || !tools.tools.is_empty());
    let has_form = common.grammar.is_some();
    let grammar = match format.filter(|_| !tools.tools.is_empty()) {
        Some(format) => {
            // A form that cannot be had is not the tools' fault.
            compile(model, common.grammar.as_ref()).map_err(|error| of_form(error, messages_field))?;
            let source = tools.grammar(format, common.grammar.take(), model)?;
            compile(model, source.as_ref()).map_err(of_tools)?
        }
        None => compile(model, common.grammar.as_ref()).map_err(|error| of_form(error, messages_field))?,
    };
    let text = TextOptions {
        stops: common.stops.iter().cloned().chain(model.chat.stop_strings()).collect(),
        min_tokens: common.min_tokens,
        trim_start: model.chat.trims_start(),
        shown_tokens: format.map(|format| format.markers(&model.tokenizer)).unwrap_or_default(),
    };
    let or_form = has_form && tools.choice == ToolChoice::Auto;
    let reading = format.map(|format| Reading { format, tools: tools.tools, parallel: tools.parallel, or_form });
    let stream = common.stream;
    let job = Job { grammar, ..job(common, prompts, max_tokens, logprobs, fresh_seed) };
    Ok(Prepared { job, text, echo: false, stream, reading })
}

/// A template only adds to what it is given, so a conversation that is too long is refused before it is rendered.
fn bytes_of(messages: &[ChatMessage], tools: &ToolUse) -> usize {
    let contents = messages.iter().filter_map(|message| message.content.as_ref()).map(String::len).sum::<usize>();
    let calls = messages.iter().flat_map(|message| &message.tool_calls);
    let names = calls.map(|call| call.name.len()).sum::<usize>();
    contents + names + tools.tools.iter().map(|tool| tool.name.len()).sum::<usize>()
}

/// In responses a form has another name than in chats.
fn of_form(error: Error, messages_field: &str) -> Error {
    match error {
        Error::Grammar(_) if messages_field == "input" => Error::field("text.format", error.to_string()),
        other => other,
    }
}

/// A grammar made of tools fails for their schemas.
fn of_tools(error: Error) -> Error {
    match error {
        Error::Grammar(text) => Error::field("tools", format!("a schema in `tools` cannot be held to: {text}")),
        other => other,
    }
}

fn job(common: Common, prompts: Vec<Vec<u32>>, max_tokens: usize, logprobs: Option<usize>, fresh_seed: u64) -> Job {
    let mut sampling = common.sampling;
    sampling.seed = common.seed.unwrap_or(fresh_seed);
    Job {
        prompts,
        n: common.n,
        sampling,
        stop: StopParams {
            max_tokens,
            min_tokens: common.min_tokens,
            stop_token_ids: common.stop_token_ids,
            ignore_eos: common.ignore_eos,
        },
        logprobs,
        prompt_logprobs: None,
        experts: common.experts,
        priority: common.priority,
        grammar: None,
    }
}

fn compile(model: &ServedModel, source: Option<&GrammarSource>) -> Result<Option<Arc<dyn Grammar>>> {
    source.map(|source| model.grammars()?.compile(source)).transpose()
}

/// The model's own wish, or `otherwise`.
fn default_tokens(model: &ServedModel, prompts: &[Vec<u32>], otherwise: usize) -> usize {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let defaults = &model.defaults;
    let to_length = defaults.max_length.map(|length| length.saturating_sub(longest).max(1));
    defaults.max_new_tokens.or(to_length).unwrap_or(otherwise)
}

/// No tokenizer makes fewer tokens of a text than its bytes divided by the longest token's.
fn check_bytes(model: &ServedModel, field: &str, bytes: usize) -> Result<()> {
    let max_seq_len = model.lm.max_seq_len();
    let longest = model.tokenizer.longest_token_bytes();
    if bytes > max_seq_len * longest {
        return Err(Error::ContextLength {
            field: field.into(),
            message: format!(
                "the prompt has {bytes} bytes, more than {} tokens at {longest} bytes a token; the model's context is \
                 {max_seq_len} tokens; shorten the prompt",
                bytes / longest
            ),
        });
    }
    Ok(())
}

/// Token ids of a prompt that leaves room for `generates` tokens.
fn encode(model: &ServedModel, field: &str, prompt: PromptInput, generates: usize) -> Result<Vec<u32>> {
    let ids = match prompt {
        PromptInput::Tokens(ids) => ids,
        PromptInput::Text(text) => {
            check_bytes(model, field, text.len())?;
            model.tokenizer.encode(&text)?
        }
    };
    fitting(model, field, ids, generates)
}

/// Token ids that leave room for `generates` more.
fn fitting(model: &ServedModel, field: &str, mut ids: Vec<u32>, generates: usize) -> Result<Vec<u32>> {
    if ids.is_empty() {
        let text = || format!("`{field}` is empty, and this model has no token to begin with");
        ids.push(model.first_token().ok_or_else(|| Error::field(field, text()))?);
    }
    let max_seq_len = model.lm.max_seq_len();
    if ids.len() + generates > max_seq_len {
        return Err(Error::ContextLength {
            field: field.into(),
            message: format!(
                "the prompt has {} tokens; the model's context is {max_seq_len} tokens, prompt and answer together; \
                 shorten the prompt",
                ids.len()
            ),
        });
    }
    Ok(ids)
}
