//! What of a `tokenizer.json` is refused before the tokenizers crate reads it, because that (0.23) panics there, when it reads the file
//! or at the first text. What is wrong otherwise the crate says itself.

use crate::fields::Checked;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::normalizers::Precompiled;

/// A `tokenizer.json` of which only these parts are looked at.
#[derive(Deserialize)]
struct Parts {
    /// Where its description ends or breaks off, the crate panics, and this is no JSON.
    #[serde(rename = "decoder")]
    _decoder: Option<Value>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    model: Value,
}

/// Refuses by its name what the crate panics at.
pub(super) fn check(json: &[u8]) -> Checked<()> {
    let Parts { normalizer, pre_tokenizer, model, .. } = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    each_of_type(&normalizer, "Precompiled", &mut |part| match Precompiled::deserialize(part) {
        Ok(_) => Ok(()),
        Err(e) => {
            Err(format!("the normalizer Precompiled cannot be read: {e}; its precompiled_charsmap must be base64"))
        }
    })?;
    each_of_type(&pre_tokenizer, "FixedLength", &mut |part| match part["length"].as_u64() {
        Some(0) => Err("the pre_tokenizer FixedLength has a length of 0; it must be 1 or more".into()),
        _ => Ok(()),
    })?;
    check_merges(&model)
}

/// Calls `check` with each object of this `type` in `value`, however deep in sequences; text that is JSON nests only so deep.
fn each_of_type(value: &Value, kind: &str, check: &mut impl FnMut(&Value) -> Checked<()>) -> Checked<()> {
    match value {
        Value::Object(fields) => {
            if fields.get("type").is_some_and(|found| found == kind) {
                check(value)?;
            }
            fields.values().try_for_each(|inner| each_of_type(inner, kind, check))
        }
        Value::Array(items) => items.iter().try_for_each(|inner| each_of_type(inner, kind, check)),
        _ => Ok(()),
    }
}

/// Refuses a pair of a BPE that does not join to a token: the crate reads beyond the pair's second part where a prefix is longer, and
/// writes beyond the longest token where the pair is.
fn check_merges(model: &Value) -> Checked<()> {
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else { return Ok(()) };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    let mut joined = String::new();
    for (index, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(line) => line.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        };
        let Some((first, second)) = pair else { continue };
        let Some(rest) = second.get(prefix.len()..) else {
            return Err(format!(
                "model.merges[{index}] joins {first:?} and {second:?}, which is shorter than model.continuing_subword_prefix {prefix:?}"
            ));
        };
        joined.clear();
        joined.extend([first, rest]);
        if !vocab.contains_key(&joined) {
            return Err(format!(
                "model.merges[{index}] joins {first:?} and {second:?} to {joined:?}, which is not in model.vocab"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::train::tokenizer::parse;
    use serde_json::{Value, json};
    use std::path::Path;

    fn file(normalizer: Value, pre_tokenizer: Value, model: Value) -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null, "model": model,
        })
    }

    fn bpe(prefix: Value, vocab: &[&str], merges: Value) -> Value {
        let vocab: serde_json::Map<_, _> =
            vocab.iter().zip(0..).map(|(&token, id)| (token.into(), id.into())).collect();
        json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": prefix, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges,
        })
    }

    fn plain() -> Value {
        bpe(Value::Null, &["a", "b", "ab"], json!([["a", "b"]]))
    }

    #[track_caller]
    fn refused(file: &Value, part: &str) {
        let text = parse(file.to_string().as_bytes(), Path::new("dir/tokenizer.json")).unwrap_err().to_string();
        assert!(text.starts_with("dir/tokenizer.json: not a tokenizer.json: ") && text.contains(part), "{text}");
    }

    #[track_caller]
    fn read(file: &Value, text: &str, ids: &[u32]) {
        let tokenizer = parse(file.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap().get_ids(), ids);
    }

    #[test]
    fn a_map_of_characters_that_is_none_is_refused() {
        let sequence = |inner: Value| json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, inner]});
        for map in [json!({"type": "Precompiled"}), json!({"type": "Precompiled", "precompiled_charsmap": "*"})] {
            refused(&file(map.clone(), Value::Null, plain()), "the normalizer Precompiled");
            refused(&file(sequence(sequence(map)), Value::Null, plain()), "precompiled_charsmap must be base64");
        }
        read(&file(sequence(json!({"type": "NFD"})), Value::Null, plain()), "ab", &[2]);
    }

    #[test]
    fn pieces_without_length_are_refused() {
        let fixed = |length: u64| json!({"type": "FixedLength", "length": length});
        let sequence = |inner: Value| json!({"type": "Sequence", "pretokenizers": [inner]});
        refused(&file(Value::Null, fixed(0), plain()), "FixedLength has a length of 0");
        refused(&file(Value::Null, sequence(sequence(fixed(0))), plain()), "FixedLength has a length of 0");
        read(&file(Value::Null, sequence(fixed(1)), plain()), "ab", &[0, 1]);
    }

    #[test]
    fn pairs_that_join_to_no_token_are_refused() {
        for merges in [json!([["a", "b"]]), json!(["a b"])] {
            let long = bpe("###".into(), &["a", "b", "ab"], merges.clone());
            refused(&file(Value::Null, Value::Null, long), "shorter than model.continuing_subword_prefix \"###\"");
            let missing = bpe(Value::Null, &["a", "b"], merges.clone());
            refused(&file(Value::Null, Value::Null, missing), "merges[0] joins \"a\" and \"b\" to \"ab\"");
            // A prefix that ends inside of a letter.
            let inside = bpe("#".into(), &["a", "é", "ab"], json!([["a", "é"]]));
            refused(&file(Value::Null, Value::Null, inside), "shorter than");
            read(&file(Value::Null, Value::Null, bpe(Value::Null, &["a", "b", "ab"], merges)), "ab", &[2]);
        }
        read(&file(Value::Null, Value::Null, bpe("##".into(), &["a", "##b", "ab"], json!([["a", "##b"]]))), "ab", &[2]);
    }
}
