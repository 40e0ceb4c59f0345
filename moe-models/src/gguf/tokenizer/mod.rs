//! The tokenizer of a GGUF file as the `tokenizer.json` of a folder, and what `tokenizer_config.json` and `generation_config.json`
//! would say beside it.
//!
//! A tokenizer is built of what the file tells of itself: tokens, their kinds, merges or scores, and the name of how text is cut before.
//! Nothing of how others cut text is guessed: an unknown name is refused.

mod bpe;
mod pre;
mod spm;

use super::file::GgufFile;
use super::value::Value as Metadata;
use crate::fields::Checked;
use serde_json::{Map, Value, json};

/// Keys that are read below, or say nothing about which tokens a text has.
const KNOWN: [&str; 38] = [
    "ggml.model",
    "ggml.pre",
    "ggml.tokens",
    "ggml.token_type",
    "ggml.scores",
    "ggml.merges",
    "ggml.bos_token_id",
    "ggml.eos_token_id",
    "ggml.eot_token_id",
    "ggml.eom_token_id",
    "ggml.unknown_token_id",
    "ggml.seperator_token_id",
    "ggml.padding_token_id",
    "ggml.cls_token_id",
    "ggml.mask_token_id",
    "ggml.add_bos_token",
    "ggml.add_eos_token",
    "ggml.add_sep_token",
    "ggml.add_space_prefix",
    "ggml.remove_extra_whitespaces",
    "ggml.suppress_tokens",
    "ggml.fim_pre_token_id",
    "ggml.fim_suf_token_id",
    "ggml.fim_mid_token_id",
    "ggml.fim_pad_token_id",
    "ggml.fim_rep_token_id",
    "ggml.fim_sep_token_id",
    "ggml.prefix_token_id",
    "ggml.suffix_token_id",
    "ggml.middle_token_id",
    "ggml.token_type_count",
    "ggml.precompiled_charsmap",
    "ggml.normalizer.lowercase",
    "ggml.normalizer.strip_accents",
    "chat_template",
    "chat_templates",
    "huggingface.json",
    "rwkv.world",
];

/// What a token is, as the file numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    /// A special token.
    Control,
    /// Found in text before anything else, and part of it.
    UserDefined,
    /// Fills the table up.
    Unused,
    /// One byte.
    Byte,
}

/// The tokens of a file, by id.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Checked<Self> {
        let tokens = file.texts("tokenizer.ggml.tokens")?.ok_or("tokenizer.ggml.tokens is missing")?;
        let kind = |number: f64| match number as i64 {
            1 => Ok(Kind::Normal),
            2 => Ok(Kind::Unknown),
            3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            5 => Ok(Kind::Unused),
            6 => Ok(Kind::Byte),
            _ => Err(format!("tokenizer.ggml.token_type must be numbers from 1 to 6, got {number}")),
        };
        let kinds = match file.numbers("tokenizer.ggml.token_type", tokens.len())? {
            None => vec![Kind::Normal; tokens.len()],
            Some(kinds) => kinds.into_iter().map(kind).collect::<Checked<_>>()?,
        };
        if kinds.len() != tokens.len() {
            let (kinds, tokens) = (kinds.len(), tokens.len());
            return Err(format!("tokenizer.ggml.token_type has {kinds} entries for {tokens} tokens"));
        }
        Ok(Self { tokens, kinds })
    }

    /// Tokens with their ids and kinds, but for those that fill the table up.
    fn used(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        let all = self.tokens.iter().zip(&self.kinds).zip(0..);
        all.filter(|((_, kind), _)| **kind != Kind::Unused).map(|((token, kind), id)| (id, *token, *kind))
    }

    /// The tokens by their texts.
    fn ids(&self) -> Checked<Map<String, Value>> {
        let mut ids = Map::new();
        for (id, token, _) in self.used() {
            if let Some(other) = ids.insert(token.to_owned(), id.into()) {
                return Err(format!("tokenizer.ggml.tokens has {token:?} twice, as {other} and {id}"));
            }
        }
        Ok(ids)
    }

    /// Those that are found in a text before it is cut.
    fn added(&self) -> Vec<Value> {
        let added = self.used().filter(|(.., kind)| matches!(kind, Kind::Control | Kind::Unknown | Kind::UserDefined));
        added
            .map(|(id, content, kind)| {
                json!({
                    "id": id, "content": content, "special": kind != Kind::UserDefined, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                })
            })
            .collect()
    }

    fn text(&self, key: &str, id: u64) -> Checked<&'a str> {
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id).copied());
        token.ok_or_else(|| format!("tokenizer.ggml.{key} {id} is not one of the {} tokens", self.tokens.len()))
    }

    /// The token that a key names.
    fn named(&self, file: &GgufFile, key: &str) -> Checked<Option<(u64, &'a str)>> {
        let id = file.count(&format!("tokenizer.ggml.{key}"))?;
        id.map(|id| Ok((id, self.text(key, id)?))).transpose()
    }
}

