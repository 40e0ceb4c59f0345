//! [`GenerationDefaults`]: the keys of `generation_config.json` that set what a request leaves open.

use crate::engine::{SamplingParams, StopParams};
use crate::{Error, Result};
use serde_json::{Map, Value};

const FILE: &str = "generation_config.json";

/// Keys that say nothing about how text is generated.
const SILENT: [&str; 4] = ["transformers_version", "_from_model_config", "pad_token_id", "use_cache"];

/// What holds where a request says nothing. Names and meanings are Hugging Face's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// How tokens are drawn; the temperature is 0 where `do_sample` is false.
    pub sampling: SamplingParams,
    /// Tokens to generate.
    pub max_new_tokens: Option<usize>,
    /// Prompt and generated tokens together; `max_new_tokens` wins over it.
    pub max_length: Option<usize>,
    /// Tokens before a stop token may come.
    pub min_new_tokens: usize,
    /// Stands in for an empty prompt.
    pub bos_token_id: Option<u32>,
    /// End a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Never sampled.
    pub suppress_tokens: Vec<u32>,
    /// End a text, beside the request's own.
    pub stop_strings: Vec<String>,
}

impl GenerationDefaults {
    /// Reads the content of a `generation_config.json`; warns about keys that have no effect here.
    ///
    /// # Errors
    /// [`Error::ModelFile`] naming the key if a value is impossible.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        let keys: Map<String, Value> = serde_json::from_slice(json)
            .map_err(|e| Error::model_file(FILE, format!("expected a JSON object: {e}")))?;
        let mut defaults = Self::default();
        for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
            defaults.set(key, value)?;
        }
        if keys.get("do_sample") == Some(&Value::Bool(false)) {
            defaults.sampling.temperature = 0.0;
        }
        Ok(defaults)
    }

    /// When an answer ends whose request does not say how many tokens it may have: `otherwise` where nothing is said here either.
    pub fn ends(&self, otherwise: usize) -> StopParams {
        let max_length = self.max_length.filter(|_| self.max_new_tokens.is_none());
        let max_tokens = self.max_new_tokens.unwrap_or(if max_length.is_some() { usize::MAX } else { otherwise });
        StopParams { max_tokens, max_length, ..StopParams::default() }
    }

    /// The tokens that end a sequence as a `config.json` names them: one, several, or none.
    ///
    /// # Errors
    /// [`Error::ModelFile`] if one is no token id.
    pub(crate) fn eos_token_ids_of(config_json: &[u8]) -> Result<Vec<u32>> {
        const FILE: &str = "config.json";
        let refused = |reason: String| Error::model_file(FILE, reason);
        let keys: Map<String, Value> =
            serde_json::from_slice(config_json).map_err(|e| refused(format!("expected a JSON object: {e}")))?;
        let ids = keys.get("eos_token_id").filter(|ids| !ids.is_null()).into_iter().flat_map(one_or_many);
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        ids.map(|v| id(v).ok_or_else(|| refused(format!("eos_token_id: expected a token id, found {v:.60}")))).collect()
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        match key {
            "temperature" => self.sampling.temperature = number(key, value, |x| (0.0..=2.0).contains(&x), "0 to 2")?,
            "top_p" => self.sampling.top_p = number(key, value, |x| x > 0.0 && x <= 1.0, "above 0, at most 1")?,
            "min_p" => self.sampling.min_p = number(key, value, |x| (0.0..=1.0).contains(&x), "0 to 1")?,
            "repetition_penalty" => {
                self.sampling.repetition_penalty = number(key, value, |x| x > 0.0 && x <= 10.0, "above 0, at most 10")?;
            }
            "top_k" => self.sampling.top_k = count(key, value)?,
            "max_new_tokens" => self.max_new_tokens = Some(count(key, value)?),
            "max_length" => self.max_length = Some(count(key, value)?),
            "min_new_tokens" => self.min_new_tokens = count(key, value)?,
            "bos_token_id" => self.bos_token_id = Some(token_id(key, value)?),
            "eos_token_id" => {
                self.eos_token_ids = one_or_many(value).map(|v| token_id(key, v)).collect::<Result<_>>()?
            }
            "suppress_tokens" => {
                self.suppress_tokens = one_or_many(value).map(|v| token_id(key, v)).collect::<Result<_>>()?;
            }
            "stop_strings" => {
                let text =
                    |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| wrong(key, "a string or strings", v));
                self.stop_strings = one_or_many(value).map(text).collect::<Result<_>>()?;
            }
            "do_sample" if value.is_boolean() => {}
            "do_sample" => return Err(wrong(key, "true or false", value)),
            "num_return_sequences" | "num_beams" if value.as_u64() == Some(1) => {}
            _ if SILENT.contains(&key) => {}
            _ => tracing::warn!(key, %value, "this key of {FILE} has no effect here"),
        }
        Ok(())
    }
}

