//! From a checked request to the engine's [`Job`]: tokenising, length checks, defaults.

use super::chat_request::ChatRequest;
use super::common_request::{Common, StreamOptions};
use super::completion_request::{CompletionRequest, PromptInput};
use super::grammar_request::Wanted;
use super::limits::{MAX_PROMPT_RECORDS, MAX_TOKENIZED_BYTES};
use super::piece::Echo;
use super::tool_request::ToolChoice;
use crate::engine::{Grammar, Job, StopParams};
use crate::text::{AfterThought, ChatMessage, GrammarSource, TextOptions, Tool, ToolFormat};
use crate::{Error, Result, ServedModel};
use serde_json::Value;
use std::sync::Arc;

/// Tokens to generate where neither request nor model says how many; OpenAI's number.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// A request ready for the engine.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) job: Job,
    pub(super) text: TextOptions,
    /// Per prompt, if answers are to repeat it.
    pub(super) echoes: Vec<Echo>,
    pub(super) stream: Option<StreamOptions>,
    /// How calls and thoughts are told from the text of the answer; as text, without it.
    pub(super) reading: Option<Reading>,
}

/// How the parts of an answer are told apart.
#[derive(Debug, Clone)]
pub(super) enum Reading {
    /// Calls from text, and what else their form tells.
    Calls(CallReading),
    /// A thought in marks, which the prompt may have `opened`, from what follows.
    Thought { opened: bool, calls: Option<CallReading> },
}

impl Reading {
    pub(super) fn calls(&self) -> Option<&CallReading> {
        match self {
            Self::Calls(calls) => Some(calls),
            Self::Thought { calls, .. } => calls.as_ref(),
        }
    }
}

/// How calls are told from text.
#[derive(Debug, Clone)]
pub(super) struct CallReading {
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
    let encode = |prompt| encode(model, "prompt", prompt, generates, echo);
    let (prompts, echoes): (Vec<Vec<u32>>, Vec<Option<Echo>>) =
        prompts.into_iter().map(encode).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let echoes = echoes.into_iter().flatten().collect();
    let ends = ends(model, max_tokens, DEFAULT_COMPLETION_TOKENS);
    let text = TextOptions { stops: common.stops.clone(), min_tokens: common.min_tokens, ..TextOptions::default() };
    let prompt_logprobs = logprobs.filter(|_| echo);
    let stream = common.stream;
    let grammar = compile_wanted(model, common.grammar.as_ref())?;
    let job = Job { prompt_logprobs, grammar, ..job(common, prompts, ends, logprobs, fresh_seed) };
    check_records(&job, model.lm.moe_layers().len())?;
    Ok(Prepared { job, text, echoes, stream, reading: None })
}

