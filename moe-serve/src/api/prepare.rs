//! From a checked request to the engine's [`Job`]: tokenising, length checks, defaults.

use super::chat_request::ChatRequest;
use super::common_request::{Common, StreamOptions};
use super::completion_request::{CompletionRequest, PromptInput};
use crate::engine::{Grammar, Job, StopParams};
use crate::text::{GrammarSource, TextOptions};
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
}

/// Makes the job of a completion request.
pub(super) fn completion(request: CompletionRequest, model: &ServedModel, fresh_seed: u64) -> Result<Prepared> {
    let CompletionRequest { common, prompts, max_tokens, echo, logprobs } = request;
    let generates = usize::from(max_tokens != Some(0));
    let prompts: Vec<Vec<u32>> =
        prompts.into_iter().map(|prompt| encode(model, "prompt", prompt, generates)).collect::<Result<_>>()?;
    let max_tokens = max_tokens.unwrap_or_else(|| default_tokens(model, &prompts, DEFAULT_COMPLETION_TOKENS));
    let text = TextOptions { stops: common.stops.clone(), min_tokens: common.min_tokens, trim_start: false };
    let prompt_logprobs = logprobs.filter(|_| echo);
    let stream = common.stream;
    let grammar = compile(model, common.grammar.as_ref())?;
    let job = Job { prompt_logprobs, grammar, ..job(common, prompts, max_tokens, logprobs, fresh_seed) };
    Ok(Prepared { job, text, echo, stream })
}

/// Makes the job of a chat request.
pub(super) fn chat(request: ChatRequest, model: &ServedModel, fresh_seed: u64) -> Result<Prepared> {
    let ChatRequest { common, messages, max_tokens, logprobs } = request;
    // The template only adds to the messages, so a conversation that is too long is refused before it is rendered.
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    check_bytes(model, "messages", bytes)?;
    let prompt = encode(model, "messages", PromptInput::Text(model.chat.render(&messages)?), 1)?;
    let prompts = vec![prompt];
    let max_tokens = max_tokens.unwrap_or_else(|| default_tokens(model, &prompts, model.lm.max_seq_len()));
    let stops = common.stops.iter().cloned().chain(model.chat.stop_strings()).collect();
    let text = TextOptions { stops, min_tokens: common.min_tokens, trim_start: model.chat.trims_start() };
    let stream = common.stream;
    let grammar = compile(model, common.grammar.as_ref())?;
    let job = Job { grammar, ..job(common, prompts, max_tokens, logprobs, fresh_seed) };
    Ok(Prepared { job, text, echo: false, stream })
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
    let mut ids = match prompt {
        PromptInput::Tokens(ids) => ids,
        PromptInput::Text(text) => {
            check_bytes(model, field, text.len())?;
            model.tokenizer.encode(&text)?
        }
    };
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