/// The `tokenizer.json`; `None` for a file without a tokenizer.
pub(super) fn tokenizer_json(file: &GgufFile) -> Checked<Option<Value>> {
    let Some(model) = file.text("tokenizer.ggml.model")? else { return Ok(None) };
    check(file)?;
    let vocabulary = Vocabulary::read(file)?;
    let mut json = match model {
        "gpt2" => bpe::tokenizer(file, &vocabulary)?,
        "llama" => spm::tokenizer(file, &vocabulary)?,
        "none" | "no_vocab" => return Ok(None),
        other => {
            return Err(format!(
                "tokenizer.ggml.model must be gpt2 or llama, got {other:?}; nothing else is implemented"
            ));
        }
    };
    let adds_bos = model == "llama" || file.text("tokenizer.ggml.pre")?.is_some_and(pre::adds_bos);
    json["version"] = "1.0".into();
    json["added_tokens"] = vocabulary.added().into();
    json["post_processor"] = post_processor(file, &vocabulary, adds_bos)?;
    Ok(Some(json))
}

/// Refuses what is not implemented.
fn check(file: &GgufFile) -> Checked<()> {
    let known = |key: &&str| !KNOWN.contains(key) && !key.starts_with("chat_template.");
    if let Some(key) = file.keys("tokenizer.").find(known) {
        return Err(format!("tokenizer.{key} is not implemented"));
    }
    for key in ["add_sep_token", "remove_extra_whitespaces", "normalizer.lowercase", "normalizer.strip_accents"] {
        if file.flag(&format!("tokenizer.ggml.{key}"))? == Some(true) {
            return Err(format!("tokenizer.ggml.{key} must be false; nothing else is implemented"));
        }
    }
    match file.value("tokenizer.ggml.precompiled_charsmap") {
        None => Ok(()),
        Some(Metadata::Array(map)) if map.len == 0 => Ok(()),
        Some(_) => Err("tokenizer.ggml.precompiled_charsmap is not implemented".into()),
    }
}

/// What is put before and after each text; null for nothing.
fn post_processor(file: &GgufFile, vocabulary: &Vocabulary<'_>, adds_bos: bool) -> Checked<Value> {
    let mut special = Map::new();
    let mut token = |adds: &str, by_default: bool, key: &str| -> Checked<Option<Value>> {
        if !file.flag(&format!("tokenizer.ggml.{adds}"))?.unwrap_or(by_default) {
            return Ok(None);
        }
        let (id, text) =
            vocabulary.named(file, key)?.ok_or_else(|| format!("tokenizer.ggml.{adds} needs tokenizer.ggml.{key}"))?;
        special.insert(text.into(), json!({ "id": text, "ids": [id], "tokens": [text] }));
        Ok(Some(json!({ "SpecialToken": { "id": text, "type_id": 0 } })))
    };
    let first = token("add_bos_token", adds_bos, "bos_token_id")?;
    let last = token("add_eos_token", false, "eos_token_id")?;
    if first.is_none() && last.is_none() {
        return Ok(Value::Null);
    }
    let around = |name: &str, type_id: u32| {
        let text = json!({ "Sequence": { "id": name, "type_id": type_id } });
        first.iter().chain([&text]).chain(&last).cloned().collect::<Vec<_>>()
    };
    let (single, second) = (around("A", 0), around("B", 1));
    let pair = [single.clone(), second].concat();
    Ok(json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special }))
}

/// The `tokenizer_config.json`: chat template, and the tokens that one may name.
pub(super) fn tokenizer_config(file: &GgufFile) -> Checked<Option<Value>> {
    if file.value("tokenizer.ggml.tokens").is_none() {
        return Ok(None);
    }
    let vocabulary = Vocabulary::read(file)?;
    let named = |key| Checked::Ok(vocabulary.named(file, key)?.map(|(_, text)| text));
    Ok(Some(json!({
        "bos_token": named("bos_token_id")?,
        "eos_token": named("eos_token_id")?,
        "chat_template": file.text("tokenizer.chat_template")?,
    })))
}

/// The `generation_config.json`: tokens that begin and end a text, those that are never drawn, and how others are.
pub(super) fn generation_config(file: &GgufFile) -> Checked<Option<Value>> {
    let id = |key: &str| file.count(&format!("tokenizer.ggml.{key}"));
    // Of a text, of a turn, and of a message.
    let ends = ["eos_token_id", "eot_token_id", "eom_token_id"].map(id).into_iter().collect::<Checked<Vec<_>>>()?;
    let ends: Vec<u64> = ends.into_iter().flatten().collect();
    let mut json = json!({ "bos_token_id": id("bos_token_id")? });
    if !ends.is_empty() {
        json["eos_token_id"] = ends.into();
    }
    let tokens = match file.value("tokenizer.ggml.tokens") {
        Some(Metadata::Array(tokens)) => tokens.len,
        _ => 0,
    };
    if let Some(ids) = file.numbers("tokenizer.ggml.suppress_tokens", tokens)? {
        json["suppress_tokens"] = ids.into_iter().map(|id| id as u64).collect();
    }
    for (name, key) in [
        ("temperature", "temp"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("repetition_penalty", "penalty_repeat"),
    ] {
        if let Some(value) = file.value(&format!("general.sampling.{key}")).and_then(Metadata::to_json) {
            json[name] = value;
        }
    }
    Ok(Some(json))
}