/// Makes the job of a chat request.
pub(super) fn chat(request: ChatRequest, model: &ServedModel, fresh_seed: u64) -> Result<Prepared> {
    let ChatRequest { mut common, messages, max_tokens, logprobs, tools, variables, messages_field } = request;
    check_bytes(model, messages_field, bytes_of(&messages, &tools.tools), 0)?;
    let rendered = model.chat.render_with(&messages, &tools.tools, &variables);
    let prompt = rendered.map_err(|error| match error {
        Error::Template(_) => Error::field(messages_field, error.to_string()),
        other => other,
    })?;
    check_bytes(model, messages_field, prompt.len(), 0)?;
    let (opens_thought, may_think) = (model.chat.opens_thought(&prompt), model.chat.may_think(&prompt));
    let prompts = vec![fitting(model, messages_field, model.encode_chat(&prompt)?, 1)?];
    let ends = ends(model, max_tokens, model.lm.max_seq_len());
    let format = model.chat.tool_format().filter(|format| format.always_reads() || !tools.tools.is_empty());
    let has_form = common.grammar.is_some();
    let grammar = match format.filter(|_| !tools.tools.is_empty()) {
        Some(format) => {
            // A form that cannot be had is not the tools' fault.
            compile_wanted(model, common.grammar.as_ref())?;
            let source = tools.grammar(format, common.grammar.take().map(|wanted| wanted.source), model)?;
            compile(model, source.as_ref()).map_err(of_tools)?
        }
        None => compile_wanted(model, common.grammar.as_ref())?,
    };
    // An answer that is all form or calls is held to them once its thought is over.
    let is_held = has_form || tools.must_call();
    let thinks = if is_held { may_think } else { model.chat.thinks() };
    let after_thought = |form| AfterThought::new(form, model.thought_tokens(), opens_thought);
    let grammar = match grammar {
        Some(form) if is_held && thinks => Some(Arc::new(after_thought(form)) as Arc<dyn Grammar>),
        other => other,
    };
    let mut shown_tokens = format.map(|format| format.markers(&model.tokenizer)).unwrap_or_default();
    if thinks {
        shown_tokens.extend(model.chat.thought_markers(&model.tokenizer));
    }
    let text = TextOptions {
        stops: common.stops.iter().cloned().chain(model.chat.stop_strings()).collect(),
        min_tokens: common.min_tokens,
        trim_start: model.chat.trims_start(),
        shown_tokens,
    };
    let or_form = has_form && tools.choice == ToolChoice::Auto;
    let calls = format.map(|format| CallReading { format, tools: tools.tools, parallel: tools.parallel, or_form });
    let reading =
        if thinks { Some(Reading::Thought { opened: opens_thought, calls }) } else { calls.map(Reading::Calls) };
    let stream = common.stream;
    let job = Job { grammar, ..job(common, prompts, ends, logprobs, fresh_seed) };
    check_records(&job, model.lm.moe_layers().len())?;
    Ok(Prepared { job, text, echoes: Vec::new(), stream, reading })
}

/// Refuses a job whose answer would tell more of its prompts than a server should hold.
fn check_records(job: &Job, moe_layers: usize) -> Result<()> {
    let alternatives = job.prompt_logprobs.map_or(0, |alternatives| 1 + alternatives);
    let layers = if job.experts { moe_layers } else { 0 };
    let tokens = job.prompts.iter().map(Vec::len).sum::<usize>() * job.n;
    let records = tokens.saturating_mul(alternatives + layers);
    if records <= MAX_PROMPT_RECORDS {
        return Ok(());
    }
    let field = if alternatives > layers { "logprobs" } else { "return_expert_choices" };
    let text = format!(
        "`{field}` would have the answer hold {records} entries for the {tokens} tokens of its prompts, of {MAX_PROMPT_RECORDS} at most; \
         split the request, or ask for less"
    );
    Err(Error::field(field, text))
}

/// A template only adds to what it is given, so a conversation that is too long is refused before it is rendered.
pub(super) fn bytes_of(messages: &[ChatMessage], tools: &[Tool]) -> usize {
    let contents = messages.iter().filter_map(|message| message.content.as_ref()).map(String::len).sum::<usize>();
    let calls = messages.iter().flat_map(|message| &message.tool_calls);
    let calls = calls.map(|call| call.name.len() + call.arguments.values().map(text_bytes).sum::<usize>());
    contents + calls.sum::<usize>() + tools.iter().map(|tool| tool.name.len()).sum::<usize>()
}

/// What a value takes at least, however it is written.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 1,
    }
}

/// A grammar made of tools fails for their schemas.
fn of_tools(error: Error) -> Error {
    match error {
        Error::Grammar(text) => Error::field("tools", format!("a schema in `tools` cannot be held to: {text}")),
        other => other,
    }
}

fn job(common: Common, prompts: Vec<Vec<u32>>, ends: StopParams, logprobs: Option<usize>, fresh_seed: u64) -> Job {
    let mut sampling = common.sampling;
    sampling.seed = common.seed.unwrap_or(fresh_seed);
    Job {
        prompts,
        n: common.n,
        sampling,
        stop: StopParams {
            min_tokens: common.min_tokens,
            stop_token_ids: common.stop_token_ids,
            ignore_eos: common.ignore_eos,
            ..ends
        },
        logprobs,
        prompt_logprobs: None,
        experts: common.experts,
        priority: common.priority,
        grammar: None,
    }
}