fn wrong(key: &str, expected: &str, found: &Value) -> Error {
    Error::model_file(FILE, format!("{key}: expected {expected}, found {found:.60}"))
}

fn number(key: &str, value: &Value, allowed: impl Fn(f32) -> bool, expected: &str) -> Result<f32> {
    let number = value.as_f64().map(|x| x as f32).filter(|&x| allowed(x));
    number.ok_or_else(|| wrong(key, &format!("a number, {expected}"), value))
}

fn count(key: &str, value: &Value) -> Result<usize> {
    let count = value.as_u64().and_then(|x| usize::try_from(x).ok());
    count.ok_or_else(|| wrong(key, "a whole number of 0 or more", value))
}

fn token_id(key: &str, value: &Value) -> Result<u32> {
    value.as_u64().and_then(|x| u32::try_from(x).ok()).ok_or_else(|| wrong(key, "a token id", value))
}

fn one_or_many(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice).iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_names_one_end_or_several() {
        let ends = |json: &str| GenerationDefaults::eos_token_ids_of(json.as_bytes());
        assert_eq!(ends(r#"{"eos_token_id": [128001, 128008, 128009]}"#).unwrap(), [128_001, 128_008, 128_009]);
        assert_eq!(ends(r#"{"eos_token_id": 2, "bos_token_id": 1}"#).unwrap(), [2]);
        assert!(ends(r#"{"eos_token_id": null}"#).unwrap().is_empty() && ends("{}").unwrap().is_empty());
        let text = ends(r#"{"eos_token_id": [2, -1]}"#).unwrap_err().to_string();
        assert!(text.contains("config.json") && text.contains("eos_token_id"), "{text}");
    }

    #[test]
    fn reads_what_it_knows() {
        let json =
            br#"{"temperature": 0.8, "top_p": 0.95, "eos_token_id": [0, 2], "max_new_tokens": 64, "typical_p": 0.9,
            "min_p": null, "stop_strings": "END"}"#;
        let got = GenerationDefaults::from_bytes(json).expect("valid");
        let want = GenerationDefaults {
            sampling: SamplingParams { temperature: 0.8, top_p: 0.95, ..Default::default() },
            eos_token_ids: vec![0, 2],
            max_new_tokens: Some(64),
            stop_strings: vec!["END".into()],
            ..Default::default()
        };
        assert_eq!(got, want);
    }

    #[test]
    fn do_sample_false_is_greedy() {
        let got = GenerationDefaults::from_bytes(br#"{"do_sample": false, "temperature": 0.7}"#).expect("valid");
        assert_eq!(got.sampling.temperature, 0.0);
    }

    #[test]
    fn impossible_values_name_the_key() {
        for (json, key) in [
            (r#"{"temperature": -1}"#, "temperature"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"eos_token_id": "x"}"#, "eos_token_id"),
            (r#"{"max_new_tokens": 1.5}"#, "max_new_tokens"),
            (r#"{"do_sample": 1}"#, "do_sample"),
        ] {
            let error = GenerationDefaults::from_bytes(json.as_bytes()).expect_err(json).to_string();
            assert!(error.contains(key), "{json}: {error}");
        }
    }

    #[test]
    fn how_many_tokens_follow_a_prompt() {
        let of = |max_new_tokens, max_length| {
            let defaults = GenerationDefaults { max_new_tokens, max_length, ..GenerationDefaults::default() };
            [10, 90, 120].map(|prompt| defaults.ends(16).tokens_after(prompt, 128))
        };
        assert_eq!(of(None, None), [16, 16, 8], "otherwise 16, as far as the context goes");
        assert_eq!(of(Some(20), Some(100)), [20, 20, 8], "max_new_tokens wins");
        assert_eq!(of(None, Some(100)), [90, 10, 1], "each prompt has its own rest, and one in any case");
    }
}
