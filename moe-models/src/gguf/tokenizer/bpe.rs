//! `gpt2`: bytes as printable characters, words of them merged pair by pair.

use super::{Vocabulary, pre};
use crate::fields::Checked;
use crate::gguf::file::GgufFile;
use serde_json::{Value, json};

pub(super) fn tokenizer(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Checked<Value> {
    let name = file.text("tokenizer.ggml.pre")?;
    let name = name.ok_or("tokenizer.ggml.pre is missing: how text is cut is not known; convert the model again")?;
    let [normalizer, pre_tokenizer] = pre::stages(name)?;
    let merges = file.texts("tokenizer.ggml.merges")?.ok_or("tokenizer.ggml.merges is missing")?;
    let merges = merges.into_iter().map(pair).collect::<Checked<Vec<_>>>()?;
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre::keeps_whole_words(name)?, "vocab": vocabulary.ids()?, "merges": merges,
        },
    }))
}

/// The two tokens of a merge: a space is between them, and in neither.
fn pair(merge: &str) -> Checked<[&str; 2]> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => Ok([left, right]),
        _ => Err(format!("tokenizer.ggml.merges must be pairs with a space between, got {merge:?}")),
    }
}
