//! Fields that completions and chat completions share.

use super::fields::{Fields, inside, wrong};
use super::grammar_request::{Wanted, take_grammar};
use super::limits::{MAX_LOGIT_BIAS, MAX_N, MAX_PRIORITY, MAX_STOP_BYTES, MAX_STOP_TOKENS, MAX_STOPS, MAX_USER_BYTES};
use crate::engine::SamplingParams;
use crate::{Error, Result, ServedModel};
use serde_json::Value;

/// OpenAI's fields that neither endpoint has here.
pub(super) const UNSUPPORTED: [&str; 4] = ["metadata", "service_tier", "store", "prediction"];

/// What a request asks for beside its prompt.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) model: Option<String>,
    /// `seed` is set where the request names one.
    pub(super) sampling: SamplingParams,
    pub(super) seed: Option<u64>,
    pub(super) n: usize,
    pub(super) stops: Vec<String>,
    pub(super) min_tokens: usize,
    /// Whether `min_tokens` is the request's own, not the model's.
    asks_min_tokens: bool,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) stream: Option<StreamOptions>,
    /// Extension: report the experts of every token.
    pub(super) experts: bool,
    /// Requests with smaller numbers go first.
    pub(super) priority: i32,
    pub(super) user: Option<String>,
    pub(super) grammar: Option<Wanted>,
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StreamOptions {
    /// A last chunk with the usage.
    pub(super) include_usage: bool,
    /// The usage so far in every chunk.
    pub(super) continuous_usage: bool,
}

impl Common {
    pub(super) fn take(fields: &mut Fields, model: &ServedModel) -> Result<Self> {
        let num_tokens = model.tokenizer.num_tokens();
        let defaults = &model.defaults;
        let mut stops = take_stops(fields)?;
        stops.extend(defaults.stop_strings.iter().cloned());
        let min_tokens = fields.count("min_tokens", 0..=model.lm.max_seq_len())?;
        Ok(Self {
            model: fields.text("model")?,
            sampling: take_sampling(fields, model)?,
            seed: fields.integer("seed")?,
            n: fields.count("n", 1..=MAX_N)?.unwrap_or(1),
            stops,
            min_tokens: min_tokens.unwrap_or(defaults.min_new_tokens),
            asks_min_tokens: min_tokens.is_some(),
            stop_token_ids: take_stop_tokens(fields, num_tokens)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            stream: take_stream(fields)?,
            experts: fields.boolean("return_expert_choices")?.unwrap_or(false),
            priority: take_priority(fields)?,
            user: take_user(fields)?,
            grammar: take_grammar(fields)?,
        })
    }

    /// `max_tokens` against `min_tokens` and the context. Generation also ends where the context does.
    pub(super) fn check_max_tokens(&mut self, field: &str, max_tokens: usize, max_seq_len: usize) -> Result<()> {
        if max_tokens > max_seq_len {
            return Err(Error::field(
                field,
                format!("`{field}`: expected at most {max_seq_len}, the model's context, found {max_tokens}"),
            ));
        }
        if !self.asks_min_tokens {
            self.min_tokens = self.min_tokens.min(max_tokens);
        }
        if self.min_tokens > max_tokens {
            return Err(Error::field(
                "min_tokens",
                format!("`min_tokens`: expected at most `{field}` ({max_tokens}), found {}", self.min_tokens),
            ));
        }
        Ok(())
    }
}