/// What a request asks for itself: if it cannot be had, its own field is at fault.
fn compile_wanted(model: &ServedModel, wanted: Option<&Wanted>) -> Result<Option<Arc<dyn Grammar>>> {
    let Some(Wanted { source, field }) = wanted else { return Ok(None) };
    compile(model, Some(source)).map_err(|error| match error {
        Error::Grammar(_) => Error::field(*field, error.to_string()),
        other => other,
    })
}

fn compile(model: &ServedModel, source: Option<&GrammarSource>) -> Result<Option<Arc<dyn Grammar>>> {
    source.map(|source| model.grammars()?.compile(source)).transpose()
}

/// How many tokens follow a prompt: as many as are asked for, the model's own wish, or `otherwise`.
fn ends(model: &ServedModel, max_tokens: Option<usize>, otherwise: usize) -> StopParams {
    let asked = max_tokens.map(|max_tokens| StopParams { max_tokens, ..StopParams::default() });
    asked.unwrap_or_else(|| model.defaults.ends(otherwise))
}

/// No tokenizer makes fewer tokens of a text than its bytes divided by the longest token's. Up to `allowed` bytes may be more than the
/// model reads.
fn check_bytes(model: &ServedModel, field: &str, bytes: usize, allowed: usize) -> Result<()> {
    let max_seq_len = model.lm.max_seq_len();
    let longest = model.tokenizer.longest_token_bytes();
    if bytes > (max_seq_len * longest).max(allowed) {
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

/// The same for a text that is only counted, which may be longer than the model's context, though not without bounds.
pub(super) fn check_counted_bytes(model: &ServedModel, field: &str, bytes: usize) -> Result<()> {
    check_bytes(model, field, bytes, MAX_TOKENIZED_BYTES)
}

/// Token ids of a prompt that leaves room for `generates` tokens, and what repeats it if `echoed`.
fn encode(
    model: &ServedModel,
    field: &str,
    prompt: PromptInput,
    generates: usize,
    echoed: bool,
) -> Result<(Vec<u32>, Option<Echo>)> {
    let (ids, echo) = match prompt {
        PromptInput::Tokens(ids) => {
            let echo = echoed.then(|| Echo::of_tokens(&ids, &model.tokenizer));
            (ids, echo)
        }
        PromptInput::Text(text) => {
            check_bytes(model, field, text.len(), 0)?;
            if echoed {
                let (ids, offsets) = model.tokenizer.encode_with_offsets(&text)?;
                (ids, Some(Echo::of_text(text, offsets)))
            } else {
                (model.tokenizer.encode(&text)?, None)
            }
        }
    };
    Ok((fitting(model, field, ids, generates)?, echo))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_answer_tells_of_its_prompts_has_a_bound() {
        let job = |tokens, n, prompt_logprobs, experts| Job {
            prompts: vec![vec![1; tokens / 2]; 2],
            n,
            prompt_logprobs,
            experts,
            ..Job::default()
        };
        let most = MAX_PROMPT_RECORDS;
        for (job, moe_layers, refused) in [
            (job(most, 1, Some(0), false), 3, None),
            (job(most + 2, 1, Some(0), false), 3, Some("logprobs")),
            (job(most / 2, 1, Some(20), false), 3, Some("logprobs")),
            (job(most / 2, 3, Some(0), false), 3, Some("logprobs")),
            (job(most * 4, 1, None, false), 3, None),
            (job(most, 1, None, true), 1, None),
            (job(most, 1, Some(0), true), 2, Some("return_expert_choices")),
        ] {
            match (check_records(&job, moe_layers), refused) {
                (Ok(()), None) => {}
                (Err(Error::Field { field, message }), Some(wanted)) => {
                    assert!(field == wanted && message.contains("split the request"), "{field}: {message}");
                }
                (result, _) => panic!("{} prompts' tokens: {result:?}, not {refused:?}", job.prompts[0].len()),
            }
        }
    }
}
