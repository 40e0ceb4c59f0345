//! [`gpt2_tokenizer`]: the two files of GPT-2's tokenizer, which Megatron is started with, as one.

use crate::train::tokenizer::{END_OF_TEXT, parse};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;
use tokenizers::Tokenizer;

/// The tokenizer of `vocab.json` and `merges.txt` (Megatron's `--vocab-file` and `--merge-file`).
///
/// # Errors
/// [`Error::Io`] if one cannot be read; [`Error::Format`] naming what is wrong with it.
pub fn gpt2_tokenizer(vocab_file: &Path, merge_file: &Path) -> Result<Tokenizer> {
    let read = |path: &Path| std::fs::read(path).map_err(|e| Error::io(path, e));
    let vocab: Map<String, Value> = serde_json::from_slice(&read(vocab_file)?)
        .map_err(|e| Error::format(vocab_file, format!("must be an object of tokens and their ids: {e}")))?;
    let Some(end) = vocab.get(END_OF_TEXT) else {
        return Err(Error::format(vocab_file, format!("has no token {END_OF_TEXT}, as GPT-2's has")));
    };
    let end = json!([{
        "id": end, "content": END_OF_TEXT, "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false,
    }]);
    let merges = String::from_utf8(read(merge_file)?).map_err(|_| Error::format(merge_file, "must be UTF-8"))?;
    let is_merge = |line: &&str| !line.is_empty() && !line.starts_with("#version");
    let merges = merges.lines().filter(is_merge).map(|line| match line.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => Ok([left, right]),
        _ => Err(Error::format(
            merge_file,
            format!("must have two tokens and a space between them on a line, got {line:?}"),
        )),
    });
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": end, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": merges.collect::<Result<Vec<_>>>()?,
        },
    });
    parse(json.to_string().as_bytes(), vocab_file)
}