fn take_sampling(fields: &mut Fields, model: &ServedModel) -> Result<SamplingParams> {
    let defaults = &model.defaults.sampling;
    Ok(SamplingParams {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(defaults.temperature),
        top_k: take_top_k(fields)?.unwrap_or(defaults.top_k),
        top_p: fields.positive("top_p", 1.0)?.unwrap_or(defaults.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        repetition_penalty: fields.positive("repetition_penalty", 10.0)?.unwrap_or(defaults.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(defaults.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(defaults.frequency_penalty),
        logit_bias: take_logit_bias(fields, model.tokenizer.num_tokens())?,
        seed: 0,
    })
}

/// As in vLLM, -1 and 0 keep all tokens.
fn take_top_k(fields: &mut Fields) -> Result<Option<usize>> {
    let Some(value) = fields.take("top_k") else { return Ok(None) };
    match value.as_i64() {
        Some(-1) => Ok(Some(0)),
        Some(top_k) if (0..=1 << 24).contains(&top_k) => Ok(Some(top_k as usize)),
        _ => Err(wrong("top_k", "a whole number, or -1 or 0 to keep all tokens", &value)),
    }
}

fn take_stops(fields: &mut Fields) -> Result<Vec<String>> {
    let Some(value) = fields.take("stop") else { return Ok(Vec::new()) };
    let items = value.as_array().map_or(std::slice::from_ref(&value), Vec::as_slice);
    if items.len() > MAX_STOPS {
        return Err(wrong("stop", &format!("a string or at most {MAX_STOPS} strings"), &value));
    }
    let expected = format!("strings of 1 to {MAX_STOP_BYTES} bytes");
    let text = |item: &Value| {
        let text = item.as_str().filter(|text| (1..=MAX_STOP_BYTES).contains(&text.len()));
        text.map(str::to_owned).ok_or_else(|| wrong("stop", &expected, item))
    };
    items.iter().map(text).collect()
}

fn take_stop_tokens(fields: &mut Fields, num_tokens: usize) -> Result<Vec<u32>> {
    let Some(value) = fields.take("stop_token_ids") else { return Ok(Vec::new()) };
    let expected = format!("at most {MAX_STOP_TOKENS} token ids below {num_tokens}");
    let ids = value.as_array().filter(|ids| ids.len() <= MAX_STOP_TOKENS);
    let ids = ids.and_then(|ids| ids.iter().map(|id| token_id(id, num_tokens)).collect());
    ids.ok_or_else(|| wrong("stop_token_ids", &expected, &value))
}

fn take_logit_bias(fields: &mut Fields, num_tokens: usize) -> Result<Vec<(u32, f32)>> {
    let Some(bias) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if bias.len() > MAX_LOGIT_BIAS {
        return Err(wrong("logit_bias", &format!("at most {MAX_LOGIT_BIAS} entries"), &bias.len().into()));
    }
    let entry = |(key, value): (&String, &Value)| {
        let id = key.parse().ok().filter(|&id: &u32| (id as usize) < num_tokens);
        let id = id.ok_or_else(|| {
            let expected = format!("token ids below {num_tokens} as keys");
            wrong("logit_bias", &expected, &Value::String(key.clone()))
        })?;
        let bias = value.as_f64().map(|x| x as f32).filter(|x| (-100.0..=100.0).contains(x));
        Ok((id, bias.ok_or_else(|| wrong("logit_bias", "numbers from -100 to 100", value))?))
    };
    bias.iter().map(entry).collect()
}

fn take_stream(fields: &mut Fields) -> Result<Option<StreamOptions>> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(options) = fields.object("stream_options")? else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        return Err(Error::field("stream_options", "`stream_options` needs `stream`: true"));
    }
    let mut options = Fields::new(options);
    let parsed = StreamOptions {
        include_usage: options.boolean("include_usage")?.unwrap_or(false),
        continuous_usage: options.boolean("continuous_usage_stats")?.unwrap_or(false),
    };
    options.finish(&[]).map_err(|error| inside("stream_options", error))?;
    Ok(Some(parsed))
}

/// As in vLLM, smaller numbers go first.
fn take_priority(fields: &mut Fields) -> Result<i32> {
    let Some(value) = fields.take("priority") else { return Ok(0) };
    let priority = value.as_i64().filter(|priority| (-MAX_PRIORITY..=MAX_PRIORITY).contains(priority));
    let expected = format!("a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}; smaller ones go first");
    priority.map(|priority| priority as i32).ok_or_else(|| wrong("priority", &expected, &value))
}

fn take_user(fields: &mut Fields) -> Result<Option<String>> {
    let user = fields.text("user")?;
    match user {
        Some(user) if user.len() > MAX_USER_BYTES => {
            Err(wrong("user", &format!("a string of at most {MAX_USER_BYTES} bytes"), &Value::String(user)))
        }
        user => Ok(user),
    }
}

/// A token id the tokenizer knows.
pub(super) fn token_id(value: &Value, num_tokens: usize) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < num_tokens)
}
